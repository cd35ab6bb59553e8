"""The index from the dense matrix: all eigenvalues, or counts by LDL^T."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch

from hvpspec.linalg.dense import (
    assembly_error,
    block_eigvalsh,
    bring_into_range_,
    in_range,
    in_units,
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

    Raises:
        ComputationError: the products are not symmetric, or the norm is out of float64's range.
    """
    exact = operator.in_float64()
    facts = exact.facts()
    before = exact.num_matvecs
    matrix = exact.to_dense(progress=progress).to("cpu", torch.float64)
    # From here on all numbers are in this unit, 1 as a rule, up to the result.
    unit = bring_into_range_(matrix)
    error = assembly_error(exact, matrix, unit)
    num_matvecs = exact.num_matvecs - before
    live, num_zero_rows = (matrix, 0) if whole else live_block(matrix)
    del matrix
    n = exact.shape[0]

    eigenvalues = block_eigvalsh(live, num_zero_rows) if method == "exact" else None
    norm = spectral_norm(live) if eigenvalues is None else float(eigenvalues[[0, -1]].abs().max())
    floor = n * exact.unit_roundoff * norm + error + exact.defect * norm
    # Where numbers are subnormal, the eigenvalues and this are rounded by up to half a step each.
    noise_floor = floor if unit == 1 else math.nextafter(floor * unit, math.inf)

    @cache
    def count_below(x: float) -> int:
        """The number of computed eigenvalues below x."""
        if eigenvalues is not None:
            return int((eigenvalues < x).sum())
        return pivot_signs(live, -x)[0] + (num_zero_rows if x > 0 else 0)

    def rung(tau: float) -> Rung:
        """The count at one resolution, an interval where that is below the noise floor."""
        x = in_units(tau, unit)
        count = count_below(-x)
        if x >= floor:
            # The floor itself may be too small to be told as a tau: the interval holds what lies
            # between the two.
            return Rung(tau, count, count if taus else count_below(-floor), count)
        # Weyl: each computed eigenvalue is off by up to the noise floor.
        return Rung(tau, count_below(-x - floor), count_below(floor - x), count)

    ladder = tuple(rung(tau) for tau in taus or [noise_floor])
    last = ladder[-1]
    x = in_units(last.tau, unit)
    positive = pivot_signs(live, -x)[2] if eigenvalues is None else int((eigenvalues > x).sum())
    return IndexResult(
        index=last.index,
        lower=last.lower,
        upper=last.upper,
        estimate=last.estimate,
        tau=last.tau,
        noise_floor=noise_floor,
        certified=last.index is not None and facts.certain,
        confidence=1.0,
        method=method,
        num_matvecs=num_matvecs,
        dim=n,
        raw_count=None if eigenvalues is None else int((eigenvalues < 0).sum()),
        nullity=n - int(last.estimate) - positive,
        positive=positive,
        norm=in_range(norm, unit),
        ladder=ladder,
        resolution=0.0,
        eigenvalues=None if eigenvalues is None else eigenvalues * unit,
        facts=facts,
    )
