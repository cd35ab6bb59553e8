"""Curves of a spectrum: the distribution, and densities seen through Gaussian kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.quadrature import Rule
from hvpspec.results import Drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Kernels reach this many widths; 6e-7 of their mass lies beyond.
_REACH = 5
#: Points per kernel width, with which the trapezoidal rule is exact to round-off.
_POINTS = 4
_MOST_POINTS = 100_000


@dataclass(frozen=True, eq=False, repr=False)
class Density(Drawn):
    """A spectral density, normalised to integral 1 (times n: eigenvalues per unit).

    Attributes:
        grid: where, float64, shape (k,).
        values: mean over the probes, shape (k,).
        sem: its standard error, shape (k,); NaN for a single probe.
        sigma: standard deviation of the Gaussian kernels, in units of the eigenvalues.
    """

    grid: Tensor
    values: Tensor
    sem: Tensor
    sigma: float

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting import plot_line

        ends = self.values - self.sem, self.values + self.sem
        return plot_line(self.grid, self.values, ends, "eigenvalue λ", "density", ax=ax)


@dataclass(frozen=True, eq=False, repr=False)
class LogDensity(Drawn):
    """A density over ``t = asinh(lambda / linthresh)``, normalised to integral 1 over t.

    Far from 0, t is ``sign(lambda) log |2 lambda / linthresh|``; within ``linthresh`` of 0 it is
    ``lambda / linthresh``.

    Attributes:
        t: where, float64, shape (k,).
        grid: the eigenvalues ``linthresh * sinh(t)``, shape (k,).
        values: mean over the probes of the mass per unit of t, shape (k,).
        sem: its standard error, shape (k,); NaN for a single probe.
        sigma: standard deviation of the Gaussian kernels in t; far from 0, where they are kernels
            in the logarithm, a factor of ``exp(sigma)``.
        linthresh: where the linear part of the axis ends, in units of the eigenvalues.
    """

    t: Tensor
    grid: Tensor
    values: Tensor
    sem: Tensor
    sigma: float
    linthresh: float

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting import plot_line

        ends = self.values - self.sem, self.values + self.sem
        x = f"t = asinh(λ / {self.linthresh:.2g})"
        return plot_line(self.t, self.values, ends, x, "density over t", ax=ax)


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


def mean_and_sem(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the first axis (ddof = 1); NaN error for a single sample."""
    count = len(samples)
    mean = samples.mean(0)
    if count == 1:
        return mean, torch.full_like(mean, math.nan)
    return mean, samples.std(0) / count**0.5


def default_grid(nodes: Tensor, sigma: float) -> Tensor:
    """A uniform grid, float64, shape (k,), that holds every kernel and resolves it.

    Raises:
        InputError: the kernels are so narrow that it would take too many points.
    """
    low, high = float(nodes.min()) - _REACH * sigma, float(nodes.max()) + _REACH * sigma
    points = (high - low) / sigma * _POINTS + 1
    if points > _MOST_POINTS:
        raise InputError(
            f"a grid that resolves sigma={sigma:.3g} has {points:.0f} points; pass a wider sigma, "
            f"or a grid of the part to be seen"
        )
    # A whole number but for round-off, as for the default sigma, stays what it is at every scale.
    return torch.linspace(low, high, math.ceil(points - 1e-6), dtype=torch.float64)


def smooth(rules: Sequence[Rule], grid: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The density of the mean of measures of mass 1, each node spread by a Gaussian kernel.

    Returns:
        Mean over the measures and its standard error, of the grid's shape (k,) each.

    Raises:
        InputError: ``sigma``, the width of the kernels, or ``grid`` is not usable.

    Reference:
        Lin, Saad & Yang, Approximating spectral densities of large matrices (2016), section 3.2.3.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise InputError(f"sigma must be positive and finite, got {sigma}")
    if grid.ndim != 1 or not bool(torch.isfinite(grid).all()):
        raise InputError(f"grid must be finite and of shape (k,), got shape {tuple(grid.shape)}")
    height = 1 / (sigma * math.sqrt(2 * math.pi))
    kernels = [
        torch.exp(-(((grid[:, None] - rule.nodes) / sigma) ** 2) / 2) @ rule.weights * height
        for rule in rules
    ]
    return mean_and_sem(torch.stack(kernels))
