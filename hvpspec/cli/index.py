"""``hvpspec index``: how many directions of the loss go down."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hvpspec.cli.apart import Names
from hvpspec.cli.options import (
    Confidence,
    JsonFile,
    MaxMatvecs,
    MethodName,
    Probes,
    ProbeSeed,
    Steps,
    refuse_together,
)
from hvpspec.cli.problem import LoadProblem, Problem, on_problem
from hvpspec.cli.progress import bracket_bar, hessian_bar
from hvpspec.files import check_target
from hvpspec.results import write_json

if TYPE_CHECKING:
    from hvpspec import IndexResult


@on_problem
def index(
    load: LoadProblem,
    exact: Annotated[bool, typer.Option("--exact", help="Short for --method exact.")] = False,
    method: Annotated[
        MethodName | None,
        typer.Option(
            help="exact: all eigenvalues; inertia: counts only, faster for thousands of parameters;"
            " certified: products alone, with a proof; quadrature: their plain interval; filtered:"
            " error bars in little memory; auto: exact up to 3,000 parameters, else certified.",
            show_default="auto",
        ),
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            help="Count eigenvalues below -TAU; repeatable.",
            show_default="the noise floor; without the matrix also decades down to it",
        ),
    ] = None,
    probes: Probes = None,
    steps: Steps = None,
    seed: ProbeSeed = None,
    confidence: Confidence = None,
    max_matvecs: MaxMatvecs = None,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Picture of the index as a function of tau: .png, .pdf or .svg."),
        Names.WRITTEN,
    ] = None,
) -> None:
    """Count the directions in which the loss goes down, resolved from round-off."""
    how: str = _settle_method(exact, method, picture=out is not None)
    effort: dict[str, Any] = {
        "probes": probes,
        "steps": steps,
        "seed": seed,
        "confidence": confidence,
        "max_matvecs": max_matvecs,
    }
    _refuse_useless(how, effort)
    if json_file:
        check_target(json_file)
    if out:
        from hvpspec.plotting import check_picture

        check_picture(out)
    problem = load()
    if how == "auto":
        from hvpspec.spectrum.morse import settle_method

        how = settle_method(how, problem.hessian.shape[0]).name
        _refuse_useless(how, effort)
    result, seconds = compute_index(problem, how, tau, **effort)
    typer.echo(result.summary(subject=problem.subject, seconds=seconds))
    if json_file:
        write_json(json_file, result.to_dict(subject=problem.subject, seconds=seconds))
        typer.echo(f"wrote {json_file}")
    if out:
        from hvpspec.plotting import plot_index_curve, save_figure

        save_figure(plot_index_curve(result, title=problem.subject.title), out)
        typer.echo(f"wrote {out}")


def compute_index(
    problem: Problem,
    method: str,
    taus: Sequence[float] | None = None,
    *,
    probes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    confidence: float | None = None,
    max_matvecs: int | None = None,
) -> tuple[IndexResult, float]:
    """Compute an index with a progress bar, and time it.

    Args:
        problem: what to count on.
        method: its name.
        taus: the resolutions; None for the method's own.
        probes: see `hvpspec.index`, as for the following; None for its defaults.
        steps: its ``num_steps``.
        seed: of its generator.
        confidence: of intervals.
        max_matvecs: the most products.

    Returns:
        The index, and the seconds it took.

    Raises:
        HvpspecError: an argument is not allowed, the matrix does not fit, or a number is not
            finite.
    """
    import torch

    import hvpspec

    given = {
        "confidence": confidence,
        "max_matvecs": max_matvecs,
        "num_probes": probes,
        "num_steps": steps,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {"method": method, "tau_ladder": taus or None}
    options["generator"] = torch.Generator().manual_seed(seed or 0)
    start = time.perf_counter()
    by_matrix = method in ("exact", "inertia")
    # The matrix is one in float64, and so is the operator whose plan is told.
    operator = problem.hessian.in_float64() if by_matrix else problem.hessian
    with problem.lasting(operator) as hessian:
        if by_matrix:
            with hessian_bar() as progress:
                result = hvpspec.index(hessian, progress=progress, **options)
        else:
            with bracket_bar() as (progress, watch):
                if method == "certified":
                    options["watch"] = watch
                result = hvpspec.index(hessian, progress=progress, **options)
    return result, time.perf_counter() - start


def _refuse_useless(method: str, effort: Mapping[str, object]) -> None:
    """Refuse options that a method does not have."""
    if method in ("exact", "inertia"):
        refuse_together(f"has no effect on --method {method}; leave it out", **effort)
    if method in ("quadrature", "filtered"):
        reason = f"belongs to --method certified; --method {method} takes --probes times --steps"
        refuse_together(f"{reason} products", max_matvecs=effort["max_matvecs"])


def _settle_method(exact: bool, method: MethodName | None, *, picture: bool) -> MethodName:
    """Read the options that choose a method; a picture needs more than one count."""
    if exact and method not in (None, "exact"):
        raise typer.BadParameter(f"--exact means --method exact, but --method {method} is given")
    if picture and method == "inertia":
        raise typer.BadParameter("--out needs the eigenvalues; use --method exact with it")
    return "exact" if exact else method or "auto"
