"""How many eigenvalues are negative, resolved from round-off."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.dense import (
    assembly_error,
    block_eigvalsh,
    block_inertia,
    live_block,
    pivot_signs,
    require_tau,
    spectral_norm,
)
from hvpspec.linalg.operator import (
    DenseOperator,
    IndexBound,
    PointFacts,
    Progress,
    SymmetricOperator,
)

#: Up to this size "auto" computes all eigenvalues (seconds); above it, the inertia alone.
AUTO_EIGENVALUES_UP_TO = 3000


@dataclass(frozen=True)
class IndexCurve:
    """The number of eigenvalues below ``-tau`` as a function of ``tau``.

    Attributes:
        taus: ascending, shape (k,).
        counts: number of eigenvalues below ``-taus``, shape (k,).
        noise_floor: counts at a smaller tau count round-off.
    """

    taus: Tensor
    counts: Tensor
    noise_floor: float


@dataclass(frozen=True)
class IndexResult:
    """How many directions go down, at a resolution.

    Attributes:
        index: the number of eigenvalues below ``-tau``, None where it is not certified.
        lower: it is at least this.
        upper: it is at most this.
        estimate: the best guess at it.
        tau: the resolution, in units of the eigenvalues.
        noise_floor: bound on the error of an eigenvalue, of which the part from the assembly is
            measured and doubled for safety; signs below it mean nothing.
        certified: whether ``lower == upper`` holds at the stated confidence.
        confidence: probability that the interval holds (1 for exact methods).
        method: how it was found.
        num_matvecs: matrix-vector products spent.
        dim: size n of the matrix.
        raw_count: number of computed eigenvalues below 0, most of which may be round-off; None
            where no eigenvalues were computed.
        nullity: number of eigenvalues within ``[-tau, tau]``.
        positive: number of eigenvalues above ``tau``.
        norm: spectral norm of the matrix.
        eigenvalues: all of them in ascending order, float64, shape (n,); None if not computed.
        facts: loss, gradient norm and structural bound at the point, where the operator knows them.
    """

    index: int | None
    lower: int
    upper: int
    estimate: float
    tau: float
    noise_floor: float
    certified: bool
    confidence: float
    method: str
    num_matvecs: int
    dim: int
    raw_count: int | None
    nullity: int
    positive: int
    norm: float
    eigenvalues: Tensor | None = field(repr=False)
    facts: PointFacts

    @property
    def loss(self) -> float | None:
        """The function's value at the point, where the operator knows it."""
        return self.facts.loss

    @property
    def bound(self) -> IndexBound | None:
        """The bound on the index from the network's structure, where the operator proves one."""
        return self.facts.index_bound

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the gradient at the point, where the operator knows it."""
        return self.facts.gradient_norm

    def curve(self, taus: Tensor | None = None) -> IndexCurve:
        """Count the negative eigenvalues at many resolutions.

        Args:
            taus: resolutions of at least 0, shape (k,); None for 400, evenly spaced in the
                logarithm, from a thousandth of the noise floor to the spectral norm.

        Returns:
            The curve, in ascending order of tau.

        Raises:
            InputError: this result holds no eigenvalues, or a tau is negative.
        """
        if self.eigenvalues is None:
            raise InputError(
                f"method {self.method!r} computes no eigenvalues; use method='exact' for the curve"
            )
        if taus is None:
            # The zero matrix has neither norm nor noise; any positive range shows its constant
            # curve.
            low = math.log10(max(1e-3 * self.noise_floor, 1e-300))
            high = math.log10(max(self.norm, 1e-297))
            taus = torch.logspace(low, high, 400, dtype=torch.float64)
        taus = taus.double().sort().values
        require_tau(float(taus[0]))
        counts = torch.searchsorted(self.eigenvalues, -taus)
        return IndexCurve(taus, counts, self.noise_floor)


def index(
    A: SymmetricOperator | Tensor,
    tau: float | None = None,
    *,
    method: Literal["exact", "ldl", "auto"] = "auto",
    progress: Progress | None = None,
) -> IndexResult:
    """The Morse index: how many eigenvalues lie below ``-tau``.

    The matrix is assembled in float64, whatever the dtype of the operator, where the operator can
    do that. The noise floor bounds the error of its eigenvalues: ``n u ||A||`` for LAPACK, with the
    unit round-off ``u`` of the products, plus the measured error of the assembly. Signs of
    eigenvalues below it are round-off, so ``tau`` defaults to it and never to 0. A count at such a
    ``tau`` is of the computed matrix, and at least as many eigenvalues of the true one are
    negative. At a smaller ``tau`` only an interval is certain, and ``index`` is None if it is not
    a point.

    Args:
        A: a symmetric operator, or a symmetric matrix of shape (n, n).
        tau: the resolution, at least 0, in units of the eigenvalues; None for the noise floor.
        method: ``"exact"`` computes all eigenvalues, ``"ldl"`` only counts them by two LDL^T
            factorisations (several times cheaper for thousands of parameters), ``"auto"`` takes the
            first for small matrices and the second for larger ones.
        progress: called with the number of columns assembled and their total.

    Returns:
        The counts below, within and above ``tau``, with what else is known of the point.

    Raises:
        InputError: ``tau`` or ``method`` is not allowed, or the matrix does not fit into memory.

    Reference:
        Weyl's inequality and Sylvester's law of inertia; Horn & Johnson, Matrix Analysis, ch. 4.

    Example:
        >>> index(torch.diag(torch.tensor([3.0, 1e-12, -1e-12, -2.0])), tau=1e-6).index
        1
    """
    if method not in ("exact", "ldl", "auto"):
        raise InputError(f"method must be 'exact', 'ldl' or 'auto', got {method!r}")
    if tau is not None:
        require_tau(tau)
    operator = A if isinstance(A, SymmetricOperator) else DenseOperator(A)
    exact = operator.in_float64()
    facts = exact.facts()
    before = exact.num_matvecs
    matrix = exact.to_dense(progress=progress)
    error = assembly_error(exact, matrix)
    num_matvecs = exact.num_matvecs - before
    live, num_zero_rows = live_block(matrix.to("cpu", torch.float64))
    del matrix
    n = exact.shape[0]
    if method == "auto":
        method = "exact" if len(live) <= AUTO_EIGENVALUES_UP_TO else "ldl"

    eigenvalues = block_eigvalsh(live, num_zero_rows) if method == "exact" else None
    norm = spectral_norm(live) if eigenvalues is None else float(eigenvalues[[0, -1]].abs().max())
    noise_floor = n * exact.unit_roundoff * norm + error
    tau = noise_floor if tau is None else tau

    def count_below(x: float) -> int:
        """The number of computed eigenvalues below x."""
        if eigenvalues is not None:
            return int((eigenvalues < x).sum())
        return pivot_signs(live, -x)[0] + (num_zero_rows if x > 0 else 0)

    negative = count_below(-tau)
    positive = (
        block_inertia(live, num_zero_rows, tau).positive
        if eigenvalues is None
        else int((eigenvalues > tau).sum())
    )
    lower = upper = negative
    if tau < noise_floor:  # Weyl: each computed eigenvalue is off by up to the noise floor
        lower, upper = count_below(-tau - noise_floor), count_below(noise_floor - tau)
    return IndexResult(
        index=negative if lower == upper else None,
        lower=lower,
        upper=upper,
        estimate=float(negative),
        tau=tau,
        noise_floor=noise_floor,
        certified=lower == upper,
        confidence=1.0,
        method=method,
        num_matvecs=num_matvecs,
        dim=n,
        raw_count=None if eigenvalues is None else int((eigenvalues < 0).sum()),
        nullity=n - negative - positive,
        positive=positive,
        norm=norm,
        eigenvalues=eigenvalues,
        facts=facts,
    )
