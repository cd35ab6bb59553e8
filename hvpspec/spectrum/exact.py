"""The index from the dense matrix: all eigenvalues, or counts by LDL^T."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from hvpspec.linalg.dense import (
    assembly_error,
    block_eigvalsh,
    live_block,
    pivot_signs,
    spectral_norm,
)
from hvpspec.linalg.operator import Progress, SymmetricOperator
from hvpspec.spectrum.results import IndexResult, Rung


def exact_index(
    operator: SymmetricOperator,
    taus: Sequence[float] | None,
    method: Literal["exact", "ldl"],
    progress: Progress | None,
    *,
    whole: bool = False,
) -> IndexResult:
    """Count on the assembled matrix; see :func:`hvpspec.index`.

    Args:
        operator: assembled in float64 where it can be.
        taus: resolutions in descending order; None for the noise floor.
        method: eigenvalues or LDL^T.
        progress: called with the number of columns assembled and their total.
        whole: whether rows that are exactly zero stay in the matrix, though what is known of them
            gets lost in round-off, as in a plain script.
    """
    exact = operator.in_float64()
    facts = exact.facts()
    before = exact.num_matvecs
    matrix = exact.to_dense(progress=progress)
    error = assembly_error(exact, matrix)
    num_matvecs = exact.num_matvecs - before
    matrix = matrix.to("cpu", torch.float64)
    live, num_zero_rows = (matrix, 0) if whole else live_block(matrix)
    del matrix
    n = exact.shape[0]

    eigenvalues = block_eigvalsh(live, num_zero_rows) if method == "exact" else None
    norm = spectral_norm(live) if eigenvalues is None else float(eigenvalues[[0, -1]].abs().max())
    noise_floor = n * exact.unit_roundoff * norm + error

    def count_below(x: float) -> int:
        """The number of computed eigenvalues below x."""
        if eigenvalues is not None:
            return int((eigenvalues < x).sum())
        return pivot_signs(live, -x)[0] + (num_zero_rows if x > 0 else 0)

    def rung(tau: float) -> Rung:
        """The count at one resolution, an interval where that is below the noise floor."""
        count = count_below(-tau)
        if tau >= noise_floor:
            return Rung(tau, count, count, count)
        # Weyl: each computed eigenvalue is off by up to the noise floor.
        return Rung(tau, count_below(-tau - noise_floor), count_below(noise_floor - tau), count)

    ladder = tuple(rung(tau) for tau in taus or [noise_floor])
    last = ladder[-1]
    positive = (
        pivot_signs(live, -last.tau)[2]
        if eigenvalues is None
        else int((eigenvalues > last.tau).sum())
    )
    return IndexResult(
        index=last.index,
        lower=last.lower,
        upper=last.upper,
        estimate=last.estimate,
        tau=last.tau,
        noise_floor=noise_floor,
        certified=last.index is not None,
        confidence=1.0,
        method=method,
        num_matvecs=num_matvecs,
        dim=n,
        raw_count=None if eigenvalues is None else int((eigenvalues < 0).sum()),
        nullity=n - int(last.estimate) - positive,
        positive=positive,
        norm=norm,
        ladder=ladder,
        resolution=0.0,
        eigenvalues=eigenvalues,
        facts=facts,
    )
