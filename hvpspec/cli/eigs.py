"""``hvpspec eigs``: a few eigenvalues at the ends of the spectrum."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from hvpspec.cli.apart import Names
from hvpspec.cli.options import (
    JsonFile,
    MaxMatvecs,
    ProbeSeed,
    Tolerance,
)
from hvpspec.cli.problem import LoadProblem, on_problem
from hvpspec.cli.progress import product_bar
from hvpspec.errors import ComputationError
from hvpspec.files import check_target, write_atomically
from hvpspec.results import write_json


@on_problem
def eigs(
    load: LoadProblem,
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 6,
    which: Annotated[
        Literal["LA", "SA", "LM", "BE"],
        typer.Option(help="LA: largest; SA: smallest; LM: largest in size; BE: half of each."),
    ] = "LM",
    tol: Tolerance = None,
    max_matvecs: MaxMatvecs = None,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            "--vectors",
            metavar="FILE.safetensors",
            help="Write the eigenvectors to this file, by the parameters' names.",
        ),
        Names.WRITTEN,
    ] = None,
) -> None:
    """Find a few eigenvalues at the ends of the spectrum, with their residuals."""
    if json_file:
        check_target(json_file)
    if vectors:
        check_target(vectors, [".safetensors"])
    problem = load()
    import torch
    from safetensors.torch import save

    import hvpspec

    start = time.perf_counter()
    with product_bar("eigenvalues") as progress, problem.lasting(problem.hessian) as hessian:
        pairs = hvpspec.eigsh(
            hessian,
            k,
            which,
            tol=tol,
            max_matvecs=max_matvecs,
            generator=torch.Generator().manual_seed(seed or 0),
            progress=progress,
        )
    seconds, subject = time.perf_counter() - start, problem.subject
    typer.echo(pairs.summary(subject=subject, seconds=seconds))
    if json_file:
        write_json(json_file, pairs.to_dict(subject=subject, seconds=seconds))
        typer.echo(f"wrote {json_file}")
    if vectors:
        directions = problem.hessian.space.unflatten(pairs.vectors.T)
        write_atomically(vectors, save({n: v.contiguous() for n, v in directions.items()}))
        typer.echo(f"wrote {vectors}")
    missed = int((~pairs.converged).sum())
    if missed:
        raise ComputationError(
            f"{missed} of {k} eigenvalues did not converge within {pairs.num_matvecs:,} products;"
            " raise --max-matvecs or --tol"
        )
