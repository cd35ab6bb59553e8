"""``hvpspec index``: the number of negative eigenvalues of the Hessian."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from hvpspec.cli.options import (
    PICTURE,
    JsonFile,
    ProbeSeed,
    of_method,
    of_output,
    probability,
    refuse_together,
)
from hvpspec.cli.problem import LoadProblem, Problem, draw, on_problem, show
from hvpspec.progress import bar

if TYPE_CHECKING:
    from hvpspec import IndexResult, Rung

MethodName = Literal["auto", "exact", "inertia", "certified", "quadrature", "filtered"]


@on_problem
def index(
    load: LoadProblem,
    method: Annotated[
        MethodName | None,
        of_method(
            "--method",
            "exact: compute all eigenvalues. inertia: only count them, which is faster."
            " certified: prove a count without the matrix. quadrature: estimate it, with an"
            " interval. filtered: estimate it in little memory, with error bars.",
            "exact up to 3,000 parameters, certified above",
            metavar="NAME",
        ),
    ] = None,
    exact: Annotated[bool, of_method("--exact", "Short for --method exact.")] = False,
    tau: Annotated[
        list[float] | None,
        of_method(
            "--tau",
            "Count eigenvalues below -TAU; repeatable.",
            "the noise floor; without the matrix also the decades above it",
            metavar="TAU",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        of_method(
            "--confidence", "Confidence of the interval at each tau.", "0.99", callback=probability
        ),
    ] = None,
    max_matvecs: Annotated[
        int | None, of_method("--max-matvecs", "Most products for certified.", "4,000", min=1)
    ] = None,
    probes: Annotated[
        int | None,
        of_method(
            "--probes",
            "Random vectors that advance together.",
            "1 for certified, otherwise 10",
            min=1,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        of_method(
            "--steps", "Most steps from each of them.", "1,000 for certified, otherwise 100", min=1
        ),
    ] = None,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None,
        of_output(
            "--out", "Draw the index as a function of tau: .png, .pdf or .svg.", metavar="FILE"
        ),
        PICTURE,
    ] = None,
) -> None:
    """Count the negative eigenvalues of the Hessian, apart from round-off."""
    if exact and method not in (None, "exact"):
        raise typer.BadParameter(f"--exact means --method exact, but --method {method} is given")
    if out and method == "inertia":
        raise typer.BadParameter("--out needs the eigenvalues; use --method exact with it")
    how: MethodName = "exact" if exact else method or "auto"
    effort: dict[str, Any] = {
        "probes": probes,
        "steps": steps,
        "seed": seed,
        "confidence": confidence,
        "max_matvecs": max_matvecs,
    }
    _refuse_useless(how, effort)
    problem = load()
    if how == "auto":
        from hvpspec.spectrum.morse import settle_method

        # Which method auto stands for depends on the size of the matrix, which is known only now.
        how = cast("MethodName", settle_method(how, problem.hessian.shape[0]).name)
        _refuse_useless(how, effort)
    result, seconds = compute_index(problem, how, tau, **effort)
    about: dict[str, Any] = {"subject": problem.subject, "seconds": seconds}
    show(result.summary(**about), json_file, result.to_dict(**about))
    if out:
        from hvpspec.plotting import plot_index_curve

        draw(plot_index_curve(result, title=problem.subject.title), out)


def compute_index(
    problem: Problem,
    method: MethodName,
    taus: Sequence[float] | None = None,
    *,
    probes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    confidence: float | None = None,
    max_matvecs: int | None = None,
) -> tuple[IndexResult, float]:
    """Compute an index by :func:`hvpspec.index` with a progress bar; also return the seconds.

    Raises:
        HvpspecError: an argument is not allowed, the matrix does not fit, or a number is not
            finite.
    """
    import torch

    import hvpspec

    by_matrix, bracket = method in ("exact", "inertia"), ""

    def progress(done: int, total: int) -> None:
        what = f"{bracket or 'index'}, products"
        if by_matrix:
            what = "assembling the Hessian" if done < total else "counting its eigenvalues"
        update(done, total, what)

    def watch(rung: Rung) -> None:
        nonlocal bracket
        bracket = f"index in [{rung.lower:,}, {rung.upper:,}] at τ = {rung.tau:.2g}"

    given = {
        "confidence": confidence,
        "max_matvecs": max_matvecs,
        "num_probes": probes,
        "num_steps": steps,
        "watch": watch if method == "certified" else None,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options["generator"] = torch.Generator().manual_seed(seed or 0)
    start = time.perf_counter()
    # Methods that assemble the matrix use the float64 operator, so the plan to record is its own.
    operator = problem.hessian.in_float64() if by_matrix else problem.hessian
    try:
        with problem.lasting(operator) as hessian, bar("reading the data") as update:
            result = hvpspec.index(
                hessian, method=method, tau_ladder=taus or None, progress=progress, **options
            )
    except BaseException:  # also Ctrl-C
        if bracket:  # the interval known when the run was interrupted or failed
            typer.echo(f"{bracket} so far", err=True)
        raise
    return result, time.perf_counter() - start


def _refuse_useless(method: str, effort: Mapping[str, object]) -> None:
    """Refuse options that have no effect on a method."""
    if method in ("exact", "inertia"):
        refuse_together(f"has no effect on --method {method}; leave it out", **effort)
    if method in ("quadrature", "filtered"):
        reason = f"belongs to --method certified; --method {method} takes --probes times --steps"
        refuse_together(f"{reason} products", max_matvecs=effort["max_matvecs"])
