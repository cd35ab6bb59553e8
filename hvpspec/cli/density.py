"""``hvpspec density``: the distribution of the eigenvalues."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hvpspec.cli.index import compute_index
from hvpspec.cli.options import (
    L2,
    ChunkSize,
    DataDir,
    DataName,
    JsonFile,
    Loss,
    ModelFile,
    NetArgs,
    NetName,
    Params,
    Subset,
)
from hvpspec.cli.problem import load_problem
from hvpspec.files import check_target
from hvpspec.report import density_to_dict, index_table, write_json


def density(
    model: ModelFile,
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")],
    exact: Annotated[
        bool, typer.Option("--exact", help="From all eigenvalues; the only way so far.")
    ] = False,
    symlog: Annotated[
        bool, typer.Option("--symlog", help="Logarithmic axis to both sides of the noise floor.")
    ] = False,
    bins: Annotated[int, typer.Option(min=1, help="Number of bins.")] = 100,
    data: DataName = None,
    data_dir: DataDir = None,
    subset: Subset = None,
    params: Params = None,
    l2: L2 = None,
    loss: Loss = None,
    chunk_size: ChunkSize = None,
    net: NetName = None,
    net_arg: NetArgs = None,
    json_file: JsonFile = None,
) -> None:
    """Draw the histogram of all eigenvalues of the Hessian, with logarithmic counts."""
    if not exact:
        raise typer.BadParameter("only the exact density exists so far; pass --exact")
    from hvpspec.plotting import (
        Scale,
        check_picture,
        plot_spectrum,
        save_figure,
        spectrum_histogram,
    )

    check_picture(out)
    if json_file:
        check_target(json_file)
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
    result, seconds = compute_index(problem, "exact")
    assert result.eigenvalues is not None  # the exact method has them
    values, floor = result.eigenvalues.numpy(), result.noise_floor
    Console().print(index_table(result, subject=problem.subject, seconds=seconds))
    scale: Scale = "symlog" if symlog else "linear"
    title = problem.subject.title
    figure = plot_spectrum(values, noise_floor=floor, scale=scale, bins=bins, title=title)
    save_figure(figure, out)
    typer.echo(f"wrote {out}")
    if json_file:
        histogram = spectrum_histogram(values, noise_floor=floor, symlog=symlog, bins=bins)
        write_json(json_file, density_to_dict(values, histogram, subject=problem.subject))
        typer.echo(f"wrote {json_file}")
