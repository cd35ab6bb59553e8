"""The commands: the options of each experiment, its sweep, and what is made of the lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from matplotlib.figure import Figure
from rich.console import Console

from examples.paper import curves as curves_
from examples.paper import linear as linear_
from examples.paper import protocols as protocols_
from examples.paper import regularised as regularised_
from examples.paper import solutions as solutions_
from examples.paper import spectra as spectra_
from examples.paper import table as table_
from examples.paper.ensemble import EnsembleSettings, trained_ensemble
from examples.paper.points import QUICK, STANDARD, Optimizer, Point, images_of
from examples.paper.progress import sweep_bar, training_bar
from examples.paper.results import Record, finished, read
from examples.paper.scoring import score_tables, with_table
from examples.paper.sweep import Measure, sweep
from examples.paper.tables import Table
from hvpspec import ComputationError, InputError, zoo
from hvpspec.plotting import save_figure

app = typer.Typer(
    help="Repeat the experiments of 'Connectedness of loss landscapes via the lens of Morse"
    " theory'. Each finished run is a line of JSON in --out; an interrupted sweep goes on from"
    " there. Options that take lists may be repeated.",
    no_args_is_help=True,
    add_completion=False,
)

NETS = ["cnn", "mlp2", "mlp3"]
DATA = ["mnist", "fashion-mnist"]
SAMPLES = ["mnist-sample", "fashion-mnist-sample"]
ACTIVATIONS = ["relu", "tanh"]
OPTIMIZERS: list[Optimizer] = ["sgd", "adam", "lbfgs"]
RESULTS = Path("results")


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


def option(help: str, *allowed: str, **more: Any) -> Any:
    """A repeatable option that takes some values alone."""
    return typer.Option(help=f"{help}: {', '.join(allowed)}.", callback=choice(*allowed), **more)


Nets = Annotated[list[str], option("Networks", *NETS)]
Sources = Annotated[list[str], option("Images", *DATA, *SAMPLES)]
Activations = Annotated[list[str], typer.Option(help="Activations of the networks.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each kind.")]
Epochs = Annotated[int, typer.Option(min=1, help="Length of training.")]
Images = Annotated[int, typer.Option(min=1, help="First training images in the Hessian.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs side by side, each a process.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with MNIST/raw or FashionMNIST/raw.")]

# Defaults that are lists, which the commands leave as they are.
_ONE_NET, _ONE_SOURCE = ["mlp2"], ["mnist"]
_SMOOTH, _EPOCHS = [*ACTIVATIONS, "sigmoid"], [0, 1, 5, 20]
_IMAGES, _DTYPES = [1, 16, 64, 128, 1000, 60_000], ["float32", "float64"]
_SAMPLE, _HEAD = ["first"], ["logits"]
_RETRAINED = list(regularised_.RETRAINED)
_OPTIMIZERS: list[str] = [*OPTIMIZERS]


@app.command()
def table(
    net: Nets = NETS,
    data: Annotated[
        list[str] | None,
        option("Images", *DATA, *SAMPLES, show_default="both; mnist-sample with --quick"),
    ] = None,
    activation: Activations = ACTIVATIONS,
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
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Count negative eigenvalues, trained and random, beside the published numbers."""
    runs = table_.table_runs(
        net,
        data or (SAMPLES[:1] if quick else DATA),
        activation,
        seeds or (1 if quick else 10),
        images or (50 if quick else 10_000),
        QUICK if quick else STANDARD,
    )
    _at_points(
        "table", runs, table_.measure_index, table_.table_tables, table_.COST, jobs, out, data_dir
    )


@app.command()
def protocols(
    net: Nets = NETS,
    data: Annotated[list[str], option("Images", *DATA)] = DATA,
    activation: Activations = _SMOOTH,
    seeds: Seeds = 1,
    epochs: Annotated[
        list[int], typer.Option(min=0, help="Lengths of training, 0 for random weights.")
    ] = _EPOCHS,
    images: Annotated[
        list[int], typer.Option(min=1, help="Numbers of training images in the Hessian.")
    ] = _IMAGES,
    dtype: Annotated[
        list[str], option("Of network, matrix and solver", "float32", "float64")
    ] = _DTYPES,
    solver: Annotated[
        list[str] | None,
        option(
            "For symmetric matrices; the same of rows that are not zero; for any matrix",
            *("eigvalsh", "eigvalsh-live", "eig"),
            show_default="eigvalsh; with eig for the cnn up to 1,000 images, -live for others",
        ),
    ] = None,
    assembly: Annotated[
        list[str] | None,
        option(
            "hvpspec's own way, or by a product for every row",
            *("blocks", "products"),
            show_default="blocks; for the cnn up to 128 images both",
        ),
    ] = None,
    sample: Annotated[
        list[str], option("The first images, or some drawn by the seed", "first", "random")
    ] = _SAMPLE,
    head: Annotated[
        list[str],
        option("What the networks return and the loss takes for logits", "logits", "softmax"),
    ] = _HEAD,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Search for the way of counting that gives the published numbers; keep every score.

    The runs of the table in the same folder are one more way.
    """
    runs = protocols_.protocol_runs(
        *(net, data, activation, seeds, epochs, images, dtype),
        *(solver or (), assembly or (), sample, head),
    )

    def tables(lines: pd.DataFrame) -> list[Table]:
        """The scores, those of the table among them."""
        return score_tables(with_table(lines, pd.DataFrame(read(out / "table.jsonl"))))

    measure, cost = protocols_.measure_protocol, protocols_.COST
    _at_points("protocols", runs, measure, tables, cost, jobs, out, data_dir)


@app.command()
def curves(
    net: Nets = _ONE_NET,
    data: Sources = _ONE_SOURCE,
    activation: Activations = ACTIVATIONS,
    optimizer: Annotated[list[str], option("Of the trainings", *OPTIMIZERS)] = _OPTIMIZERS,
    seeds: Seeds = 1,
    epochs: Epochs = 20,
    every: Annotated[int, typer.Option(min=1, help="Epochs from one count to the next.")] = 2,
    images: Images = 10_000,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Follow the index and the loss along training, by SGD, Adam and L-BFGS."""
    moments = sorted({*range(0, epochs, every), epochs})
    sizes = {source: len(images_of(source, data_dir)) for source in data}
    optimizers = [name for name in OPTIMIZERS if name in optimizer]
    runs = curves_.curve_runs(net, sizes, activation, optimizers, seeds, moments, images)
    measure = partial(curves_.measure_curve, epochs=moments)
    draw, cost = curves_.draw_curves, curves_.COST
    _at_points("curves", runs, measure, curves_.curve_tables, cost, jobs, out, data_dir, draw)


@app.command()
def regularised(
    net: Nets = NETS,
    data: Sources = DATA,
    activation: Activations = ACTIVATIONS,
    l2: Annotated[list[float], typer.Option(min=0, help="λ to train with.")] = _RETRAINED,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Fixed weights only: the spectra of table suffice.")
    ] = False,
    seeds: Seeds = 1,
    epochs: Epochs = 20,
    images: Images = 10_000,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Add λ‖θ‖² to the loss: index and nullity by λ, at fixed weights and trained with it."""
    protocol = STANDARD.for_epochs(epochs)
    runs = regularised_.regularised_runs(
        net, data, activation, seeds, images, protocol, [] if fixed else l2
    )
    measure, tables = regularised_.measure_regularised, regularised_.regularised_tables
    draw, cost = regularised_.draw_regularised, regularised_.COST
    _at_points("regularised", runs, measure, tables, cost, jobs, out, data_dir, draw)


@app.command()
def spectra(
    net: Nets = NETS,
    data: Sources = DATA,
    activation: Activations = ACTIVATIONS,
    epochs: Epochs = 20,
    images: Images = 10_000,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Draw the spectra of trained networks; measure bulk, gaps, layers, Gauss-Newton part."""
    protocol = STANDARD.for_epochs(epochs)
    runs = spectra_.spectra_runs(net, data, activation, images, protocol)
    measure, tables = spectra_.measure_spectra, spectra_.spectra_tables
    draw, cost = partial(spectra_.draw_spectra, out=out), spectra_.COST
    _at_points("spectra", runs, measure, tables, cost, jobs, out, data_dir, draw)


@app.command()
def solutions(
    data: Sources = _ONE_SOURCE,
    activation: Activations = ACTIVATIONS,
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
    ensembles = [
        EnsembleSettings(data=source, activation=kind, count=count, images=images, epochs=epochs)
        for source in data
        for kind in activation
    ]
    for settings in ensembles:
        zoo.build_network("cnn", {"activation": settings.activation})
        images_of(settings.data, data_dir).subset(images)
    for settings in ensembles:
        with training_bar(epochs) as progress:
            trained_ensemble(settings, out=out, data_dir=data_dir, progress=progress)

    def describe(run: solutions_.SolutionRun) -> str:
        """Name a network."""
        counted = ", with its index" if run.indexed else ""
        return f"cnn {run.activation} {run.data} seed {run.seed}{counted}"

    carry_out(
        "solutions",
        solutions_.solution_runs(ensembles, indexed),
        partial(solutions_.measure_solution, out=out, data_dir=data_dir),
        solutions_.solution_tables,
        describe=describe,
        out=out,
        draw=solutions_.draw_solutions,
        cost=solutions_.COST,
        jobs=jobs,
    )


@app.command()
def linear(out: Out = RESULTS) -> None:
    """Check the counts on linear regression, and the paper's Example 1: seconds."""

    def describe(run: linear_.LinearRun) -> str:
        """Name a regression."""
        return f"{run.data} {run.examples} x {run.features}, l2 {run.l2:g}"

    carry_out(
        "linear",
        linear_.LINEAR_RUNS,
        linear_.measure_linear,
        linear_.linear_tables,
        describe=describe,
        out=out,
    )


def _at_points(
    name: str,
    runs: Sequence[Any],
    measure: Callable[..., Record],
    tables: Callable[[pd.DataFrame], list[Table]],
    cost: Sequence[str],
    jobs: int,
    out: Path,
    data_dir: Path | None,
    draw: Callable[[pd.DataFrame], Mapping[str, Figure]] | None = None,
) -> None:
    """Carry out runs at points with images, when networks and data are found to be good.

    Raises:
        InputError: an activation is unknown, data are not found or too few, or the files cannot be
            used.
        ComputationError: some runs failed; the others are done and kept.
    """
    for net, activation in {(run.net, run.activation) for run in runs}:
        zoo.build_network(net, {"activation": activation})
    most = max(run.images for run in runs)
    for source in sorted({run.data for run in runs}):
        images_of(source, data_dir).subset(most)
        read_from = {file.resolve() for file in zoo.source_files(source, data_dir)}
        for path in (out / f"{name}.jsonl", out / f"{name}.md"):
            if path.resolve() in read_from:
                raise InputError(
                    f"{path} (--out) is what --data reads and would be lost; choose another folder"
                )
    carry_out(
        name,
        runs,
        partial(measure, out=out, data_dir=data_dir),
        tables,
        describe=describe_point,
        out=out,
        draw=draw,
        cost=cost,
        jobs=jobs,
    )


def describe_point(run: Any) -> str:
    """Name a run at a point, by what distinguishes it.

    Args:
        run: a point with the settings of its Hessian.
    """
    known = {field.name for field in fields(Point)}
    others = [f"{f.name} {getattr(run, f.name)}" for f in fields(run) if f.name not in known]
    epochs = f"{run.epochs} epochs" if run.epochs > 1 else ("1 epoch" if run.epochs else "random")
    point = f"{run.net} {run.activation} {run.data} {epochs} seed {run.seed}"
    return ", ".join([point, *others])


def carry_out(
    name: str,
    runs: Sequence[Any],
    measure: Measure[Any],
    tables: Callable[[pd.DataFrame], list[Table]],
    *,
    describe: Callable[[Any], str],
    out: Path,
    draw: Callable[[pd.DataFrame], Mapping[str, Figure]] | None = None,
    cost: Sequence[str] = (),
    jobs: int = 1,
) -> None:
    """Carry out the runs that are left, and make the tables anew from all there are.

    The first table is printed; all are written as Markdown, and figures as PNG, after an interrupt
    from the keyboard, too.

    Args:
        name: of the experiment and its files.
        runs: what is to be done, all of one kind.
        measure: carries one out.
        tables: makes tables of the lines of all runs.
        describe: names a run.
        out: folder of the results.
        draw: makes figures, by the names of their files without ending, of the same lines.
        cost: fields that decide how long a run takes.
        jobs: processes.

    Raises:
        InputError: the files cannot be used.
        ComputationError: some runs failed; the others are done and kept.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {out}: {error.strerror}; choose another with --out"
        ) from error
    path = out / f"{name}.jsonl"

    def tell() -> None:
        """Make tables and figures of all lines."""
        lines = pd.DataFrame(list(finished(path, read(path), type(runs[0])).values()))
        if lines.empty:
            return
        found = tables(lines)
        console, first = Console(), found[0].rich()
        if not console.is_terminal:  # a file has room for the widest row
            console.width = max(
                console.width,
                console.measure(first, options=console.options.update_width(1000)).maximum,
            )
        console.print(first)
        (out / f"{name}.md").write_text(page(name, found), encoding="utf-8")
        typer.echo(f"wrote {path}: a line of JSON for each run")
        typer.echo(f"wrote {out / name}.md: all tables, made from these lines")
        for stem, figure in (draw(lines) if draw else {}).items():
            save_figure(figure, out / f"{stem}.png")
            typer.echo(f"wrote {out / stem}.png")

    try:
        with sweep_bar(describe) as watch:
            failures = sweep(runs, measure, path, cost=cost, jobs=jobs, watch=watch)
    except KeyboardInterrupt:
        typer.echo(f"what is done is kept in {path}; the same command goes on from there", err=True)
        tell()
        raise
    tell()
    if failures:
        run, cause = failures[0]
        raise ComputationError(
            f"{len(failures)} of {len(runs)} runs failed and have no line; the first,"
            f" {describe(run)}:\n{type(cause).__name__}: {cause}"
        ) from cause


def page(name: str, tables: Sequence[Table]) -> str:
    """All tables of an experiment as a page of Markdown."""
    made = f"Made by `python -m examples.paper {name}` from `{name}.jsonl`."
    head = f"# {name.capitalize()}\n\n{made}\n"
    return "\n".join([head, *(table.markdown() for table in tables)])
