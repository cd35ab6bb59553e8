"""Counting by a Chebyshev filter, in the memory of a few vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.special import ndtri
from torch import Tensor

from hvpspec.linalg.noise import Noise
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import draw_probes
from hvpspec.progress import Progress
from hvpspec.spectrum.matrix_free import MatrixFree, Question
from hvpspec.spectrum.results import Rung


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
        # Two standard deviations of Jackson's kernel to either side of the step.
        return 2 * jackson_width(2 * self.num_steps + 1) * _radius(noise)

    def _ladder(self, question: Question) -> tuple[Rung, ...]:
        n, s, radius = question.A.shape[0], self.num_probes, _radius(question.noise)
        moments = chebyshev_moments(
            question.A, radius, s, self.num_steps, question.generator, question.progress
        )
        N, width = moments.shape[1], self._resolution(question.noise) / radius
        quantile = float(ndtri((1 + self.confidence) / 2))
        # Finer than a smoothed step varies; beyond the grid's ends there is no spectrum.
        grid = torch.linspace(-1, 1, 8 * N + 1, dtype=torch.float64)
        # The recurrence leaves T_k with an error of about k u, and a step has it k times less.
        round_off = n * N * question.A.unit_roundoff

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
            leak = float(evaluate(early, torch.cat([ends[:1], grid[grid > first]])).max())
            least = float(evaluate(late, torch.cat([ends[1:], grid[grid < last]])).min())
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
    A: SymmetricOperator,
    radius: float,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Estimate ``tr T_k(A / radius)`` for k up to ``2 num_steps``, one row a probe.

    A step of the three-term recurrence gives two moments, since ``2 T_j T_k = T_(j+k) + T_(j-k)``.

    Args:
        A: the operator.
        radius: its spectrum lies within ``[-radius, radius]``.
        num_probes: Rademacher probes, which advance together.
        num_steps: block products.
        generator: the source of the probes.
        progress: called with the number of products done and their total.

    Returns:
        float64, shape (num_probes, 2 num_steps + 1).

    Reference:
        Weisse, Wellein, Alvermann & Fehske, The kernel polynomial method, Rev. Mod. Phys. 78
        (2006), section II.B-D; Di Napoli, Polizzi & Saad (2016).
    """
    n = A.shape[0]
    Z = draw_probes(
        "rademacher", n, num_probes, generator, dtype=A.dtype, device=A.device, ranks=A.ranks
    )
    A.expect(num_probes * num_steps, num_probes)
    previous, current = Z, A.matmat(Z) / radius
    first, second = _inner(Z, Z), _inner(Z, current)
    moments = [first, second, 2 * _inner(current, current) - first]
    for step in range(1, num_steps):
        previous, current = current, A.matmat(current) * (2 / radius) - previous
        moments.append(2 * _inner(current, previous) - second)
        moments.append(2 * _inner(current, current) - first)
        if progress is not None:
            progress((step + 1) * num_probes, num_steps * num_probes)
    return torch.stack(moments, 1)


def damped_step(x: float, num_moments: int) -> Tensor:
    """Chebyshev coefficients of a smoothed step that is 1 below ``x`` and 0 above.

    Jackson's kernel is positive, so that the smoothed step stays between 0 and 1; its width at 0 is
    :func:`jackson_width`.

    Args:
        x: where the step is, in units of the radius, within [-1, 1] or beyond.
        num_moments: N.

    Returns:
        float64, shape (N,): with moments, the trace of the step of the operator.
    """
    N, k = num_moments, torch.arange(num_moments, dtype=torch.float64)
    theta = math.acos(min(1.0, max(-1.0, x)))
    step = torch.empty(N, dtype=torch.float64)
    step[0] = 1 - theta / math.pi
    step[1:] = -2 / math.pi * torch.sin(k[1:] * theta) / k[1:]
    angle = math.pi / (N + 1)
    jackson = (N - k + 1) * torch.cos(angle * k) + torch.sin(angle * k) / math.tan(angle)
    return step * jackson / (N + 1)


def evaluate(coefficients: Tensor, x: Tensor) -> Tensor:
    """Values of a Chebyshev series at points within [-1, 1], shape (k,)."""
    k = torch.arange(len(coefficients), dtype=torch.float64)
    return torch.cos(torch.acos(x)[:, None] * k) @ coefficients


def jackson_width(num_moments: int) -> float:
    """Standard deviation of Jackson's kernel at 0, in units of the radius."""
    return math.pi / num_moments


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    """Inner products of columns in float64, shape (k,), on the CPU."""
    return torch.sum(X * Y, 0, dtype=torch.float64).cpu()
