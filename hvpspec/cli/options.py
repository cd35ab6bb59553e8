"""The options that several commands share, and the conversion of their values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hvpspec.errors import InputError
from hvpspec.files import PICTURE_SUFFIXES

LossName = Literal["cross_entropy", "mse"]
EngineName = Literal["auto", "double-backward", "batched", "linearised", "compiled"]

NET_HELP = "mlp2, mlp3, cnn, linear, or module:callable, which is imported and called."
DATA_HELP = (
    "mnist-sample, fashion-mnist-sample, mnist, fashion-mnist, a .npz or .pt file, or"
    " module:callable, which is imported and called."
)
_AS_TRAINED = "as in training"


@dataclass(frozen=True)
class File:
    """Marks an option that names a file, data or code; the last item of its annotation.

    Attributes:
        use: whether it is read, written, or a folder in which products are kept.
        suffixes: allowed endings of a written file; empty for any.
    """

    use: Literal["read", "written", "kept"]
    suffixes: tuple[str, ...] = ()


READ, WRITTEN, KEPT = File("read"), File("written"), File("kept")
PICTURE = File("written", PICTURE_SUFFIXES)


def _option(panel: str, flag: str, help: str, default: str | bool = True, **settings: Any) -> Any:
    """An option in a panel of the help; ``default`` describes what None stands for."""
    if "min" in settings:
        settings.setdefault("metavar", "N")
    return typer.Option(flag, help=help, show_default=default, rich_help_panel=panel, **settings)


of_model = partial(_option, "Model and data")
of_method = partial(_option, "Method")
of_products = partial(_option, "Products with the Hessian")
of_output = partial(_option, "Output")


def positive(value: float | None) -> float | None:
    """Check that a number is positive and finite."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not positive and finite")
    return value


def probability(value: float | None) -> float | None:
    """Check that a number lies between 0 and 1."""
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} does not lie between 0 and 1")
    return value


ModelFile = Annotated[
    Path,
    of_model("--model", "Checkpoint; or weights (.pt, .safetensors), with --net.", metavar="FILE"),
    READ,
]
NetName = Annotated[
    str | None, of_model("--net", NET_HELP, "the checkpoint's", metavar="NAME"), READ
]
NetArgs = Annotated[
    list[str] | None,
    of_model("--net-arg", "Argument of the network; repeatable.", metavar="NAME=VALUE"),
    READ,
]
WeightsName = Annotated[
    str | None,
    of_model(
        "--weights",
        "Which weights, if the file holds several: params_ema, state_dict.net.",
        "those that fit and are not a running average",
        metavar="NAME",
    ),
]
DataName = Annotated[
    str | None, of_model("--data", DATA_HELP, "the training data", metavar="SOURCE"), READ
]
DataDir = Annotated[
    Path | None,
    of_model("--data-dir", "Folder that holds MNIST/raw or FashionMNIST/raw.", metavar="DIR"),
]
Subset = Annotated[int | None, of_model("--subset", "Use the first N examples only.", "all", min=1)]
Loss = Annotated[
    str | None,
    of_model(
        "--loss",
        "cross_entropy, mse, or module:callable, which is imported: a function of outputs and"
        " targets, a class that makes one, or an hvpspec.Loss.",
        _AS_TRAINED,
        metavar="NAME",
    ),
    READ,
]
IgnoreIndex = Annotated[
    int | None,
    of_model("--ignore-index", "Label that the cross-entropy ignores, such as 255.", "-100"),
]
L2 = Annotated[float | None, of_model("--l2", "Coefficient of ‖θ‖².", _AS_TRAINED)]
Params = Annotated[
    list[str] | None,
    of_model(
        "--params",
        'Only these parameters or modules, such as output or "*.bias"; repeatable.',
        "all",
        metavar="PATTERN",
    ),
]
Mode = Annotated[
    Literal["eval", "as-given"],
    of_model(
        "--mode",
        "as-given leaves every module in the mode in which --net builds it, so that BatchNorm,"
        " for instance, may use batch statistics.",
    ),
]
PseudoGradient = Annotated[
    bool,
    of_model(
        "--pseudo-gradient",
        "Accept a gradient that is not the derivative of the loss (straight-through estimators);"
        " then nothing is certified.",
    ),
]
ChunkSize = Annotated[
    int | None,
    of_products(
        "--chunk-size",
        "Largest number of examples at a time; limits memory and changes no result.",
        "by size",
        min=1,
    ),
]
Engine = Annotated[
    EngineName | None,
    of_products(
        "--engine",
        "How products are computed: auto, double-backward, batched, linearised or compiled."
        " Results differ only by round-off.",
        "auto; linearised with --checkpoint",
        metavar="NAME",
    ),
]
CheckpointFolder = Annotated[
    Path | None,
    of_products(
        "--checkpoint",
        "Save all products here, so that the same command can resume where it stopped.",
        metavar="DIR",
    ),
    KEPT,
]
CheckpointEvery = Annotated[
    float | None,
    of_products(
        "--checkpoint-every", "Seconds between two files there.", "60", min=0, metavar="SECONDS"
    ),
]
Seed = Annotated[int, of_method("--seed", "Seed of the initial weights and the order of examples.")]
# None by default, so that a seed that is given can be refused where it has no effect.
ProbeSeed = Annotated[int | None, of_method("--seed", "Seed of the random vectors.", "0", min=0)]
JsonFile = Annotated[
    Path | None, of_output("--json", "Write the result as JSON as well.", metavar="FILE"), WRITTEN
]


def parse_net_args(pairs: Sequence[str] | None) -> dict[str, object] | None:
    """Parse ``name=value`` pairs; a value is true, false, none, JSON, or else a string.

    Raises:
        InputError: a pair has no name or no ``=``, or a name comes twice.

    >>> parse_net_args(["activation=tanh", "bias=false", "in_features=3"])
    {'activation': 'tanh', 'bias': False, 'in_features': 3}
    """
    arguments: dict[str, object] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (equals and name.isidentifier()):
            raise InputError(f"--net-arg takes name=value, such as activation=tanh, got {pair!r}")
        if name in arguments:
            raise InputError(f"--net-arg {name} is given twice; give it once")
        arguments[name] = _plain_value(value)
    return arguments or None


def _plain_value(text: str) -> object:
    """Parse a value written in Python or JSON."""
    words: dict[str, object] = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def refuse_together(reason: str, **options: object) -> None:
    """Raise BadParameter if any of these options is given; underscores stand for hyphens."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")
