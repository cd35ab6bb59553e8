"""``hvpspec density``: the distribution of the eigenvalues."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hvpspec.cli.apart import Names
from hvpspec.cli.index import compute_index
from hvpspec.cli.options import (
    JsonFile,
    Probes,
    ProbeSeed,
    Sigma,
    Steps,
    refuse_together,
)
from hvpspec.cli.problem import LoadProblem, Problem, on_problem
from hvpspec.cli.processes import Parallel, divided
from hvpspec.cli.progress import product_bar
from hvpspec.files import check_target
from hvpspec.results import Row, closing_rows, text_table, write_json

if TYPE_CHECKING:
    from hvpspec import SpectralMeasure
    from hvpspec.curvature.operator import CurvatureOperator

_BINS = 100
_WHOLE = "whole network"
_HESSIAN, _GAUSS_NEWTON = "Hessian", "Gauss-Newton"


@on_problem
def density(
    load: LoadProblem,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write: .png, .pdf or .svg."), Names.WRITTEN
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="A histogram of all eigenvalues instead.")
    ] = False,
    symlog: Annotated[
        bool, typer.Option("--symlog", help="Logarithmic axis to both sides of 0.")
    ] = False,
    probes: Probes = None,
    steps: Steps = None,
    seed: ProbeSeed = None,
    sigma: Sigma = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also of each layer's own block, beside the whole.")
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --per-layer: of modules so deep, from 1 for the outermost.",
            show_default="layers themselves",
        ),
    ] = None,
    gauss_newton: Annotated[
        bool, typer.Option("--gauss-newton", help="Also of the Gauss-Newton matrix, beside it.")
    ] = False,
    bins: Annotated[
        int | None,
        typer.Option(min=1, help="Number of bins, with --exact.", show_default=str(_BINS)),
    ] = None,
    json_file: JsonFile = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Keep the measure of the whole: .npz."),
        Names.WRITTEN,
    ] = None,
    no_reorthogonalize: Annotated[
        bool,
        typer.Option(
            "--no-reorthogonalize", help="Keep no bases, which take most memory; no outliers."
        ),
    ] = False,
    basis_folder: Annotated[
        Path | None,
        typer.Option("--basis-folder", metavar="DIR", help="Keep bases on a disk, not in memory."),
    ] = None,
    parallel: Annotated[
        Parallel | None,
        typer.Option(help="What processes of torchrun share out.", show_default="data"),
    ] = None,
) -> None:
    """Draw how densely the eigenvalues of the Hessian lie, from products alone."""
    if exact:
        refuse_together(
            "has no effect on --exact; leave it out",
            probes=probes,
            steps=steps,
            seed=seed,
            sigma=sigma,
            per_layer=per_layer,
            depth=depth,
            gauss_newton=gauss_newton,
            save=save,
            no_reorthogonalize=no_reorthogonalize,
            basis_folder=basis_folder,
            parallel=parallel,
        )
    else:
        refuse_together("belongs to --exact", bins=bins)
        if not per_layer:
            refuse_together("belongs to --per-layer", depth=depth)
    if out:
        from hvpspec.plotting import check_picture

        check_picture(out)
    if json_file:
        check_target(json_file)
    if save:
        check_target(save, (".npz",))
    if exact:
        _draw_exact(load(), out, json_file, symlog=symlog, bins=bins or _BINS)
        return
    of_data, of_probes = divided(parallel)
    problem = load(group=of_data)
    start = time.perf_counter()
    operators: dict[str, CurvatureOperator] = {_HESSIAN: problem.hessian}
    if gauss_newton:
        operators[_GAUSS_NEWTON] = problem.gauss_newton()
    how: dict[str, Any] = {
        "num_probes": probes or 8,
        "num_steps": steps or 100,
        "reorthogonalize": not no_reorthogonalize,
        "basis_folder": basis_folder,
        "group": of_probes,
    }
    found = {
        matrix: _measure(
            problem,
            _parts(operator, depth) if per_layer else {_WHOLE: operator},
            matrix,
            how,
            seed or 0,
        )
        for matrix, operator in operators.items()
    }
    seconds = time.perf_counter() - start
    subject = problem.subject
    measures = {
        _name(part, matrix): measure
        for matrix, parts in found.items()
        for part, measure in parts.items()
    }
    rows: list[Row] = []
    for name, measure in measures.items():
        if len(measures) > 1:
            rows.append((name, f"{measure.dim:,}", "parameters"))
        rows += measure.rows()
    typer.echo(text_table(subject.title, [*rows, *closing_rows(seconds, subject.notes)]))
    whole = found[_HESSIAN][_WHOLE]
    if json_file:
        _, layers = _divided(found[_HESSIAN])
        beside = None
        if gauss_newton:
            other, blocks = _divided(found[_GAUSS_NEWTON])
            beside = other.content(blocks)
        write_json(
            json_file,
            whole.to_dict(subject=subject, seconds=seconds, layers=layers, gauss_newton=beside),
        )
        typer.echo(f"wrote {json_file}")
    if save:
        whole.save(save)
        typer.echo(f"wrote {save}")
    # Last: a width that cannot be drawn must not cost the products.
    if out:
        from hvpspec.plotting import plot_density, save_figure

        drawn = measures if len(measures) > 1 else whole
        save_figure(plot_density(drawn, sigma=sigma, symlog=symlog, title=subject.title), out)
        typer.echo(f"wrote {out}")


def _measure(
    problem: Problem,
    parts: Mapping[str, CurvatureOperator],
    matrix: str,
    how: Mapping[str, Any],
    seed: int,
) -> dict[str, SpectralMeasure]:
    """Run Lanczos on a matrix, or on it and blocks of it."""
    import torch

    import hvpspec

    measures = {}
    for part, block in parts.items():
        generator, name = torch.Generator().manual_seed(seed), _name(part, matrix)
        with product_bar(name) as progress, problem.lasting(block, name) as lasting:
            measures[part] = hvpspec.spectral_measure(
                lasting, generator=generator, progress=progress, **how
            )
    return measures


def _divided(
    measures: Mapping[str, SpectralMeasure],
) -> tuple[SpectralMeasure, dict[str, SpectralMeasure]]:
    """The measure of a whole matrix, and those of its blocks."""
    return measures[_WHOLE], {part: m for part, m in measures.items() if part != _WHOLE}


def _name(part: str, matrix: str) -> str:
    """What a part of the Hessian, or of another matrix, is called beside others."""
    return part if matrix == _HESSIAN else f"{part}, {matrix}"


def _parts(operator: CurvatureOperator, depth: int | None) -> dict[str, CurvatureOperator]:
    """A matrix and its blocks: of modules that own parameters, or contain those, so deep."""
    modules: dict[str, list[str]] = {}
    for name in operator.space.names:
        owners = name.split(".")[:-1][:depth]
        modules.setdefault(".".join(owners) or name, []).append(name)
    return {_WHOLE: operator, **{m: operator.block(names) for m, names in modules.items()}}


def _draw_exact(
    problem: Problem, out: Path | None, json_file: Path | None, *, symlog: bool, bins: int
) -> None:
    """Count all eigenvalues in bins."""
    from hvpspec.plotting import Scale, plot_spectrum, save_figure, spectrum_histogram

    result, seconds = compute_index(problem, "exact")
    assert result.eigenvalues is not None  # the exact method has them
    values, floor = result.eigenvalues.numpy(), result.noise_floor
    typer.echo(result.summary(subject=problem.subject, seconds=seconds))
    if json_file:
        histogram = spectrum_histogram(values, noise_floor=floor, symlog=symlog, bins=bins)
        content = {**histogram.to_dict(subject=problem.subject), "eigenvalues": values.tolist()}
        write_json(json_file, content)
        typer.echo(f"wrote {json_file}")
    if out:
        scale: Scale = "symlog" if symlog else "linear"
        title = problem.subject.title
        figure = plot_spectrum(values, noise_floor=floor, scale=scale, bins=bins, title=title)
        save_figure(figure, out)
        typer.echo(f"wrote {out}")
