"""Methods that see an operator only through its products, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hvpspec.errors import InputError
from hvpspec.linalg.noise import Noise, measure_noise
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import require_count
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
        taus = default_ladder(noise) if taus is None else taus
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


def default_ladder(noise: Noise) -> list[float]:
    """Tenths of the norm, hundredths, and so on down to the noise floor, in descending order."""
    decades = [noise.norm * 10.0**-k for k in range(1, 16)]
    # The zero matrix has no scale; any tau finds nothing below it.
    floor = noise.floor or torch.finfo(torch.float64).tiny
    return [tau for tau in decades if tau > 2 * floor] + [floor]
