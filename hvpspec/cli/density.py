"""``hvpspec density``: the distribution of the eigenvalues."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hvpspec.cli.index import compute_index
from hvpspec.cli.options import (
    PICTURE,
    File,
    JsonFile,
    ProbeSeed,
    of_method,
    of_output,
    of_products,
    positive,
    refuse_together,
)
from hvpspec.cli.problem import LoadProblem, Problem, draw, on_problem, show
from hvpspec.cli.processes import Parallel, divided
from hvpspec.progress import bar
from hvpspec.results import Row, closing_rows, text_table

if TYPE_CHECKING:
    from hvpspec import SpectralMeasure
    from hvpspec.curvature.operator import CurvatureOperator
    from hvpspec.plotting import Scale

_WHOLE = "whole network"
#: Suffix of the names of Gauss-Newton matrices.
_BESIDE = ", Gauss-Newton"


@on_problem
def density(
    load: LoadProblem,
    probes: Annotated[
        int | None, of_method("--probes", "Random vectors to average over.", "8", min=1)
    ] = None,
    steps: Annotated[
        int | None, of_method("--steps", "Lanczos steps from each of them.", "100", min=1)
    ] = None,
    seed: ProbeSeed = None,
    per_layer: Annotated[
        bool, of_method("--per-layer", "Also show the diagonal block of each layer.")
    ] = False,
    depth: Annotated[
        int | None,
        of_method(
            "--depth",
            "With --per-layer: blocks of modules at this depth, 1 for the outermost.",
            "the layers themselves",
            min=1,
        ),
    ] = None,
    gauss_newton: Annotated[
        bool, of_method("--gauss-newton", "Also show the Gauss-Newton matrix.")
    ] = False,
    exact: Annotated[
        bool, of_method("--exact", "Compute all eigenvalues and draw their histogram instead.")
    ] = False,
    out: Annotated[
        Path | None,
        of_output("--out", "Picture to draw: .png, .pdf or .svg.", metavar="FILE"),
        PICTURE,
    ] = None,
    symlog: Annotated[
        bool, of_output("--symlog", "Use a logarithmic axis for eigenvalues of either sign.")
    ] = False,
    sigma: Annotated[
        float | None,
        of_output(
            "--sigma",
            "Width of the kernels; with --symlog, in the logarithm of the eigenvalue.",
            "a 200th of the range; 0.2",
            callback=positive,
        ),
    ] = None,
    bins: Annotated[
        int | None, of_output("--bins", "With --exact: number of bins.", "100", min=1)
    ] = None,
    json_file: JsonFile = None,
    save: Annotated[
        Path | None,
        of_output(
            "--save",
            "Save the measure of the whole network for hvpspec.SpectralMeasure.load.",
            metavar="FILE.npz",
        ),
        File("written", (".npz",)),
    ] = None,
    no_reorthogonalize: Annotated[
        bool,
        of_products(
            "--no-reorthogonalize",
            "Keep no Lanczos bases, which take most of the memory; outliers can then not be told"
            " from their copies.",
        ),
    ] = False,
    basis_folder: Annotated[
        Path | None,
        of_products("--basis-folder", "Keep bases in a file here, not in memory.", metavar="DIR"),
    ] = None,
    parallel: Annotated[
        Parallel | None,
        of_products("--parallel", "What processes divide among them.", "data"),
    ] = None,
) -> None:
    """Draw the density of the Hessian's eigenvalues, from products alone."""
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
        _draw_exact(load(), out, json_file, symlog=symlog, bins=bins or 100)
        return
    refuse_together("belongs to --exact", bins=bins)
    if not per_layer:
        refuse_together("belongs to --per-layer", depth=depth)
    of_data, of_probes = divided(parallel)
    problem = load(group=of_data)
    start = time.perf_counter()
    options: dict[str, Any] = {
        "num_probes": probes or 8,
        "num_steps": steps or 100,
        "reorthogonalize": not no_reorthogonalize,
        "basis_folder": basis_folder,
        "group": of_probes,
    }

    def measured(operator: CurvatureOperator, suffix: str) -> dict[str, SpectralMeasure]:
        """The measures of a matrix and, with --per-layer, of its blocks."""
        parts = {_WHOLE: operator, **(_blocks(operator, depth) if per_layer else {})}
        return {
            part: _measure(problem, block, f"{part}{suffix}", seed or 0, options)
            for part, block in parts.items()
        }

    layers = measured(problem.hessian, "")
    beside = measured(problem.gauss_newton(), _BESIDE) if gauss_newton else {}
    seconds, subject = time.perf_counter() - start, problem.subject
    measures = {**layers, **{f"{part}{_BESIDE}": measure for part, measure in beside.items()}}
    rows: list[Row] = []
    for name, measure in measures.items():
        if len(measures) > 1:
            rows.append((name, f"{measure.dim:,}", "parameters"))
        rows += measure.rows()
    whole = layers.pop(_WHOLE)
    show(
        text_table(subject.title, [*rows, *closing_rows(seconds, subject.notes)]),
        json_file,
        whole.to_dict(
            subject=subject,
            seconds=seconds,
            layers=layers,
            gauss_newton=beside.pop(_WHOLE).content(beside) if beside else None,
        ),
    )
    if save:
        whole.save(save)
        typer.echo(f"wrote {save}")
    # Drawn last: all results are safe if the width of the kernels cannot be drawn.
    if out:
        from hvpspec.plotting import plot_density

        drawn = measures if len(measures) > 1 else whole
        draw(plot_density(drawn, sigma=sigma, symlog=symlog, title=subject.title), out)


def _blocks(operator: CurvatureOperator, depth: int | None) -> dict[str, CurvatureOperator]:
    """The diagonal blocks of the modules with parameters, or of modules at a given depth."""
    modules: dict[str, list[str]] = {}
    for name in operator.space.names:
        owners = name.split(".")[:-1][:depth]
        modules.setdefault(".".join(owners) or name, []).append(name)
    return {module: operator.block(names) for module, names in modules.items()}


def _measure(
    problem: Problem, operator: CurvatureOperator, name: str, seed: int, options: Mapping[str, Any]
) -> SpectralMeasure:
    """The measure of one matrix, with a progress bar."""
    import torch

    import hvpspec

    generator = torch.Generator().manual_seed(seed)  # the same probes for every matrix
    with bar(f"{name}, products") as progress, problem.lasting(operator, name) as lasting:
        return hvpspec.spectral_measure(lasting, generator=generator, progress=progress, **options)


def _draw_exact(
    problem: Problem, out: Path | None, json_file: Path | None, *, symlog: bool, bins: int
) -> None:
    """Compute all eigenvalues and draw their histogram."""
    from hvpspec.plotting import plot_spectrum, spectrum_histogram

    result, seconds = compute_index(problem, "exact")
    assert result.eigenvalues is not None  # the exact method has them
    values, floor, subject = result.eigenvalues.numpy(), result.noise_floor, problem.subject
    histogram = spectrum_histogram(values, noise_floor=floor, symlog=symlog, bins=bins)
    content = {**histogram.to_dict(subject=subject), "eigenvalues": values.tolist()}
    show(result.summary(subject=subject, seconds=seconds), json_file, content)
    if out:
        scale: Scale = "symlog" if symlog else "linear"
        title = subject.title
        draw(plot_spectrum(values, noise_floor=floor, scale=scale, bins=bins, title=title), out)
