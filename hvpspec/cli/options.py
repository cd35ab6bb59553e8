"""The options that commands share, each defined once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from hvpspec.cli.apart import Names
from hvpspec.errors import InputError

LossName = Literal["cross_entropy", "mse"]
MethodName = Literal["auto", "exact", "inertia", "certified", "quadrature", "filtered"]
EngineName = Literal["auto", "double-backward", "batched", "linearised", "compiled"]
ModeName = Literal["eval", "as-given"]
OptimizerName = Literal["sgd", "adam", "lbfgs"]

_AS_TRAINED = "as it was trained"


def _loss_name(name: str | None) -> str | None:
    """Refuse a loss that is neither known nor code."""
    if name is not None and name not in get_args(LossName) and ":" not in name:
        known = ", ".join(get_args(LossName))
        raise typer.BadParameter(f"{name!r} is not one of {known}, nor module:callable")
    return name


ModelFile = Annotated[
    Path,
    typer.Option("--model", help="Checkpoint, or weights (.pt, .safetensors) together with --net."),
    Names.READ,
]
NetName = Annotated[
    str | None,
    typer.Option(
        "--net",
        help="mlp2, mlp3, cnn, linear, or module:callable, which is imported and called.",
        show_default="the checkpoint's",
    ),
    Names.CODE,
]
NetArgs = Annotated[
    list[str] | None,
    typer.Option("--net-arg", metavar="NAME=VALUE", help="Argument of the network; repeatable."),
    Names.READ,
]
WeightsName = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME",
        help="Which weights of a file that holds several: params_ema, state_dict.net.",
        show_default="those that fit and are no average",
    ),
]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="mnist-sample, fashion-mnist-sample, mnist, fashion-mnist, a .npz or .pt file, or"
        " module:callable, which is imported and called.",
        show_default="what it was trained on",
    ),
    Names.READ,
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
    str | None,
    typer.Option(
        "--loss",
        callback=_loss_name,
        help="cross_entropy, mse, or module:callable, which is imported: a function of outputs and"
        " targets, a class of such functions, which is called, or a hvpspec.Loss.",
        show_default=_AS_TRAINED,
    ),
    Names.CODE,
]
IgnoreIndex = Annotated[
    int | None,
    typer.Option(
        "--ignore-index",
        help="Label that does not count in the cross-entropy, such as 255.",
        show_default="-100",
    ),
]
Mode = Annotated[
    ModeName,
    typer.Option(
        "--mode",
        help="eval, or as-given: modules stay in the mode in which --net builds them, say with the"
        " batch statistics of BatchNorm.",
    ),
]
PseudoGradient = Annotated[
    bool,
    typer.Option(
        "--pseudo-gradient",
        help="Allow a gradient that is not the loss's (straight-through); nothing is certified.",
    ),
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
Engine = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        help="How to multiply. Results differ by round-off alone.",
        show_default="auto, or linearised with --checkpoint",
    ),
]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="DIR",
        help="Keep all products here: the same command then goes on where it ended.",
    ),
    Names.KEPT,
]
CheckpointEvery = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Seconds between writing, which are lost if the process is killed.",
        show_default="60",
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the result to this file too."), Names.WRITTEN
]
Seed = Annotated[int, typer.Option("--seed", help="Of initial weights and the order of examples.")]


def _positive(value: float | None) -> float | None:
    """Refuse a width or a tolerance that is not above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not positive and finite")
    return value


def _probability(value: float | None) -> float | None:
    """Refuse what is not between 0 and 1."""
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} does not lie between 0 and 1")
    return value


ProbeSeed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of the random probes.", show_default="0"),
]
Probes = Annotated[
    int | None,
    typer.Option(
        "--probes", min=1, help="Random vectors that advance together.", show_default="by method"
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Most steps from each of them.", show_default="by method"),
]
MaxMatvecs = Annotated[
    int | None,
    typer.Option(
        "--max-matvecs",
        min=1,
        help="Most matrix-vector products to spend.",
        show_default="by command",
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        "--confidence",
        callback=_probability,
        help="Of intervals without the matrix, for each tau.",
        show_default="0.99",
    ),
]
Sigma = Annotated[
    float | None,
    typer.Option(
        "--sigma",
        callback=_positive,
        help="Width of the kernels, in units of the eigenvalues; with --symlog in their logarithm.",
        show_default="a 200th of the range; 0.2",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tol",
        callback=_positive,
        help="Largest residual of an eigenvalue, relative to the norm.",
        show_default="the root of the unit round-off",
    ),
]
RelativeError = Annotated[
    float | None,
    typer.Option(
        "--rtol",
        callback=_positive,
        help="Stop at this standard error, relative to the larger of |trace| and Frobenius norm.",
    ),
]


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
    except (ValueError, RecursionError):
        return text


def refuse_together(reason: str, **options: object) -> None:
    """Refuse options that would have no effect.

    Args:
        reason: why, after the name of the option.
        options: by name, with underscores; None or False where not given.

    Raises:
        typer.BadParameter: one of them is given.
    """
    for name, value in options.items():
        if value is not None and value is not False:
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")
