"""The index from the dense matrix: all eigenvalues, or counts by LDL^T."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from hvpspec.linalg.dense import (
    assembly_error,
    block_eigvalsh,
    dense_float64,
    live_block,
    pivot_signs,
    spectral_norm,
)
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.progress import Progress
from hvpspec.spectrum.results import IndexResult, Rung


class _FromMatrix:
    """Counts on the assembled matrix."""

    name: ClassVar[str]
    keep_zero_rows: bool = False

    def count(
        self,
        A: SymmetricOperator,
        taus: Sequence[float] | None,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> IndexResult:
        """Count on the matrix; see :func:`hvpspec.index`. No probe is drawn.

        Args:
            A: assembled in float64 where it can be.
            taus: resolutions in descending order; None for the noise floor.
            generator: not used.
            progress: called with the number of columns assembled and their total.

        Raises:
            ComputationError: the products are not symmetric, or out of float64's range.
        """
        exact = A.in_float64()
        facts = exact.facts()
        before = exact.num_matvecs
        matrix = dense_float64(exact, progress)
        error = assembly_error(exact, matrix)
        num_matvecs = exact.num_matvecs - before
        live, num_zero_rows = (matrix, 0) if self.keep_zero_rows else live_block(matrix)
        del matrix  # the block may be a copy of nearly all of it
        n = exact.shape[0]

        values: Tensor | None = None
        if self.name == "exact":
            values = block_eigvalsh(live, num_zero_rows)
        norm = spectral_norm(live) if values is None else float(values[[0, -1]].abs().max())
        # Backward error of LAPACK, error of the assembly, and what else is known of the products.
        floor = n * exact.unit_roundoff * norm + error + exact.defect * norm

        @cache
        def count_below(x: float) -> int:
            """The number of computed eigenvalues below x."""
            if values is not None:
                return int((values < x).sum())
            return pivot_signs(live, -x)[0] + (num_zero_rows if x > 0 else 0)

        def rung(tau: float) -> Rung:
            """The count at one resolution; below the noise floor the interval by Weyl."""
            give = floor if tau < floor else 0.0
            return Rung(tau, count_below(-tau - give), count_below(give - tau), count_below(-tau))

        ladder = tuple(map(rung, taus or [floor]))
        tau = ladder[-1].tau
        return IndexResult(
            ladder=ladder,
            method=self.name,
            confidence=1.0,
            noise_floor=floor,
            norm=norm,
            dim=n,
            num_matvecs=num_matvecs,
            facts=facts,
            positive=pivot_signs(live, -tau)[2] if values is None else int((values > tau).sum()),
            eigenvalues=values,
        )


@dataclass(frozen=True)
class Exact(_FromMatrix):
    """All eigenvalues of the assembled matrix.

    Attributes:
        keep_zero_rows: whether rows that are exactly zero stay in the matrix, as in a plain script,
            though what is known of their eigenvalues then gets lost in round-off.
    """

    keep_zero_rows: bool = False

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Inertia(_FromMatrix):
    """The signs of two factorisations L D L^T of the assembled matrix, by Sylvester's law.

    In a fraction of the time of :class:`Exact` once the matrix is there, but without eigenvalues.
    """

    name: ClassVar[str] = "inertia"
