"""How far a computation is: a bar on standard error, or whatever the caller wants to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the work done and the most there will be.
Progress = Callable[[int, int], None]


@contextmanager
def shown(progress: Progress | bool | None, what: str) -> Iterator[Progress | None]:
    """Show a bar if ``progress`` is True, for as long as the block runs; a callable is passed on.

    Args:
        progress: True for a `bar`; a callable; None or False for nothing.
        what: what the work is, in a word or two.

    Yields:
        What is to be called with the work done and the most there will be; None for nothing.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        with bar(what) as update:
            yield update


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """Show a bar for as long as the block runs: in a terminal or a notebook, not in a log.

    Of several processes that work together, the first alone shows one.

    Args:
        what: what the work is, in a word or two.

    Yields:
        What is to be called with the work done, the most there will be, and what the work is by
        now if that has changed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    watched = (console.is_terminal or console.is_jupyter) and os.environ.get("RANK", "0") == "0"
    columns = TextColumn("{task.description}", markup=False), BarColumn()
    counts = MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, *counts, console=console, transient=True, disable=not watched) as shown:
        task = shown.add_task(what, total=None)

        def update(done: int, total: int, now: str | None = None) -> None:
            shown.update(task, completed=done, total=total, description=now)

        yield update
