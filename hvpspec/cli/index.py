"""``hvpspec index``: how many directions of the loss go down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hvpspec.cli.options import (
    L2,
    ChunkSize,
    DataDir,
    DataName,
    JsonFile,
    Loss,
    MethodName,
    ModelFile,
    NetArgs,
    NetName,
    Params,
    Subset,
)
from hvpspec.cli.problem import Problem, load_problem
from hvpspec.cli.progress import hessian_bar
from hvpspec.files import check_target
from hvpspec.report import index_table, index_to_dict, write_json

if TYPE_CHECKING:
    from hvpspec import IndexResult


def index(
    model: ModelFile,
    exact: Annotated[bool, typer.Option("--exact", help="Short for --method exact.")] = False,
    method: Annotated[
        MethodName | None,
        typer.Option(
            help="exact: all eigenvalues; ldl: counts only, faster for thousands of parameters;"
            " auto: by size.",
            show_default="auto",
        ),
    ] = None,
    data: DataName = None,
    data_dir: DataDir = None,
    subset: Subset = None,
    tau: Annotated[
        float | None,
        typer.Option(help="Count eigenvalues below -TAU.", show_default="the noise floor"),
    ] = None,
    params: Params = None,
    l2: L2 = None,
    loss: Loss = None,
    chunk_size: ChunkSize = None,
    net: NetName = None,
    net_arg: NetArgs = None,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture of the index as a function of tau: .png, .pdf or .svg."),
    ] = None,
) -> None:
    """Count the directions in which the loss goes down, resolved from round-off."""
    how = _settle_method(exact, method, picture=out is not None)
    if json_file:
        check_target(json_file)
    if out:
        from hvpspec.plotting import check_picture

        check_picture(out)
    problem = load_problem(
        model,
        net=net,
        net_arg=net_arg,
        data=data,
        data_dir=data_dir,
        subset=subset,
        loss=loss,
        l2=l2,
        params=params,
        chunk_size=chunk_size,
    )
    result, seconds = compute_index(problem, how, tau)
    Console().print(index_table(result, subject=problem.subject, seconds=seconds))
    if json_file:
        write_json(json_file, index_to_dict(result, subject=problem.subject, seconds=seconds))
        typer.echo(f"wrote {json_file}")
    if out:
        from hvpspec.plotting import plot_index_curve, save_figure

        save_figure(plot_index_curve(result, title=problem.subject.title), out)
        typer.echo(f"wrote {out}")


def compute_index(
    problem: Problem, method: MethodName, tau: float | None = None
) -> tuple[IndexResult, float]:
    """Compute an index with a progress bar, and time it.

    Args:
        problem: what to count on.
        method: how.
        tau: the resolution; None for the noise floor.

    Returns:
        The index, and the seconds it took.

    Raises:
        HvpspecError: ``tau`` is not allowed, the matrix does not fit, or a number is not finite.
    """
    import hvpspec

    start = time.perf_counter()
    with hessian_bar() as progress:
        result = hvpspec.index(problem.hessian, tau, method=method, progress=progress)
    return result, time.perf_counter() - start


def _settle_method(exact: bool, method: MethodName | None, *, picture: bool) -> MethodName:
    """Read the options that choose a method; a picture needs the eigenvalues."""
    if exact and method not in (None, "exact"):
        raise typer.BadParameter(f"--exact means --method exact, but --method {method} is given")
    if picture and method == "ldl":
        raise typer.BadParameter("--out needs the eigenvalues; use --method exact with it")
    return "exact" if exact or picture else method or "auto"
