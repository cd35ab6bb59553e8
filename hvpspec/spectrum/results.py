"""What an index is told in: the count, its interval, its resolution and how it was found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.dense import require_tau
from hvpspec.linalg.facts import IndexBound, PointFacts


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
class Rung:
    """The index at one resolution of a ladder.

    Attributes:
        tau: the resolution, in units of the eigenvalues.
        lower: at least this many eigenvalues lie below ``-tau``, with the result's confidence.
        upper: at most this many do, with the result's confidence.
        estimate: the best guess at their number.
    """

    tau: float
    lower: int
    upper: int
    estimate: float

    @property
    def index(self) -> int | None:
        """The number, None where it is not certified."""
        return self.lower if self.lower == self.upper else None


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
        confidence: probability that the interval holds (1 for exact methods); with several taus,
            for each of them.
        method: how it was found.
        num_matvecs: matrix-vector products spent.
        dim: size n of the matrix.
        raw_count: number of computed eigenvalues below 0, most of which may be round-off; None
            where no eigenvalues were computed.
        nullity: number of eigenvalues within ``[-tau, tau]``, None for matrix-free methods.
        positive: number of eigenvalues above ``tau``, None for matrix-free methods.
        norm: spectral norm of the matrix, to a few per cent for matrix-free methods.
        ladder: the answers at all resolutions asked for, in descending order of tau; the last is
            this result's own.
        resolution: eigenvalues this near to ``-tau`` may be counted or not; 0 where the count is
            sharp.
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
    nullity: int | None
    positive: int | None
    norm: float
    ladder: tuple[Rung, ...]
    resolution: float
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
            # curve. The least number there is may be more than a thousandth of the noise floor.
            least = math.ulp(0.0)
            low = math.log10(max(1e-3 * self.noise_floor, least)) if self.norm else -3
            high = math.log10(self.norm or 1.0)
            taus = torch.logspace(low, high, 400, dtype=torch.float64)
        taus = taus.double().sort().values
        require_tau(float(taus[0]))
        counts = torch.searchsorted(self.eigenvalues, -taus)
        return IndexCurve(taus, counts, self.noise_floor)
