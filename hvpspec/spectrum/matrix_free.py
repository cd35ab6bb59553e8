"""Methods that see an operator only through its products, and what they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from numpy.polynomial.chebyshev import chebval
from scipy.special import ndtri
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.noise import Noise, measure_noise
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import probes_for, require_count
from hvpspec.progress import Progress
from hvpspec.spectrum.measure import spectral_measure
from hvpspec.spectrum.results import IndexResult, Rung


@dataclass(frozen=True)
class Question:
    """How many eigenvalues lie below ``-tau``, asked of products.

    Attributes:
        A: the operator.
        taus: resolutions in descending order, all positive.
        noise: what the products leave uncertain.
        bound: no more eigenvalues than this are negative, for certain.
        generator: the source of probes.
        progress: called with the products done and the most there will be.
    """

    A: SymmetricOperator
    taus: Sequence[float]
    noise: Noise
    bound: int
    generator: torch.Generator
    progress: Progress | None

    def margin(self, tau: float) -> float:
        """How far an interval gives way to either side (Weyl): below the noise floor, by that."""
        return self.noise.floor if tau < self.noise.floor else 0.0

    def rung(self, tau: float, lower: int, upper: int | None, estimate: float) -> Rung:
        """Fit an interval and an estimate into what is known for certain."""
        lower = min(lower, self.bound)
        upper = max(lower, self.bound if upper is None else min(upper, self.bound))
        return Rung(tau, lower, upper, min(max(estimate, lower), upper))


@dataclass(frozen=True, kw_only=True)
class MatrixFree(ABC):
    """What a matrix-free count may spend, checked when it is made."""

    confidence: float = 0.99
    num_probes: int = 10
    num_steps: int = 100

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence must lie between 0 and 1, got {self.confidence}")
        require_count("num_probes", self.num_probes)
        require_count("num_steps", self.num_steps)

    def count(
        self,
        A: SymmetricOperator,
        taus: Sequence[float] | None,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> IndexResult:
        """Count without the matrix; see :func:`hvpspec.index`.

        Args:
            A: the operator.
            taus: resolutions in descending order; None for a ladder of decades from the norm down
                to the noise floor.
            generator: the source of probes.
            progress: called with the products done and the most there will be.
        """
        if taus is not None and taus[-1] == 0:
            raise InputError("tau must be above 0 for a matrix-free method, got 0.0")
        facts = A.facts()
        noise = measure_noise(A, generator)
        bound = facts.index_bound.upper if facts.index_bound else A.shape[0]
        if taus is None:
            # The zero matrix has no scale; any tau finds nothing below it.
            floor = noise.floor or torch.finfo(torch.float64).tiny
            decades = [noise.norm * 10.0**-k for k in range(1, 16)]
            taus = [*(tau for tau in decades if tau > 2 * floor), floor]
        before = A.num_matvecs
        ladder = self._ladder(Question(A, taus, noise, bound, generator, progress))
        return IndexResult(
            ladder=ladder,
            method=self.name,
            confidence=self.confidence,
            noise_floor=noise.floor,
            norm=noise.norm,
            dim=A.shape[0],
            num_matvecs=A.num_matvecs - before + noise.num_matvecs,
            facts=facts,
            resolution=self._resolution(noise),
        )

    @abstractmethod
    def _ladder(self, question: Question) -> tuple[Rung, ...]:
        """Answer at each resolution, in their order."""

    def _resolution(self, noise: Noise) -> float:
        """Eigenvalues this near to a resolution may be counted or not."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Quadrature(MatrixFree):
    """Plain stochastic Lanczos quadrature, with its exact interval.

    Right for a rough count, or where there are too many eigenvalues to harvest one by one. It takes
    ``num_probes * num_steps`` products and keeps ``num_probes * (num_steps + 1)`` vectors.

    Attributes:
        confidence: of the interval, for each tau.
        num_probes: random vectors that advance together.
        num_steps: Lanczos steps from each.

    Reference:
        The page "The certificate" of the documentation, where its interval is derived.
    """

    name: ClassVar[str] = "quadrature"

    def _ladder(self, question: Question) -> tuple[Rung, ...]:
        measure = spectral_measure(
            question.A,
            self.num_probes,
            self.num_steps,
            generator=question.generator,
            progress=question.progress,
        )

        def rung(tau: float) -> Rung:
            resolution = max(measure.resolution, question.margin(tau))
            count = measure.count(-tau, self.confidence, resolution=resolution)
            return question.rung(tau, count.lower or 0, count.upper, count.estimate)

        return tuple(map(rung, question.taus))


@dataclass(frozen=True, kw_only=True)
class Filtered(MatrixFree):
    """A Chebyshev filter: Hutchinson's estimate of the trace of a smoothed step.

    It takes ``num_probes * num_steps`` products and the memory of a few times ``num_probes``
    vectors, which is all that speaks for it. **Its interval proves nothing**: it is error bars, of
    a normal law that is assumed with a standard deviation that is estimated, and says nothing of
    what ``num_probes`` vectors happened to miss. The step is as wide as the result's
    ``resolution``, some 3% of the norm for 100 steps, and eigenvalues so near to ``-tau`` may be
    counted or not; a finer tau is out of its reach.

    Attributes:
        confidence: of the error bars, for each tau.
        num_probes: random vectors that advance together.
        num_steps: products with each; the polynomial has twice this degree.

    Reference:
        Weisse, Wellein, Alvermann & Fehske, The kernel polynomial method, Rev. Mod. Phys. 78
        (2006); Di Napoli, Polizzi & Saad, Efficient estimation of eigenvalue counts in an interval
        (2016).
    """

    name: ClassVar[str] = "filtered"

    def _resolution(self, noise: Noise) -> float:
        # Two standard deviations of Jackson's kernel for N moments, pi / N at 0.
        return 2 * math.pi / (2 * self.num_steps + 1) * _radius(noise)

    def _ladder(self, question: Question) -> tuple[Rung, ...]:
        A, s, radius = question.A, self.num_probes, _radius(question.noise)
        n = A.shape[0]
        Z = probes_for(A, "rademacher", s, question.generator)
        moments = chebyshev_moments(A, radius, Z, self.num_steps, question.progress)
        N, width = moments.shape[1], self._resolution(question.noise) / radius
        quantile = float(ndtri((1 + self.confidence) / 2))
        # Finer than a smoothed step varies; beyond the grid's ends there is no spectrum.
        grid = torch.linspace(-1, 1, 8 * N + 1, dtype=torch.float64)
        # The recurrence leaves T_k with an error of about k u, and a step has it k times less.
        round_off = n * N * A.unit_roundoff

        def trace(step: Tensor) -> tuple[float, float]:
            """The trace of a step of the operator, and the half-width of its error bar."""
            samples = moments @ step
            # One sample says nothing of its own error.
            error = quantile * float(samples.std()) / s**0.5 if s > 1 else float(n)
            return float(samples.mean()), error

        def rung(tau: float) -> Rung:
            """Steps to either side of -tau, less what they let through of the wrong side."""
            margin = question.margin(tau)
            first, last = (-tau - margin) / radius, (-tau + margin) / radius
            # A step earlier by its own width lets through nearly nothing of what is not below
            # -tau, and a later one nearly all of what is.
            early, middle, late = (
                damped_step(x, N) for x in (first - width, -tau / radius, last + width)
            )
            ends = torch.tensor([first, last], dtype=torch.float64).clamp(-1, 1)
            above = torch.cat([ends[:1], grid[grid > first]]).numpy()
            below = torch.cat([ends[1:], grid[grid < last]]).numpy()
            leak, least = chebval(above, early.numpy()).max(), chebval(below, late.numpy()).min()
            low, high = trace(early), trace(late)
            # At most n eigenvalues leak; those below -tau are let through at least in part.
            lower = low[0] - low[1] - n * leak - round_off
            upper = (high[0] + high[1] + round_off) / least
            guess = trace(middle)[0]
            return question.rung(tau, math.ceil(max(0.0, lower)), math.floor(upper), guess)

        return tuple(map(rung, question.taus))


def _radius(noise: Noise) -> float:
    """The spectrum lies within this: the norm is known to a few per cent.

    Beyond it Chebyshev polynomials grow exponentially, and the recurrence with them.
    """
    return 1.05 * noise.norm or 1.0


def chebyshev_moments(
    A: SymmetricOperator, radius: float, Z: Tensor, num_steps: int, progress: Progress | None
) -> Tensor:
    """``z^T T_k(A / radius) z`` for each column z of Z (n, s) and k up to ``2 num_steps``.

    A step of the three-term recurrence gives two moments, since ``2 T_j T_k = T_(j+k) + T_(j-k)``.

    Returns:
        float64, shape (s, 2 num_steps + 1), on the CPU.
    """

    def inner(X: Tensor, Y: Tensor) -> Tensor:
        return torch.sum(X * Y, 0, dtype=torch.float64).cpu()

    s = Z.shape[1]
    A.expect(s * num_steps, s)
    previous, current = Z, A.matmat(Z) / radius
    first, second = inner(Z, Z), inner(Z, current)
    moments = [first, second, 2 * inner(current, current) - first]
    for step in range(1, num_steps):
        previous, current = current, A.matmat(current) * (2 / radius) - previous
        moments.append(2 * inner(current, previous) - second)
        moments.append(2 * inner(current, current) - first)
        if progress is not None:
            progress((step + 1) * s, num_steps * s)
    return torch.stack(moments, 1)


def damped_step(x: float, N: int) -> Tensor:
    """N Chebyshev coefficients, float64, of a smoothed step that is 1 below ``x`` and 0 above.

    Jackson's kernel is positive, so that the smoothed step stays between 0 and 1.
    """
    k = torch.arange(N, dtype=torch.float64)
    theta = math.acos(min(1.0, max(-1.0, x)))
    step = torch.empty(N, dtype=torch.float64)
    step[0] = 1 - theta / math.pi
    step[1:] = -2 / math.pi * torch.sin(k[1:] * theta) / k[1:]
    angle = math.pi / (N + 1)
    jackson = (N - k + 1) * torch.cos(angle * k) + torch.sin(angle * k) / math.tan(angle)
    return step * jackson / (N + 1)
