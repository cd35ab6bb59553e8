"""What there is to see of landscapes: along training, by λ, spectra and solutions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from examples.paper.options import (
    DATA,
    NETS,
    OPTIMIZERS,
    RESULTS,
    Activations,
    DataDir,
    Epochs,
    Jobs,
    MnistSources,
    Nets,
    Out,
    Sources,
    choice,
)
from examples.paper.progress import training_bar
from examples.paper.running import carry_out, carry_out_at_points
from hvpspec.files import make_folder

if TYPE_CHECKING:
    from examples.paper.solutions import SolutionRun


def curves(
    net: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*NETS), help="cnn, mlp2 or mlp3; repeatable.", show_default="mlp2"
        ),
    ] = None,
    data: MnistSources = None,
    activation: Activations = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*OPTIMIZERS),
            help="sgd, adam or lbfgs; repeatable.",
            show_default="all three",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 1,
    epochs: Epochs = 20,
    every: Annotated[int, typer.Option(min=1, help="Epochs from one count to the next.")] = 2,
    images: Annotated[
        int, typer.Option(min=1, help="First training images in the Hessian.")
    ] = 10_000,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Follow the index and the loss along training, by SGD, Adam and L-BFGS."""
    from examples.paper.curves import COST, curve_grids, curve_runs, draw_curves, measure_curve
    from examples.paper.points import images_of

    moments = sorted({*range(0, epochs, every), epochs})
    runs = curve_runs(
        net or ("mlp2",),
        {source: len(images_of(source, data_dir)) for source in data or ("mnist",)},
        activation or ("relu", "tanh"),
        [name for name in OPTIMIZERS if name in (optimizer or OPTIMIZERS)],
        seeds,
        moments,
        images,
    )
    carry_out_at_points(
        "curves",
        runs,
        partial(measure_curve, epochs=moments),
        curve_grids,
        out=out,
        data_dir=data_dir,
        draw=draw_curves,
        cost=COST,
        jobs=jobs,
    )


def regularised(
    net: Nets = None,
    data: Sources = None,
    activation: Activations = None,
    l2: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="λ to train with; repeatable.",
            show_default="0, 1e-5, 1e-4, 1e-3, 1e-2",
        ),
    ] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Fixed weights only: the spectra of table suffice.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 1,
    epochs: Epochs = 20,
    images: Annotated[
        int, typer.Option(min=1, help="First training images in the Hessian.")
    ] = 10_000,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Add λ‖θ‖² to the loss: index and nullity by λ, at fixed weights and trained with it."""
    from examples.paper.points import STANDARD
    from examples.paper.regularised import (
        COST,
        RETRAINED,
        draw_regularised,
        measure_regularised,
        regularised_grids,
        regularised_runs,
    )

    runs = regularised_runs(
        net or NETS,
        data or DATA,
        activation or ("relu", "tanh"),
        seeds,
        images,
        STANDARD.for_epochs(epochs),
        () if fixed else l2 or RETRAINED,
    )
    carry_out_at_points(
        "regularised",
        runs,
        measure_regularised,
        regularised_grids,
        out=out,
        data_dir=data_dir,
        draw=draw_regularised,
        cost=COST,
        jobs=jobs,
    )


def spectra(
    net: Nets = None,
    data: Sources = None,
    activation: Activations = None,
    epochs: Epochs = 20,
    images: Annotated[
        int, typer.Option(min=1, help="First training images in the matrices.")
    ] = 10_000,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Draw the spectra of trained networks; measure bulk, gaps, layers, Gauss-Newton part."""
    from examples.paper.points import STANDARD
    from examples.paper.spectra import (
        COST,
        draw_spectra,
        measure_spectra,
        spectra_grids,
        spectra_runs,
    )

    protocol = STANDARD.for_epochs(epochs)
    names = net or NETS, data or DATA, activation or ("relu", "tanh")
    runs = spectra_runs(*names, images, protocol)
    carry_out_at_points(
        "spectra",
        runs,
        measure_spectra,
        spectra_grids,
        out=out,
        data_dir=data_dir,
        draw=partial(draw_spectra, out=out),
        cost=COST,
        jobs=jobs,
    )


def solutions(
    data: MnistSources = None,
    activation: Activations = None,
    count: Annotated[int, typer.Option(min=2, help="Initialisations.")] = 500,
    indexed: Annotated[int, typer.Option(min=0, help="Of how many the index is computed.")] = 20,
    images: Annotated[
        int, typer.Option(min=1, help="First training images, for training and Hessian.")
    ] = 2000,
    epochs: Epochs = 50,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Train the CNN from many initial weights at once, and draw where it ends."""
    from examples.paper.ensemble import EnsembleSettings, trained_ensemble
    from examples.paper.points import images_of
    from examples.paper.solutions import (
        COST,
        draw_solutions,
        measure_solution,
        solution_grids,
        solution_runs,
    )
    from hvpspec.zoo import build_network

    ensembles = [
        EnsembleSettings(data=source, activation=kind, count=count, images=images, epochs=epochs)
        for source in data or ("mnist",)
        for kind in activation or ("relu", "tanh")
    ]
    for settings in ensembles:
        build_network("cnn", {"activation": settings.activation})
        images_of(settings.data, data_dir).subset(images)
    make_folder(out)
    for settings in ensembles:
        with training_bar(epochs) as progress:
            trained_ensemble(settings, out=out, data_dir=data_dir, progress=progress)

    def describe(run: SolutionRun) -> str:
        """Name a network."""
        counted = ", with its index" if run.indexed else ""
        return f"cnn {run.activation} {run.data} seed {run.seed}{counted}"

    carry_out(
        "solutions",
        solution_runs(ensembles, indexed),
        partial(measure_solution, out=out, data_dir=data_dir),
        solution_grids,
        describe=describe,
        out=out,
        draw=draw_solutions,
        cost=COST,
        jobs=jobs,
    )
