"""How far a computation is: a bar on standard error, or whatever the caller wants to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the work done and the most there will be.
Progress = Callable[[int, int], None]


@contextmanager
def shown(progress: Progress | bool | None, what: str) -> Iterator[Progress | None]:
    """Show a bar if ``progress`` is True, for as long as the block runs; a callable is passed on.

    Args:
        progress: True for a bar, which a terminal or a notebook shows and a log does not; a
            callable; None or False for nothing.
        what: what the work is, in a word or two.

    Yields:
        What is to be called with the work done and the most there will be; None for nothing.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        watched = console.is_terminal or console.is_jupyter
        columns = TextColumn("{task.description}", markup=False), BarColumn()
        counts = MofNCompleteColumn(), TimeElapsedColumn()
        with Bar(*columns, *counts, console=console, transient=True, disable=not watched) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
