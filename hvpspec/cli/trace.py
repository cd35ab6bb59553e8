"""``hvpspec trace``: the sum of the eigenvalues, and the root of the sum of their squares."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import typer

from hvpspec.cli.options import (
    JsonFile,
    MaxMatvecs,
    ProbeSeed,
    RelativeError,
)
from hvpspec.cli.problem import LoadProblem, on_problem
from hvpspec.cli.progress import product_bar
from hvpspec.files import check_target
from hvpspec.results import closing_rows, envelope, text_table, write_json


@on_problem
def trace(
    load: LoadProblem,
    method: Annotated[
        Literal["hutch++", "hutchinson", "xtrace"],
        typer.Option(
            help="hutch++ and xtrace take a low-rank part exactly; hutchinson needs least memory."
        ),
    ] = "hutch++",
    max_matvecs: MaxMatvecs = None,
    rtol: RelativeError = None,
    seed: ProbeSeed = None,
    json_file: JsonFile = None,
) -> None:
    """Estimate the trace and the Frobenius norm, with standard errors."""
    if json_file:
        check_target(json_file)
    if max_matvecs is not None and max_matvecs < 4:
        raise typer.BadParameter(f"--max-matvecs must be at least 4, got {max_matvecs}")
    problem = load()
    import torch

    import hvpspec

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed or 0)
    effort: dict[str, Any] = {"generator": generator, "rtol": rtol}
    with problem.lasting(problem.hessian) as hessian:
        with product_bar("trace") as progress:
            found = hvpspec.trace(hessian, max_matvecs, method=method, progress=progress, **effort)
        with product_bar("Frobenius norm") as progress:
            norm = hvpspec.frobenius_norm(hessian, max_matvecs, progress=progress, **effort)
    seconds, subject = time.perf_counter() - start, problem.subject
    rows = [
        ("trace", *found.cells(method)),
        ("‖H‖_F", *norm.cells("hutchinson")),
        ("products", f"{found.num_matvecs + norm.num_matvecs:,}", "matrix-vector products"),
    ]
    typer.echo(text_table(subject.title, [*rows, *closing_rows(seconds, subject.notes)]))
    if json_file:
        content = {
            **envelope("hvpspec-trace", subject),
            "method": method,
            "trace": found.to_dict(),
            "frobenius_norm": norm.to_dict(),
            "seconds": seconds,
        }
        write_json(json_file, content)
        typer.echo(f"wrote {json_file}")
