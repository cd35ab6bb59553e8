"""``python -m examples.paper``: the paper's experiments, as sweeps that go on where they were."""

from __future__ import annotations

from typing import Annotated

import typer

from examples.paper.landscape_commands import curves, regularised, solutions, spectra
from examples.paper.options import (
    DATA,
    NETS,
    RESULTS,
    SAMPLES,
    Activations,
    DataDir,
    Jobs,
    Nets,
    Out,
    Sources,
    choice,
)
from examples.paper.running import carry_out, carry_out_at_points

_DTYPES = ("float32", "float64")
_SAMPLES = ("first", "random")
_HEADS = ("logits", "softmax")
_SOLVERS = ("eigvalsh", "eigvalsh-live", "eig")
_ASSEMBLIES = ("blocks", "products")

app = typer.Typer(
    help="Reproduce the experiments of 'Connectedness of loss landscapes via the lens of Morse"
    " theory'. Each finished run is a line of JSON; an interrupted sweep goes on where it was.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def table(
    net: Nets = None,
    data: Sources = None,
    activation: Activations = None,
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
    from examples.paper.points import QUICK, STANDARD
    from examples.paper.summary import table_grids
    from examples.paper.table import COST, measure_index, table_runs

    runs = table_runs(
        net or NETS,
        data or (SAMPLES[:1] if quick else DATA),
        activation or ("relu", "tanh"),
        seeds or (1 if quick else 10),
        images or (50 if quick else 10_000),
        QUICK if quick else STANDARD,
    )
    carry_out_at_points(
        "table",
        runs,
        measure_index,
        table_grids,
        out=out,
        data_dir=data_dir,
        cost=COST,
        jobs=jobs,
    )


@app.command()
def protocols(
    net: Nets = None,
    data: Annotated[
        list[str] | None,
        typer.Option(callback=choice(*DATA), help="mnist or fashion-mnist.", show_default="both"),
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
            help="Training images in the Hessian; repeatable.",
            show_default="1, 16, 64, 128, 1000, 60000",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*_DTYPES), help="float32 or float64; repeatable.", show_default="both"
        ),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*_SOLVERS),
            help="eigvalsh, for symmetric matrices; eigvalsh-live, of rows that are not zero; or"
            " eig, for any matrix; repeatable.",
            show_default="eigvalsh; with eig for the cnn up to 1,000 images, -live for others",
        ),
    ] = None,
    assembly: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*_ASSEMBLIES),
            help="blocks, hvpspec's own way, or products, one for every row; repeatable.",
            show_default="blocks; for the cnn up to 128 images both",
        ),
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*_SAMPLES),
            help="Which images: the first, or random, drawn by the seed; repeatable.",
            show_default="first",
        ),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            callback=choice(*_HEADS),
            help="What the networks return and the cross-entropy takes for logits: logits, or the"
            " softmax of them; repeatable.",
            show_default="logits",
        ),
    ] = None,
    jobs: Jobs = 1,
    out: Out = RESULTS,
    data_dir: DataDir = None,
) -> None:
    """Search for the way of counting that gives the published numbers; keep every score.

    The runs of the table in the same folder are one more way.
    """
    from examples.paper.protocols import COST, measure_protocol, protocol_runs
    from examples.paper.results import read
    from examples.paper.scoring import score_grids, with_table

    runs = protocol_runs(
        net or NETS,
        data or DATA,
        activation or ("relu", "tanh", "sigmoid"),
        seeds,
        epochs or (0, 1, 5, 20),
        images or (1, 16, 64, 128, 1000, 60_000),
        dtype or ("float32", "float64"),
        solver,
        assembly,
        sample or ("first",),
        head or ("logits",),
    )
    carry_out_at_points(
        "protocols",
        runs,
        measure_protocol,
        lambda records: score_grids(with_table(records, read(out / "table.jsonl"))),
        out=out,
        data_dir=data_dir,
        cost=COST,
        jobs=jobs,
    )


for command in (curves, regularised, spectra, solutions):
    app.command()(command)


@app.command()
def linear(out: Out = RESULTS) -> None:
    """Check the counts on linear regression, and the paper's Example 1: seconds."""
    from examples.paper.linear import LINEAR_RUNS, LinearRun, linear_grids, measure_linear

    def describe(run: LinearRun) -> str:
        """Name a regression."""
        return f"{run.data} {run.examples} x {run.features}, l2 {run.l2:g}"

    carry_out("linear", LINEAR_RUNS, measure_linear, linear_grids, describe=describe, out=out)
