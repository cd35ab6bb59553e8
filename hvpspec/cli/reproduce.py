"""``hvpspec reproduce``: the paper's experiments, as sweeps that go on where they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hvpspec.cli.experiment import carry_out, check_points, describe_point
from hvpspec.cli.options import DataDir, OptimizerName

_NETS = ("cnn", "mlp2", "mlp3")
_DATA = ("mnist", "fashion-mnist")
_SAMPLES = ("mnist-sample", "fashion-mnist-sample")
_DTYPES = ("float32", "float64")
_OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adam", "lbfgs")
_SOLVERS = ("eigvalsh", "eig")
_ASSEMBLIES = ("blocks", "products")


def _choice(*allowed: str) -> Callable[[list[str] | None], list[str] | None]:
    """Make a callback that refuses other values; Typer has no choices for repeated options."""

    def check(values: list[str] | None) -> list[str] | None:
        for value in values or ():
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}")
        return values

    return check


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
        callback=_choice(*_NETS),
        help="cnn, mlp2 or mlp3; repeatable.",
        show_default="all three",
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        callback=_choice(*_DATA, *_SAMPLES),
        help="mnist, fashion-mnist, mnist-sample or fashion-mnist-sample; repeatable.",
        show_default="mnist, fashion-mnist; mnist-sample with --quick",
    ),
]

reproduce = typer.Typer(
    help="Reproduce the experiments of 'Connectedness of loss landscapes via the lens of Morse"
    " theory'. Each finished run is a line of JSON; an interrupted sweep goes on where it was.",
    no_args_is_help=True,
)

_RESULTS = Path("results")


@reproduce.command()
def table(
    net: Nets = None,
    data: Sources = None,
    activation: Annotated[
        list[str] | None,
        typer.Option(help="Activation; repeatable.", show_default="relu, tanh"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each kind.", show_default="10; 1 with --quick"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="First training images in the Hessian.",
            show_default="10,000; 50 with --quick",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Bundled images, few and one seed, short training: minutes."),
    ] = False,
    jobs: Jobs = 1,
    out: Out = _RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Count negative eigenvalues, trained and random, beside the published numbers."""
    from hvpspec.experiments import QUICK, STANDARD, measure_index, table_grids, table_runs
    from hvpspec.experiments.table import COST

    runs = table_runs(
        net or _NETS,
        data or (_SAMPLES[:1] if quick else _DATA),
        activation or ("relu", "tanh"),
        seeds or (1 if quick else 10),
        images or (50 if quick else 10_000),
        QUICK if quick else STANDARD,
    )
    check_points(runs, max(run.images for run in runs), data_dir)
    measure = partial(measure_index, out=out, data_dir=data_dir)
    carry_out(
        "table",
        runs,
        measure,
        table_grids,
        describe=describe_point,
        out=out,
        cost=COST,
        jobs=jobs,
    )


@reproduce.command()
def protocols(
    net: Nets = None,
    data: Annotated[
        list[str] | None,
        typer.Option(callback=_choice(*_DATA), help="mnist or fashion-mnist.", show_default="both"),
    ] = None,
    activation: Annotated[
        list[str] | None,
        typer.Option(help="Activation; repeatable.", show_default="relu, tanh, sigmoid"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 1,
    epochs: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Length of training, 0 for random; repeatable.", show_default="0, 1, 5, 20"
        ),
    ] = None,
    images: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="First training images in the Hessian; repeatable.",
            show_default="1, 16, 64, 128, 1000, 60000",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_DTYPES), help="float32 or float64; repeatable.", show_default="both"
        ),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_SOLVERS),
            help="eigvalsh, for symmetric matrices, or eig, for any; repeatable.",
            show_default="eigvalsh; for the cnn up to 1,000 images both",
        ),
    ] = None,
    assembly: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_ASSEMBLIES),
            help="blocks, hvpspec's own way, or products, one for every row; repeatable.",
            show_default="blocks; for the cnn up to 128 images both",
        ),
    ] = None,
    jobs: Jobs = 1,
    out: Out = _RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Search for the way of counting that gives the published numbers; keep every score."""
    from hvpspec.experiments import measure_protocol, protocol_runs, score_grids
    from hvpspec.experiments.protocols import COST

    runs = protocol_runs(
        net or _NETS,
        data or _DATA,
        activation or ("relu", "tanh", "sigmoid"),
        seeds,
        epochs or (0, 1, 5, 20),
        images or (1, 16, 64, 128, 1000, 60_000),
        dtype or ("float32", "float64"),
        solver,
        assembly,
    )
    check_points(runs, max(run.images for run in runs), data_dir)
    measure = partial(measure_protocol, out=out, data_dir=data_dir)
    carry_out(
        "protocols",
        runs,
        measure,
        score_grids,
        describe=describe_point,
        out=out,
        cost=COST,
        jobs=jobs,
    )


@reproduce.command()
def curves(
    net: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_NETS), help="cnn, mlp2 or mlp3; repeatable.", show_default="mlp2"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_DATA, *_SAMPLES),
            help="mnist, fashion-mnist, mnist-sample or fashion-mnist-sample; repeatable.",
            show_default="mnist",
        ),
    ] = None,
    activation: Annotated[
        list[str] | None,
        typer.Option(help="Activation; repeatable.", show_default="relu, tanh"),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_OPTIMIZERS),
            help="sgd, adam or lbfgs; repeatable.",
            show_default="all three",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Length of training.")] = 20,
    every: Annotated[int, typer.Option(min=1, help="Epochs from one count to the next.")] = 2,
    images: Annotated[
        int, typer.Option(min=1, help="First training images in the Hessian.")
    ] = 10_000,
    jobs: Jobs = 1,
    out: Out = _RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Follow the index and the loss along training, by SGD, Adam and L-BFGS."""
    from hvpspec.experiments import curve_grids, curve_runs, draw_curves, measure_curve
    from hvpspec.experiments.curves import COST
    from hvpspec.experiments.points import images_of

    moments = sorted({*range(0, epochs, every), epochs})
    runs = curve_runs(
        net or ("mlp2",),
        {source: len(images_of(source, data_dir)) for source in data or ("mnist",)},
        activation or ("relu", "tanh"),
        [name for name in _OPTIMIZERS if name in (optimizer or _OPTIMIZERS)],
        seeds,
        moments,
        images,
    )
    check_points(runs, images, data_dir)
    carry_out(
        "curves",
        runs,
        partial(measure_curve, epochs=moments, out=out, data_dir=data_dir),
        curve_grids,
        describe=describe_point,
        out=out,
        draw=draw_curves,
        cost=COST,
        jobs=jobs,
    )


@reproduce.command()
def regularised(
    net: Nets = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_DATA, *_SAMPLES),
            help="mnist, fashion-mnist, mnist-sample or fashion-mnist-sample; repeatable.",
            show_default="mnist, fashion-mnist",
        ),
    ] = None,
    activation: Annotated[
        list[str] | None,
        typer.Option(help="Activation; repeatable.", show_default="relu, tanh"),
    ] = None,
    l2: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="λ to train with; repeatable.",
            show_default="0, 1e-5, 1e-4, 1e-3, 1e-2",
        ),
    ] = None,
    retrain: Annotated[
        bool, typer.Option(help="Also train with each λ; without, spectra of table suffice.")
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Length of training.")] = 20,
    images: Annotated[
        int, typer.Option(min=1, help="First training images in the Hessian.")
    ] = 10_000,
    jobs: Jobs = 1,
    out: Out = _RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Add λ‖θ‖² to the loss: index and nullity by λ, at fixed weights and trained with it."""
    from hvpspec.experiments import (
        STANDARD,
        draw_regularised,
        measure_regularised,
        regularised_grids,
        regularised_runs,
    )
    from hvpspec.experiments.regularised import COST, RETRAINED

    runs = regularised_runs(
        net or _NETS,
        data or _DATA,
        activation or ("relu", "tanh"),
        seeds,
        images,
        STANDARD.for_epochs(epochs),
        (l2 or RETRAINED) if retrain else (),
    )
    check_points(runs, images, data_dir)
    carry_out(
        "regularised",
        runs,
        partial(measure_regularised, out=out, data_dir=data_dir),
        regularised_grids,
        describe=describe_point,
        out=out,
        draw=draw_regularised,
        cost=COST,
        jobs=jobs,
    )


@reproduce.command()
def spectra(
    net: Nets = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            callback=_choice(*_DATA, *_SAMPLES),
            help="mnist, fashion-mnist, mnist-sample or fashion-mnist-sample; repeatable.",
            show_default="mnist, fashion-mnist",
        ),
    ] = None,
    activation: Annotated[
        list[str] | None,
        typer.Option(help="Activation; repeatable.", show_default="relu, tanh"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Length of training.")] = 20,
    images: Annotated[
        int, typer.Option(min=1, help="First training images in the matrices.")
    ] = 10_000,
    jobs: Jobs = 1,
    out: Out = _RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Draw the spectra of trained networks; measure bulk, gaps, layers, Gauss-Newton part."""
    from hvpspec.experiments import (
        STANDARD,
        draw_spectra,
        measure_spectra,
        spectra_grids,
        spectra_runs,
    )
    from hvpspec.experiments.spectra import COST

    protocol = STANDARD.for_epochs(epochs)
    names = net or _NETS, data or _DATA, activation or ("relu", "tanh")
    runs = spectra_runs(*names, images, protocol)
    check_points(runs, images, data_dir)
    carry_out(
        "spectra",
        runs,
        partial(measure_spectra, out=out, data_dir=data_dir),
        spectra_grids,
        describe=describe_point,
        out=out,
        draw=partial(draw_spectra, out=out),
        cost=COST,
        jobs=jobs,
    )


@reproduce.command()
def linear(out: Out = _RESULTS) -> None:
    """Check the counts on linear regression, and the paper's Example 1: seconds."""
    from hvpspec.experiments import LINEAR_RUNS, LinearRun, linear_grids, measure_linear

    def describe(run: LinearRun) -> str:
        """Name a regression."""
        return f"{run.data} {run.examples} x {run.features}, l2 {run.l2:g}"

    carry_out("linear", LINEAR_RUNS, measure_linear, linear_grids, describe=describe, out=out)
