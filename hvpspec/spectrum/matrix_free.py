"""The index of an operator that is seen only through its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.special import ndtri
from torch import Tensor

from hvpspec.linalg.noise import Noise, measure_noise
from hvpspec.linalg.operator import Progress, SymmetricOperator
from hvpspec.spectrum.certified import count_below
from hvpspec.spectrum.chebyshev import chebyshev_moments, damped_step, evaluate, jackson_width
from hvpspec.spectrum.measure import spectral_measure
from hvpspec.spectrum.results import IndexResult, Rung

#: How many probes and steps each method takes if not told.
DEFAULT_PROBES = {"certified": 1, "slq": 10, "chebyshev": 10}
DEFAULT_STEPS = {"certified": 1000, "slq": 100, "chebyshev": 100}


@dataclass(frozen=True)
class Effort:
    """What a matrix-free count may spend, see :func:`hvpspec.index`."""

    confidence: float
    generator: torch.Generator
    num_probes: int
    num_steps: int
    max_matvecs: int
    progress: Progress | None
    watch: Callable[[Rung], None] | None


def matrix_free_index(
    operator: SymmetricOperator, taus: Sequence[float] | None, method: str, effort: Effort
) -> IndexResult:
    """Count without the matrix; see :func:`hvpspec.index`.

    Args:
        operator: the operator.
        taus: resolutions in descending order, all positive; None for a ladder of decades from the
            norm down to the noise floor.
        method: "certified", "slq" or "chebyshev".
        effort: what to spend.
    """
    facts = operator.facts()
    noise = measure_noise(operator, effort.generator)
    taus = default_ladder(noise) if taus is None else list(taus)
    bound = facts.index_bound.upper if facts.index_bound else operator.shape[0]
    before = operator.num_matvecs
    resolution = 0.0
    if method == "certified":
        ladder = _certified(operator, noise.floor, taus, bound, effort)
    elif method == "slq":
        ladder = _by_quadrature(operator, noise.floor, taus, bound, effort)
    else:
        ladder, resolution = _by_chebyshev(operator, noise, taus, bound, effort)
    last = ladder[-1]
    return IndexResult(
        index=last.index if method == "certified" else None,
        lower=last.lower,
        upper=last.upper,
        estimate=last.estimate,
        tau=last.tau,
        noise_floor=noise.floor,
        certified=method == "certified" and last.index is not None and facts.certain,
        confidence=effort.confidence,
        method=method,
        num_matvecs=operator.num_matvecs - before + noise.num_matvecs,
        dim=operator.shape[0],
        raw_count=None,
        nullity=None,
        positive=None,
        norm=noise.norm,
        ladder=ladder,
        resolution=resolution,
        eigenvalues=None,
        facts=facts,
    )


def default_ladder(noise: Noise) -> list[float]:
    """Tenths of the norm, hundredths, and so on down to the noise floor, in descending order."""
    decades = [noise.norm * 10.0**-k for k in range(1, 16)]
    # The zero matrix has no scale; any tau finds nothing below it.
    floor = noise.floor or torch.finfo(torch.float64).tiny
    return [tau for tau in decades if tau > 2 * floor] + [floor]


def _certified(
    operator: SymmetricOperator, floor: float, taus: Sequence[float], bound: int, effort: Effort
) -> tuple[Rung, ...]:
    """Probe, harvest, repeat; below the noise floor only what holds in spite of it."""
    resolved, fine = [t for t in taus if t >= floor], [t for t in taus if t < floor]
    # Weyl: at tau there are at least as many as the products show at tau + floor, and at most as
    # many as they show at tau - floor < 0, which is not asked: zero lies on the far side of it.
    safe = [fine[0] + floor] if fine else []

    def report(spent: int, rung: Rung) -> None:
        """Pass on how far it has come."""
        if effort.progress is not None:
            effort.progress(spent, effort.max_matvecs)
        if effort.watch is not None:
            effort.watch(rung)

    rungs = count_below(
        operator,
        sorted({*resolved, *safe}, reverse=True),
        confidence=effort.confidence,
        generator=effort.generator,
        num_probes=effort.num_probes,
        num_steps=effort.num_steps,
        max_matvecs=effort.max_matvecs,
        upper_bound=bound,
        report=report,
    )
    answers = {rung.tau: rung for rung in rungs}
    for tau in fine:
        lower, estimate = answers[safe[0]].lower, answers[safe[0]].estimate
        answers[tau] = _rung(tau, lower, bound, estimate, bound)
    return tuple(answers[tau] for tau in taus)


def _by_quadrature(
    operator: SymmetricOperator, floor: float, taus: Sequence[float], bound: int, effort: Effort
) -> tuple[Rung, ...]:
    """Plain stochastic Lanczos quadrature with its exact interval."""
    measure = spectral_measure(
        operator,
        effort.num_probes,
        min(effort.num_steps, max(1, effort.max_matvecs // effort.num_probes)),
        generator=effort.generator,
        progress=effort.progress,
    )
    counts = [
        measure.count(
            below=-tau,
            confidence=effort.confidence,
            resolution=max(measure.resolution, _margin(tau, floor)),
        )
        for tau in taus
    ]
    return tuple(
        _rung(tau, count.lower or 0, count.upper, count.estimate, bound)
        for tau, count in zip(taus, counts, strict=True)
    )


def _by_chebyshev(
    operator: SymmetricOperator,
    noise: Noise,
    taus: Sequence[float],
    bound: int,
    effort: Effort,
) -> tuple[tuple[Rung, ...], float]:
    """A damped Chebyshev filter; the interval is its error bars, not a proof."""
    n, s = operator.shape[0], effort.num_probes
    num_steps = min(effort.num_steps, max(1, effort.max_matvecs // s))
    # The norm is known to a few per cent; a spectrum beyond the radius would make the recurrence
    # explode.
    radius = 1.05 * noise.norm or 1.0
    moments = chebyshev_moments(operator, radius, s, num_steps, effort.generator, effort.progress)
    resolution = 2 * jackson_width(moments.shape[1]) * radius
    quantile = float(ndtri((1 + effort.confidence) / 2))

    # Finer than a smoothed step varies; beyond the grid's ends there is no spectrum.
    grid = torch.linspace(-1, 1, 8 * moments.shape[1] + 1, dtype=torch.float64)

    def trace(step: Tensor) -> tuple[float, float]:
        """The trace of a step of the operator, and the half-width of its confidence interval."""
        samples = moments @ step
        error = quantile * float(samples.std()) / s**0.5 if s > 1 else float(n)
        return float(samples.mean()), error

    # The recurrence leaves T_k with an error of about k u, and a step has it k times less.
    round_off = n * moments.shape[1] * operator.unit_roundoff

    def rung(tau: float) -> Rung:
        """Steps to either side of -tau, less what they let through of the wrong side."""
        margin = _margin(tau, noise.floor)
        first, last = (-tau - margin) / radius, (-tau + margin) / radius
        early, middle, late = (
            damped_step(x, moments.shape[1])
            for x in (first - resolution / radius, -tau / radius, last + resolution / radius)
        )
        ends = torch.tensor([first, last], dtype=torch.float64).clamp(-1, 1)
        leak = float(evaluate(early, torch.cat([ends[:1], grid[grid > first]])).max())
        least = float(evaluate(late, torch.cat([ends[1:], grid[grid < last]])).min())
        low, high = trace(early), trace(late)
        lower = low[0] - low[1] - n * leak - round_off
        upper = (high[0] + high[1] + round_off) / least
        return _rung(tau, math.ceil(max(0.0, lower)), math.floor(upper), trace(middle)[0], bound)

    return tuple(rung(tau) for tau in taus), resolution


def _margin(tau: float, floor: float) -> float:
    """How far the interval at a resolution below the noise floor gives way to either side."""
    return floor if tau < floor else 0.0


def _rung(tau: float, lower: int, upper: int | None, estimate: float, bound: int) -> Rung:
    """Fit an interval and an estimate into what is known for certain."""
    lower = min(lower, bound)
    upper = max(lower, bound if upper is None else min(upper, bound))
    return Rung(tau, lower, upper, min(max(estimate, lower), upper))
