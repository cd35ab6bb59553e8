"""Histograms of spectra whose eigenvalues are all known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import ArrayLike, NDArray

from hvpspec.errors import InputError
from hvpspec.plotting.figures import (
    NEGATIVE,
    NOISE,
    POSITIVE,
    Floats,
    figure_of,
    new_figure,
    short,
    tick_decades,
)
from hvpspec.results import Drawn

Scale = Literal["linear", "symlog", "both"]


@dataclass(frozen=True, eq=False, repr=False)
class SpectrumHistogram(Drawn):
    """Eigenvalues counted in bins; those within the noise floor are counted separately.

    No bin contains eigenvalues of both signs.

    Attributes:
        edges: ends of the bins, ascending, shape (k + 1,).
        counts: number of eigenvalues outside the noise floor in each bin, shape (k,).
        num_zero: number of eigenvalues in ``[-noise_floor, noise_floor]``.
        noise_floor: bound on the error of an eigenvalue.
        linear_threshold: half-width of the linear part of a symlog axis; None for a linear axis.
    """

    edges: Floats
    counts: NDArray[np.int64]
    num_zero: int
    noise_floor: float
    linear_threshold: float | None

    _FORMAT: ClassVar[str] = "hvpspec-density"

    def _draw(self, ax: Axes | None) -> Figure:
        figure, ax = figure_of(ax)
        draw_spectrum(ax, self)
        return figure


def spectrum_histogram(
    eigenvalues: ArrayLike,
    *,
    noise_floor: float,
    symlog: bool = False,
    bins: int = 100,
) -> SpectrumHistogram:
    """Count eigenvalues in bins of equal width on a linear or a symlog axis.

    A symlog axis is linear within the noise floor and logarithmic outside it.

    Args:
        eigenvalues: in any order, shape (n,).
        noise_floor: bound on the error of an eigenvalue, at least 0.
        symlog: whether bins have equal width on a symlog axis, instead of a linear one.
        bins: approximate number of bins, at least 1.

    Raises:
        InputError: there are no eigenvalues, or an argument is out of range.

    >>> spectrum_histogram([-1.0, 0.0, 3.0], noise_floor=1e-9, bins=4).counts
    array([1, 0, 0, 1])
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise InputError(f"expected finite eigenvalues of shape (n,), got shape {values.shape}")
    if not (math.isfinite(noise_floor) and noise_floor >= 0):
        raise InputError(f"noise_floor must be a finite number of at least 0, got {noise_floor}")
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    outside = values[np.abs(values) > noise_floor]
    threshold = None
    if symlog:
        # Without noise, a tenth of the smallest |λ| puts all eigenvalues on the logarithmic part.
        threshold = noise_floor or float(np.abs(outside).min(initial=math.inf)) / 10
        threshold = threshold if math.isfinite(threshold) else 1.0
        edges = _symlog_edges(outside, threshold, bins)
    else:
        edges = _linear_edges(outside, bins)
    counts = np.histogram(outside, edges)[0]
    return SpectrumHistogram(edges, counts, len(values) - len(outside), noise_floor, threshold)


def draw_spectrum(ax: Axes, histogram: SpectrumHistogram) -> None:
    """Draw a histogram of eigenvalues, from `spectrum_histogram`, with logarithmic counts."""
    edges, counts, floor = histogram.edges, histogram.counts, histogram.noise_floor
    threshold = histogram.linear_threshold
    negative = edges[1:] <= 0
    sides = (negative, NEGATIVE, "< −noise floor"), (~negative, POSITIVE, "> noise floor")
    for side, colour, where in sides:
        heights, widths = counts[side], np.diff(edges)[side]
        label = f"{int(heights.sum()):,} eigenvalues {where}"
        ax.bar(edges[:-1][side], heights, widths, align="edge", color=colour, label=label)
    if histogram.num_zero:
        label = f"{histogram.num_zero:,} within the noise floor ±{short(floor)}"
        if threshold == floor:
            ax.bar(-floor, histogram.num_zero, 2 * floor, align="edge", color=NOISE, label=label)
        else:  # on a linear axis the noise floor is too narrow for a bar
            ax.plot([0, 0], [0.5, histogram.num_zero], color=NOISE, lw=2.5, label=label)
            ax.plot(0, histogram.num_zero, "o", color=NOISE, ms=5)
    ax.set_yscale("log", nonpositive="clip")
    top = max(int(counts.max(initial=0)), histogram.num_zero, 1)
    ax.set_ylim(0.5, max(3 * top, 10))  # below 1, so that a bin with one eigenvalue is visible
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("number of eigenvalues")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else ""))
    if threshold is None:
        ax.set_xlabel("eigenvalue λ (linear axis)")
    else:
        ax.set_xscale("symlog", linthresh=threshold, linscale=1)
        ax.set_xlim(1.5 * min(edges[0], -threshold), 1.5 * max(edges[-1], threshold))
        tick_decades(ax, threshold)
        what = "the noise floor" if threshold == floor else f"the noise floor is {short(floor)}"
        ax.set_xlabel(f"eigenvalue λ (logarithmic axis, linear within ±{short(threshold)}, {what})")
    ax.axvline(0, color="black", lw=0.6, zorder=0)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)
    # Matplotlib lists lines before bars; what lies within the noise floor belongs last.
    entries = sorted(
        zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: "±" in entry[1]
    )
    ax.legend(*zip(*entries, strict=True), loc="best", fontsize=9)


def plot_spectrum(
    eigenvalues: ArrayLike,
    *,
    noise_floor: float,
    scale: Scale = "linear",
    bins: int = 100,
    title: str | None = None,
) -> Figure:
    """Draw all eigenvalues as a histogram with logarithmic counts.

    Args:
        eigenvalues: in any order, shape (n,).
        noise_floor: bound on the error of an eigenvalue; those within it are drawn separately.
        scale: axis of the eigenvalues: ``linear``, ``symlog`` (logarithmic on both sides of the
            noise floor, as are the bins), or ``both`` in two panels.
        bins: approximate number of bins in a panel.
        title: one line above the picture.

    Raises:
        InputError: there are no eigenvalues, or an argument is out of range.
    """
    if scale not in ("linear", "symlog", "both"):
        raise InputError(f"scale must be 'linear', 'symlog' or 'both', got {scale!r}")
    panels = {"linear": [False], "symlog": [True], "both": [False, True]}[scale]
    figure = new_figure(len(panels))
    for i, symlog in enumerate(panels, start=1):
        histogram = spectrum_histogram(
            eigenvalues, noise_floor=noise_floor, symlog=symlog, bins=bins
        )
        draw_spectrum(figure.add_subplot(len(panels), 1, i), histogram)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _linear_edges(outside: Floats, bins: int) -> Floats:
    """Return bins of equal width that cover all eigenvalues and have an edge at 0."""
    low, high = outside.min(initial=0.0), outside.max(initial=0.0)
    width = (high - low) / bins if high > low else 1.0
    # Whole numbers of bins on either side of 0, so that no bin contains both signs.
    below, above = math.ceil(-low / width), max(math.ceil(high / width), 1 if low == 0 else 0)
    edges = np.arange(-below, above + 1) * width
    # Round-off must not push an extreme eigenvalue out of the last bin.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def _symlog_edges(outside: Floats, threshold: float, bins: int) -> Floats:
    """Return bins of equal width on a symlog axis, whose linear half is as wide as a decade."""
    low, high = -outside.min(initial=-threshold), outside.max(initial=threshold)
    decades = [math.log10(end / threshold) for end in (low, high)]
    width = (sum(decades) + 2) / bins
    below, above = (
        np.geomspace(threshold, end, max(1, round(d / width)) + 1)[1:] if d > 0 else np.empty(0)
        for end, d in zip((low, high), decades, strict=True)
    )
    # The linear part is one bin: all eigenvalues beyond the noise floor lie outside it.
    return np.concatenate([-below[::-1], [-threshold, threshold], above])
