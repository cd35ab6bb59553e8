"""Progress of a computation: a bar on standard error, or a callable of the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the amount of work done and the total.
Progress = Callable[[int, int], None]


@contextmanager
def shown(progress: Progress | bool | None, what: str) -> Iterator[Progress | None]:
    """Show a bar while the block runs if ``progress`` is True; pass a callable on.

    Args:
        progress: True for a `bar`; a callable; None or False for nothing.
        what: the work, in a word or two.

    Yields:
        A callable to report progress to, or None.
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
    """Show a bar while the block runs, in a terminal or a notebook but not in a log.

    If several processes work together, only the first shows a bar.

    Args:
        what: the work, in a word or two.

    Yields:
        A callable that takes the amount of work done, the total and, optionally, a new description.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    # torchrun sets RANK; without it there is one process.
    watched = (console.is_terminal or console.is_jupyter) and os.environ.get("RANK", "0") == "0"
    columns = TextColumn("{task.description}", markup=False), BarColumn()
    counts = MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, *counts, console=console, transient=True, disable=not watched) as shown:
        task = shown.add_task(what, total=None)

        def update(done: int, total: int, now: str | None = None) -> None:
            shown.update(task, completed=done, total=total, description=now)

        yield update
