"""The options that commands share, each defined once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from hvpspec.errors import InputError

LossName = Literal["cross_entropy", "mse"]
MethodName = Literal["auto", "exact", "ldl"]
OptimizerName = Literal["sgd", "adam"]

_AS_TRAINED = "as it was trained"

ModelFile = Annotated[
    Path,
    typer.Option("--model", help="Checkpoint, or weights (.pt, .safetensors) together with --net."),
]
NetName = Annotated[
    str | None,
    typer.Option(
        "--net",
        help="mlp2, mlp3, cnn, linear, or module:callable, which is imported and called.",
        show_default="the checkpoint's",
    ),
]
NetArgs = Annotated[
    list[str] | None,
    typer.Option("--net-arg", metavar="NAME=VALUE", help="Argument of the network; repeatable."),
]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="mnist-sample, fashion-mnist-sample, mnist, fashion-mnist, a .npz or .pt file, or"
        " module:callable, which is imported and called.",
        show_default="what it was trained on",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with MNIST/raw or FashionMNIST/raw."),
]
Subset = Annotated[
    int | None, typer.Option("--subset", min=1, help="Use only the first N examples.")
]
L2 = Annotated[
    float | None,
    typer.Option("--l2", help="Coefficient of ‖θ‖².", show_default=_AS_TRAINED),
]
Loss = Annotated[
    LossName | None,
    typer.Option("--loss", help="Loss, a mean.", show_default=_AS_TRAINED),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--params", metavar="PATTERN", help="Only these parameters or modules; repeatable."
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        "--chunk-size", min=1, help="Most examples at once: bounds memory, not the result."
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file too.")]
Seed = Annotated[int, typer.Option("--seed", help="Of initial weights and the order of examples.")]


def parse_net_args(pairs: Sequence[str] | None) -> dict[str, object] | None:
    """Read ``name=value`` pairs; a value is a number, true, false, none, other JSON, or a string.

    Args:
        pairs: as given; None or none for no arguments.

    Raises:
        InputError: a pair has no name or no ``=``, or a name comes twice.

    >>> parse_net_args(["activation=tanh", "bias=false", "in_features=3"])
    {'activation': 'tanh', 'bias': False, 'in_features': 3}
    """
    if not pairs:
        return None
    arguments: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise InputError(f"--net-arg takes name=value, such as activation=tanh, got {pair!r}")
        if name in arguments:
            raise InputError(f"--net-arg {name} is given twice; give it once")
        arguments[name] = _plain_value(value)
    return arguments


def _plain_value(text: str) -> object:
    """Read a value as people write it in Python or in JSON."""
    words: dict[str, object] = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text
