"""Progress bars on standard error, which only a terminal sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hvpspec.cli.processes import rank

if TYPE_CHECKING:
    from hvpspec import Rung


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


@contextmanager
def product_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many matrix-vector products are done, of the most there will be.

    Args:
        what: what they are for.

    Yields:
        What a function of `hvpspec` calls with the products done and the most there will be.
    """
    with _progress() as progress:
        task = progress.add_task("reading the data", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=f"{what}, products")

        yield show


@contextmanager
def bracket_bar() -> Iterator[tuple[Callable[[int, int], None], Callable[[Rung], None]]]:
    """Show the products done, and between which bounds an index is known to lie by now.

    Yields:
        What `hvpspec.index` calls as ``progress`` and as ``watch``.
    """
    with _progress() as progress:
        task = progress.add_task("measuring the noise", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        bracket = ""

        def watch(rung: Rung) -> None:
            nonlocal bracket
            bracket = f"index in [{rung.lower:,}, {rung.upper:,}] at τ = {rung.tau:.2g}"
            progress.update(task, description=f"{bracket}, products")

        try:
            yield show, watch
        except BaseException:
            if bracket:  # what was found out before somebody lost patience, or something failed
                progress.console.print(f"{bracket} so far", highlight=False)
            raise


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
        disable=rank() > 0 or not console.is_terminal,
    )
