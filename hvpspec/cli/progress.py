"""Progress bars on standard error, which only a terminal sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def training_bar(epochs: int) -> Iterator[Callable[[int, float], None]]:
    """Show the epochs of a training, and the objective of the last one.

    Args:
        epochs: how many there will be.

    Yields:
        What `hvpspec.zoo.train` calls after every epoch.
    """
    with _progress() as progress:
        task = progress.add_task("training", total=epochs)

        def show(epoch: int, objective: float) -> None:
            progress.update(
                task, completed=epoch, description=f"training, objective {objective:.4f}"
            )

        yield show


@contextmanager
def hessian_bar() -> Iterator[Callable[[int, int], None]]:
    """Show how far the assembly of a matrix is, and then that its eigenvalues are counted.

    Yields:
        What `hvpspec.index` calls with the columns done and their total.
    """
    with _progress() as progress:
        task = progress.add_task("reading the data", total=None)

        def show(done: int, total: int) -> None:
            text = "assembling the Hessian" if done < total else "counting its eigenvalues"
            progress.update(task, completed=done, total=total, description=text)

        yield show


def _progress() -> Progress:
    """A bar on standard error, gone when done, and absent where nobody watches."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
