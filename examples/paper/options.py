"""The options that experiments share, and their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hvpspec.zoo.training import Optimizer

#: Names that options allow.
NETS = ("cnn", "mlp2", "mlp3")
DATA = ("mnist", "fashion-mnist")
SAMPLES = ("mnist-sample", "fashion-mnist-sample")
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "lbfgs")


def choice(*allowed: str) -> Callable[[list[str] | None], list[str] | None]:
    """Make a callback that refuses other values; Typer has no choices for repeated options.

    Args:
        allowed: the values of the option.
    """

    def check(values: list[str] | None) -> list[str] | None:
        for value in values or ():
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}")
        return values

    return check


def _sources(default: str) -> Any:
    """The option for data sets, with the words for what they are if nothing is said."""
    return typer.Option(
        "--data",
        callback=choice(*DATA, *SAMPLES),
        help="mnist, fashion-mnist, mnist-sample or fashion-mnist-sample; repeatable.",
        show_default=default,
    )


DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with MNIST/raw or FashionMNIST/raw."),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", help="Folder of the results; made if it is not there, gone on with if it is."
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Runs side by side, each a process.")]
Nets = Annotated[
    list[str] | None,
    typer.Option(
        "--net",
        callback=choice(*NETS),
        help="cnn, mlp2 or mlp3; repeatable.",
        show_default="all three",
    ),
]
Sources = Annotated[list[str] | None, _sources("mnist, fashion-mnist")]
MnistSources = Annotated[list[str] | None, _sources("mnist")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Length of training.")]
Activations = Annotated[
    list[str] | None, typer.Option(help="Activation; repeatable.", show_default="relu, tanh")
]

#: Where results go if nothing else is said.
RESULTS = Path("results")
