"""``hvpspec reproduce``: the paper's experiments, as sweeps that go on where they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hvpspec.cli.options import DataDir
from hvpspec.cli.progress import sweep_bar
from hvpspec.errors import ComputationError
from hvpspec.files import check_target, make_folder, write_atomically

if TYPE_CHECKING:
    from hvpspec.experiments import Point
    from hvpspec.experiments.results import Record
    from hvpspec.experiments.sweep import Measure
    from hvpspec.report import Grid

_NETS = ("cnn", "mlp2", "mlp3")
_DATA = ("mnist", "fashion-mnist")
_SAMPLES = ("mnist-sample", "fashion-mnist-sample")
_DTYPES = ("float32", "float64")
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
        show_default="mnist, fashion-mnist",
    ),
]

reproduce = typer.Typer(
    help="Reproduce the experiments of 'Connectedness of loss landscapes via the lens of Morse"
    " theory'. Each finished run is a line of JSON; an interrupted sweep goes on where it was.",
    no_args_is_help=True,
)

_RESULTS = Path("results")
# Characters, for a table that goes to a file and not to a terminal.
_WIDEST = 1000


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
        typer.Option("--quick", help="Bundled samples, few images, short training: minutes."),
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
        data or (_SAMPLES if quick else _DATA),
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
            show_default="both up to 128 images, then blocks",
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
def linear(out: Out = _RESULTS) -> None:
    """Check the counts on linear regression, and the paper's Example 1: seconds."""
    from hvpspec.experiments import LINEAR_RUNS, LinearRun, linear_grids, measure_linear

    def describe(run: LinearRun) -> str:
        return f"{run.data} {run.examples} x {run.features}, l2 {run.l2:g}"

    carry_out("linear", LINEAR_RUNS, measure_linear, linear_grids, describe=describe, out=out)


def check_points(runs: Sequence[Point], images: int, data_dir: Path | None) -> None:
    """Refuse, before the work starts, networks that cannot be built and data that do not suffice.

    Args:
        runs: what is to be done.
        images: the most that any of them needs.
        data_dir: folder of the full data sets.

    Raises:
        InputError: an activation is unknown, or data are not found or too few.
    """
    from hvpspec.experiments.points import images_of
    from hvpspec.zoo import build_network

    for net, activation in {(run.net, run.activation) for run in runs}:
        build_network(net, {"activation": activation})
    for source in {run.data for run in runs}:
        images_of(source, data_dir).subset(images)


def carry_out(
    name: str,
    runs: Sequence[Any],
    measure: Measure[Any],
    show: Callable[[list[Record]], list[Grid]],
    *,
    describe: Callable[[Any], str],
    out: Path,
    cost: Sequence[str] = (),
    jobs: int = 1,
) -> None:
    """Carry out the runs that are left, and make the tables anew from all there are.

    The first table is printed; all are written as Markdown.

    Args:
        name: of the experiment and its files.
        runs: what is to be done, all of one kind.
        measure: carries one out.
        show: makes tables of the lines of all runs.
        describe: names a run.
        out: folder of the results.
        cost: fields that decide how long a run takes.
        jobs: processes.

    Raises:
        InputError: the files cannot be used.
        ComputationError: some runs failed; the others are done and kept.
    """
    from hvpspec.experiments import finished, read, sweep
    from hvpspec.report import grid_markdown, grid_table

    make_folder(out)
    path, page = out / f"{name}.jsonl", out / f"{name}.md"
    check_target(path)
    check_target(page)
    try:
        with sweep_bar(describe) as watch:
            failures = sweep(runs, measure, path, cost=cost, jobs=jobs, watch=watch)
    except KeyboardInterrupt:
        typer.echo(f"what is done is kept in {path}; the same command goes on from there", err=True)
        raise
    records = finished(path, read(path), type(runs[0])).values()
    if records:
        grids = show(list(records))
        console, table = Console(), grid_table(grids[0])
        if not console.is_terminal:
            wide = console.options.update_width(_WIDEST)
            console.width = max(console.width, console.measure(table, options=wide).maximum)
        console.print(table)
        head = f"# {name.capitalize()}\n\nMade by `hvpspec reproduce {name}` from `{path.name}`.\n"
        write_atomically(page, "\n".join([head, *map(grid_markdown, grids)]).encode())
        typer.echo(f"wrote {path}: a line of JSON for each run")
        typer.echo(f"wrote {page}: all tables, made from these lines")
    if failures:
        first = failures[0]
        raise ComputationError(
            f"{len(failures)} of {len(runs)} runs failed and have no line; the first,"
            f" {describe(first.run)}:\n{type(first.error).__name__}: {first.error}"
        ) from first.error


def describe_point(run: Any) -> str:
    """Name a run at a point, by what distinguishes it.

    Args:
        run: a point with the settings of its Hessian.
    """
    from dataclasses import fields

    from hvpspec.experiments import Point

    known = {field.name for field in fields(Point)}
    others = [f"{f.name} {getattr(run, f.name)}" for f in fields(run) if f.name not in known]
    epochs = f"{run.epochs} epochs" if run.epochs > 1 else ("1 epoch" if run.epochs else "random")
    point = f"{run.net} {run.activation} {run.data} {epochs} seed {run.seed}"
    return ", ".join([point, *others])
