"""``hvpspec eigs`` and ``hvpspec trace``: extreme eigenvalues, trace and Frobenius norm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hvpspec.cli.options import File, JsonFile, ProbeSeed, of_method, of_output, positive
from hvpspec.cli.problem import LoadProblem, on_problem, show
from hvpspec.errors import ComputationError
from hvpspec.files import write_atomically
from hvpspec.progress import bar
from hvpspec.results import closing_rows, envelope, text_table


@on_problem
def eigs(
    load: LoadProblem,
    k: Annotated[int, of_method("-k", "How many eigenvalues.", min=1)] = 6,
    which: Annotated[
        Literal["LA", "SA", "LM", "BE"],
        of_method(
            "--which",
            "LA: the largest. SA: the smallest. LM: the largest in absolute value. BE: half"
            " from each end.",
        ),
    ] = "LM",
    tol: Annotated[
        float | None,
        of_method(
            "--tol",
            "Largest residual of an eigenvalue, relative to the norm.",
            "square root of the unit round-off",
            callback=positive,
        ),
    ] = None,
    max_matvecs: Annotated[
        int | None, of_method("--max-matvecs", "Most products.", "100 k + 1,000", min=1)
    ] = None,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
    vectors: Annotated[
        Path | None,
        of_output(
            "--vectors",
            "Write the eigenvectors, under the names of the parameters.",
            metavar="FILE.safetensors",
        ),
        File("written", (".safetensors",)),
    ] = None,
) -> None:
    """Compute a few eigenvalues at the ends of the spectrum, with their residuals."""
    problem = load()
    import torch
    from safetensors.torch import save

    import hvpspec

    start = time.perf_counter()
    with bar("eigenvalues") as progress, problem.lasting(problem.hessian) as hessian:
        pairs = hvpspec.eigsh(
            hessian,
            k,
            which,
            tol=tol,
            max_matvecs=max_matvecs,
            generator=torch.Generator().manual_seed(seed or 0),
            progress=progress,
        )
    about: dict[str, Any] = {"subject": problem.subject, "seconds": time.perf_counter() - start}
    show(pairs.summary(**about), json_file, pairs.to_dict(**about))
    if vectors:
        directions = problem.hessian.space.unflatten(pairs.vectors.T)
        write_atomically(vectors, save({n: v.contiguous() for n, v in directions.items()}))
        typer.echo(f"wrote {vectors}")
    # Only now, since the values that converged are good and have been printed and written.
    missed = int((~pairs.converged).sum())
    if missed:
        raise ComputationError(
            f"{missed} of {k} eigenvalues did not converge within {pairs.num_matvecs:,} products;"
            " raise --max-matvecs or --tol"
        )


@on_problem
def trace(
    load: LoadProblem,
    method: Annotated[
        Literal["hutch++", "hutchinson", "xtrace"],
        of_method(
            "--method",
            "hutch++ and xtrace compute a low-rank part exactly; hutchinson needs least memory.",
        ),
    ] = "hutch++",
    max_matvecs: Annotated[
        int | None,
        of_method(
            "--max-matvecs",
            "Most products for each of the two.",
            "100; with --rtol, as many as it takes",
            min=4,
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        of_method(
            "--rtol",
            "Stop at this standard error, relative to the larger of |trace| and norm.",
            callback=positive,
        ),
    ] = None,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
) -> None:
    """Estimate the trace and the Frobenius norm, with standard errors."""
    problem = load()
    import torch

    import hvpspec

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed or 0)
    effort: dict[str, Any] = {"generator": generator, "rtol": rtol}
    with problem.lasting(problem.hessian) as hessian:
        with bar("trace, products") as progress:
            found = hvpspec.trace(hessian, max_matvecs, method=method, progress=progress, **effort)
        with bar("Frobenius norm, products") as progress:
            norm = hvpspec.frobenius_norm(hessian, max_matvecs, progress=progress, **effort)
    seconds, subject = time.perf_counter() - start, problem.subject
    rows = [
        ("trace", *found.cells(method)),
        ("‖H‖_F", *norm.cells("hutchinson")),
        ("products", f"{found.num_matvecs + norm.num_matvecs:,}", "matrix-vector products"),
        *closing_rows(seconds, subject.notes),
    ]
    content = {
        **envelope("hvpspec-trace", subject),
        "method": method,
        "trace": found.to_dict(),
        "frobenius_norm": norm.to_dict(),
        "seconds": seconds,
    }
    show(text_table(subject.title, rows), json_file, content)
