"""Progress bars on standard error, which only a terminal sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.paper.sweep import Status


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
def sweep_bar(describe: Callable[[Any], str]) -> Iterator[Callable[[Status[Any]], None]]:
    """Say how much there is to do and how long it may take, then show runs as they end.

    On a terminal there is a bar; a log gets a line for each run. Failures are told in both.

    Args:
        describe: names a run.

    Yields:
        What `sweep` calls as ``watch``.
    """
    with _progress() as progress:
        console = progress.console
        task = progress.add_task("starting", total=None)

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        def show(status: Status[Any]) -> None:
            progress.update(task, total=status.total, completed=status.done + status.failed)
            progress.update(task, description=time_left(status))
            todo = status.total - status.done - status.failed
            if status.run is None:
                say(f"{status.total:,} runs, {status.done:,} done before, {todo:,} to do")
                if todo:
                    say(time_left(status))
            elif isinstance(status.outcome, Exception):
                lines = str(status.outcome).splitlines() or [type(status.outcome).__name__]
                say(f"failed: {describe(status.run)}: {lines[0]}")
            elif not console.is_terminal:
                number = f"{status.done + status.failed:,}/{status.total:,}"
                say(f"{number} {describe(status.run)}; {time_left(status)}")

        yield show


def time_left(status: Status[Any]) -> str:
    """Say how long the rest of a sweep may take, judged by runs that were measured.

    Args:
        status: how far it is.
    """
    if status.seconds_left is None:
        return "no run like these was measured yet: the time they take is known after the first"
    hours, minutes = divmod(round(status.seconds_left / 60), 60)
    text = f"about {hours} h {minutes:02d} min left" if hours else f"about {minutes} min left"
    if status.seconds_left < 60:
        text = "less than a minute left"
    if status.num_unmeasured:
        text += f", and {status.num_unmeasured:,} runs of which none like them was measured"
    return text


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
