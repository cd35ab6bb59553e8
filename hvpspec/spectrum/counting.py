"""How many eigenvalues lie below a number: brackets from quadrature, and what they prove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.krylov import LanczosRun
from hvpspec.linalg.quadrature import Rule, mass_bracket
from hvpspec.results import Drawn, Result
from hvpspec.spectrum.chi_squared import beta_interval
from hvpspec.spectrum.smoothing import mean_and_sem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Distribution(Drawn):
    """The fraction of eigenvalues below each of some numbers.

    Attributes:
        x: the numbers, float64, shape (k,).
        values: mean over the probes of the middle of their brackets, shape (k,).
        lower: mean of the lower ends of the brackets: what the probes' moments prove, shape (k,).
        upper: mean of the upper ends, shape (k,).
        sem: standard error of ``values`` from the randomness of the probes, shape (k,); NaN for a
            single probe.
    """

    x: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor
    sem: Tensor

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting import plot_line

        ends = self.lower, self.upper
        return plot_line(self.x, self.values, ends, "x", "fraction of eigenvalues below x", ax=ax)


@dataclass(frozen=True, repr=False)
class CountResult(Result):
    """How many eigenvalues lie below a number.

    Attributes:
        below: the number.
        estimate: mean over the probes of the middle of their brackets.
        sem: its standard error from the randomness of the probes; NaN for a single probe.
        bracket: means of the ends of the brackets: how far quadrature alone leaves it open.
        lower: at least this many, at the stated confidence; None where nothing is proven.
        upper: at most this many.
        confidence: probability that ``lower`` and ``upper`` hold; None where there are none.
        resolution: eigenvalues this near to ``below`` may be counted or not.
    """

    below: float
    estimate: float
    sem: float
    bracket: tuple[float, float]
    lower: int | None
    upper: int | None
    confidence: float | None
    resolution: float


def gauss_distribution(
    runs: Sequence[LanczosRun], rules: Sequence[Rule], x: Tensor, resolution: float
) -> Distribution:
    """The mass below each x, bracketed by the Gauss rules alone, cheap on a long grid.

    By the Chebyshev-Markov-Stieltjes inequalities, the mass below a node lies between the weights
    before it, without and with its own. Nodes within ``resolution`` of an x are inside the upper
    end and outside the lower.
    """
    if not bool(torch.isfinite(x).all()):
        raise InputError("x must be finite")
    brackets = [
        _gauss_bracket(rule, run.exhausted, x, resolution)
        for rule, run in zip(rules, runs, strict=True)
    ]
    lower, upper = (torch.stack(side) for side in zip(*brackets, strict=True))
    values, sem = mean_and_sem((lower + upper) / 2)
    return Distribution(x, values, lower.mean(0), upper.mean(0), sem)


def count_below(
    runs: Sequence[LanczosRun],
    rules: Sequence[Rule],
    below: float,
    *,
    dim: int,
    resolution: float,
    confidence: float,
    provable: bool,
) -> CountResult:
    """Count the eigenvalues below a number; see :meth:`SpectralMeasure.count`.

    An interval is provable where the probes are Gaussian and the bases orthogonal.
    """
    if not math.isfinite(below):
        raise InputError(f"below must be finite, got {below}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    if not (math.isfinite(resolution) and resolution >= 0):
        raise InputError(f"resolution must be finite and at least 0, got {resolution}")
    first, last = below - resolution, below + resolution
    brackets = [mass_bracket(run, first, last) for run in runs]
    lower, upper = torch.tensor(brackets, dtype=torch.float64).T
    estimate, sem = mean_and_sem((lower + upper) / 2 * dim)
    least, most = None, None
    if provable:
        lengths = torch.tensor([run.norm**2 for run in runs], dtype=torch.float64)
        low, high = (float(side @ lengths / lengths.sum()) for side in (lower, upper))
        # k Ritz values of one run on one side of a number make k eigenvalues there, for certain.
        surely = max(int((rule.nodes < first).sum()) for rule in rules)
        surely_not = max(int((rule.nodes > last).sum()) for rule in rules)
        least, most = (
            min(max(r, surely), dim - surely_not)
            for r in beta_interval(low, high, len(runs), 1 - confidence, dim)
        )
    return CountResult(
        below=below,
        estimate=float(estimate),
        sem=float(sem),
        bracket=(float(lower.mean() * dim), float(upper.mean() * dim)),
        lower=least,
        upper=most,
        confidence=confidence if provable else None,
        resolution=resolution,
    )


def _gauss_bracket(
    rule: Rule, exhausted: bool, x: Tensor, resolution: float
) -> tuple[Tensor, Tensor]:
    """Bounds on the mass below ``x -+ resolution`` from the weights of a Gauss rule, shape (k,)."""
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), rule.weights.cumsum(0)])
    cumulative = cumulative / cumulative[-1]
    spare = 0 if exhausted else 1
    first = torch.searchsorted(rule.nodes, x - resolution) - spare
    last = torch.searchsorted(rule.nodes, x + resolution) + spare
    return cumulative[first.clamp(min=0)], cumulative[last.clamp(max=len(rule.nodes))]
