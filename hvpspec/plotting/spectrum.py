"""The histogram of a spectrum whose eigenvalues are all known."""

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
    """Eigenvalues counted in bins, those within the noise floor apart.

    No bin holds eigenvalues of both signs.

    Attributes:
        edges: ends of the bins, ascending, shape (k + 1,).
        counts: eigenvalues outside the noise floor in each bin, shape (k,).
        num_zero: eigenvalues within ``[-noise_floor, noise_floor]``.
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
    linear_threshold: float | None = None,
) -> SpectrumHistogram:
    """Count eigenvalues in bins of equal width on a linear or a symlog axis.

    Args:
        eigenvalues: in any order, shape (n,).
        noise_floor: bound on the error of an eigenvalue, at least 0.
        symlog: whether bins have equal width in the logarithm outside the linear threshold.
        bins: about how many, at least 1.
        linear_threshold: on a symlog axis, the half-width of its linear part, at least the noise
            floor; None for the noise floor.

    Raises:
        InputError: there are no eigenvalues, or an argument is out of its range.

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
    if symlog:
        threshold = _threshold(linear_threshold, noise_floor, outside)
        edges = _symlog_edges(outside, threshold, noise_floor, bins)
    elif linear_threshold is not None:
        raise InputError("linear_threshold belongs to a symlog axis; pass symlog=True")
    else:
        threshold = None
        edges = _linear_edges(outside, bins)
    counts = np.histogram(outside, edges)[0]
    return SpectrumHistogram(edges, counts, len(values) - len(outside), noise_floor, threshold)


def draw_spectrum(ax: Axes, histogram: SpectrumHistogram) -> None:
    """Draw a histogram of eigenvalues, from `spectrum_histogram`, with logarithmic counts."""
    edges, counts, floor = histogram.edges, histogram.counts, histogram.noise_floor
    threshold = histogram.linear_threshold
    negative = edges[1:] <= 0
    for side, colour, sign in ((negative, NEGATIVE, "<"), (~negative, POSITIVE, ">")):
        heights, widths = counts[side], np.diff(edges)[side]
        bound = "−noise floor" if sign == "<" else "noise floor"
        label = f"{int(heights.sum()):,} eigenvalues {sign} {bound}"
        ax.bar(edges[:-1][side], heights, widths, align="edge", color=colour, label=label)
    if histogram.num_zero:
        label = f"{histogram.num_zero:,} within the noise floor ±{short(floor)}"
        if threshold is not None and threshold == floor:
            ax.bar(-floor, histogram.num_zero, 2 * floor, align="edge", color=NOISE, label=label)
        else:
            ax.plot([0, 0], [0.5, histogram.num_zero], color=NOISE, lw=2.5, label=label)
            ax.plot(0, histogram.num_zero, "o", color=NOISE, ms=5)
    ax.set_yscale("log", nonpositive="clip")
    top = max(int(counts.max(initial=0)), histogram.num_zero, 1)
    ax.set_ylim(0.5, max(3 * top, 10))
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
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: "noise floor ±" in labels[i])
    ax.legend([handles[i] for i in order], [labels[i] for i in order], loc="best", fontsize=9)


def plot_spectrum(
    eigenvalues: ArrayLike,
    *,
    noise_floor: float,
    scale: Scale = "linear",
    bins: int = 100,
    linear_threshold: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw all eigenvalues as a histogram with logarithmic counts.

    Args:
        eigenvalues: in any order, shape (n,).
        noise_floor: bound on the error of an eigenvalue; those within it are drawn apart.
        scale: axis of the eigenvalues: ``linear``, ``symlog`` (logarithmic to both sides of the
            linear threshold, with bins that follow), or ``both`` in two panels.
        bins: about how many in a panel.
        linear_threshold: half-width of the linear part of the symlog axis, at least the noise
            floor; None for the noise floor.
        title: one line above the picture.

    Raises:
        InputError: there are no eigenvalues, or an argument is out of its range.
    """
    if scale not in ("linear", "symlog", "both"):
        raise InputError(f"scale must be 'linear', 'symlog' or 'both', got {scale!r}")
    panels = {"linear": [False], "symlog": [True], "both": [False, True]}[scale]
    figure = new_figure(len(panels))
    for ax, symlog in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        histogram = spectrum_histogram(
            eigenvalues,
            noise_floor=noise_floor,
            symlog=symlog,
            bins=bins,
            linear_threshold=linear_threshold if symlog else None,
        )
        draw_spectrum(ax, histogram)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _threshold(given: float | None, noise_floor: float, outside: Floats) -> float:
    """Settle the half-width of the linear part of a symlog axis."""
    if given is None:
        # Without noise, a tenth of the smallest eigenvalue keeps all of them on the logarithm.
        smallest = float(np.abs(outside).min(initial=math.inf))
        return noise_floor or (smallest / 10 if smallest < math.inf else 1.0)
    if not (math.isfinite(given) and given >= noise_floor and given > 0):
        raise InputError(
            f"linear_threshold must be a finite number of at least the noise floor"
            f" {noise_floor:.3g}, got {given}"
        )
    return given


def _linear_edges(outside: Floats, bins: int) -> Floats:
    """Bins of equal width, 0 being an edge, over all eigenvalues."""
    low, high = outside.min(initial=0.0), outside.max(initial=0.0)
    width = (high - low) / bins if high > low else 1.0
    below, above = math.ceil(-low / width), max(math.ceil(high / width), 1 if low == 0 else 0)
    edges = np.arange(-below, above + 1) * width
    # Rounding must not push an extreme eigenvalue out.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return edges


def _symlog_edges(outside: Floats, threshold: float, noise_floor: float, bins: int) -> Floats:
    """Bins of equal width on a symlog axis, whose linear halves are as wide as a decade."""
    low, high = -outside.min(initial=-threshold), outside.max(initial=threshold)
    decades = [math.log10(end / threshold) for end in (low, high)]
    width = (sum(decades) + 2) / bins
    below, above = (
        np.geomspace(threshold, end, max(1, round(d / width)) + 1)[1:] if d > 0 else np.empty(0)
        for end, d in zip((low, high), decades, strict=True)
    )
    # The noise floor's own bin holds no eigenvalue that has a sign, and is not divided.
    inner = 1 if threshold == noise_floor else 2 * max(1, round(1 / width))
    middle = np.linspace(-threshold, threshold, inner + 1)
    return np.concatenate([-below[::-1], middle, above])
