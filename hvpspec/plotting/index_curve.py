"""Pictures of the index as a function of τ: the exact staircase, or a band that contains it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from hvpspec.plotting.figures import NEGATIVE, NOISE, Floats, figure_of, short

if TYPE_CHECKING:
    from hvpspec.spectrum import IndexResult


def plot_index_curve(
    result: IndexResult, *, title: str | None = None, ax: Axes | None = None
) -> Figure:
    """Draw how many eigenvalues lie below -τ, as a function of τ.

    If all eigenvalues are known, the curve is exact: a staircase with a step at every negative
    eigenvalue. Where it is flat, the index does not depend on τ. A matrix-free result has a count
    or an interval at some values of τ. Since the count can only fall as τ grows, these bracket it
    everywhere in between; the band shows this bracket.

    Args:
        result: an index computed by any method except ``inertia``.
        title: one line above the picture.
        ax: axes to draw into; None for a new figure.

    Raises:
        InputError: the result holds neither eigenvalues nor a matrix-free ladder.
    """
    if result.eigenvalues is None and result.method == "inertia":
        result.curve()  # raises the error that explains why there is none
    figure, ax = figure_of(ax)
    ax.set_xscale("log")
    if result.eigenvalues is not None:
        taus, counts = _staircase(result)
        ax.plot(taus, counts, drawstyle="steps-post", color=NEGATIVE, lw=1.8)
        top, left = int(counts.max()), float(taus[0])
    else:
        taus, top = _draw_brackets(ax, result), max(rung.upper for rung in result.ladder)
        left = float(taus[0])
    ax.set_xlim(left, taus[-1])
    _scale_counts(ax, result, top)
    _draw_limits(ax, result, left)
    if result.eigenvalues is None or result.tau >= left:
        _mark_counts(ax, result)
    note = "resolution τ, in units of the eigenvalues"
    if result.resolution:
        note += f"\neigenvalues within {short(result.resolution)} of −τ may be counted or not"
    ax.set_xlabel(note)
    ax.set_ylabel("number of eigenvalues λ < −τ")
    ax.grid(alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        # A staircase leaves the upper right corner free; a band may fill the whole picture.
        above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
        ax.legend(**(above if result.eigenvalues is None else {"loc": "upper right"}), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _scale_counts(ax: Axes, result: IndexResult, top: int) -> None:
    """Scale the axis of counts so that both the index and much larger counts are readable."""
    bound = result.bound
    top = max(top, result.upper, bound.upper if bound else 0, 1)
    # On a linear axis, an index below a twentieth of the axis could not be read.
    if top > 20 * max(result.estimate, 1.0):
        ax.set_yscale("symlog", linthresh=10)
        ax.set_ylim(0, 3 * top)
    else:
        ax.set_ylim(0, 1.25 * top)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))


def _draw_limits(ax: Axes, result: IndexResult, left: float) -> None:
    """Draw the structural bound, and shade the τ below the noise floor."""
    if result.bound:
        label = f"structural upper bound: {result.bound.upper:,}"
        ax.axhline(result.bound.upper, ls="--", color="black", lw=1, label=label)
    if left < result.noise_floor:
        raw = f"; raw count #(λ < 0): {result.raw_count:,}" if result.raw_count is not None else ""
        label = f"round-off: τ below the noise floor{raw}"
        ax.axvspan(left, result.noise_floor, color=NOISE, alpha=0.25, lw=0, label=label)


def _draw_brackets(ax: Axes, result: IndexResult) -> Floats:
    """Draw the band that contains the count; return the ends of the axis, ascending."""
    ladder = result.ladder[::-1]  # from fine to coarse
    taus = np.array([rung.tau for rung in ladder])
    # Beyond the norm the count is 0 for certain.
    right = max(1.5 * result.norm, 2 * float(taus[-1]))
    # Between two values of τ the count is at most that at the smaller, at least that at the larger.
    upper = np.array([rung.upper for rung in ladder] + [ladder[-1].upper])
    lower = np.array([rung.lower for rung in ladder[1:]] + [0, 0])
    edges = np.append(taus, right)
    what = {
        "quadrature": f"{result.confidence:.4g} interval, and what it leaves between",
        "filtered": f"{result.confidence:.4g} error bars (no proof)",
    }.get(result.method, "bracket: the count lies in this band")
    ax.fill_between(edges, lower, upper, step="post", color=NEGATIVE, alpha=0.22, lw=0, label=what)
    for bound in (lower, upper):
        ax.plot(edges, bound, drawstyle="steps-post", color=NEGATIVE, lw=1.1)
    finest = min(float(taus[0]), result.noise_floor or float(taus[0]))
    return np.array([finest / 3, right])


def _mark_counts(ax: Axes, result: IndexResult) -> None:
    """Mark the exact count at its τ, or the counts and intervals at each τ of a ladder."""
    exact = result.eigenvalues is not None
    left, right = np.log(ax.get_xlim())
    before, raised = math.inf, False
    named: set[str] = set()
    for rung in result.ladder[-1:] if exact else result.ladder:
        certain = rung.index is not None and result.method in ("exact", "certified")
        text = f"{rung.lower:,}" if rung.index is not None else f"[{rung.lower:,}, {rung.upper:,}]"
        kind = "certified" if certain else "interval"
        label = f"{kind}, each at confidence {result.confidence:.10g}"
        ax.plot(
            [rung.tau, rung.tau],
            [rung.lower, rung.upper],
            "o" if certain else "_-",
            color="black",
            zorder=3,
            clip_on=False,
            label="_" if exact or label in named else label,
            ms=6 if certain else 9,
            lw=1.8,
        )
        named.add(label)
        place = math.log(rung.tau)
        # Labels close to each other are put at two heights.
        raised = not raised and before - place < 0.1 * (right - left)
        before = place
        side, offset = "center", 0
        if exact:  # a longer text, put on the side where it fits
            text = f"index {text} at τ = {short(rung.tau)}"
            side, offset = ("left", 8) if place - left < 0.6 * (right - left) else ("right", -8)
        ax.annotate(
            text,
            (rung.tau, rung.upper),
            xytext=(offset, 21 if raised else 7),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=9,
            fontweight="bold",
            # Keeps the text legible where the curve or the bound passes behind it.
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _staircase(result: IndexResult) -> tuple[Floats, NDArray[np.int64]]:
    """Return the exact counts at every step of the curve and at both ends of the axis."""
    import torch

    assert result.eigenvalues is not None
    high = 1.5 * result.norm or 1.0
    floor = result.noise_floor or 1e-12 * high
    # Enough of the range below the noise floor to show that the raw count keeps growing there.
    smallest = -float(result.eigenvalues[result.eigenvalues < 0].max()) if result.raw_count else 0.0
    low = min(max(smallest / 2, 1e-9 * floor), 1e-2 * floor)
    if 0 < result.tau < high:
        low = min(low, result.tau / 3)
    # The count changes where τ equals minus an eigenvalue.
    steps = -result.eigenvalues[(result.eigenvalues < -low) & (result.eigenvalues > -high)]
    ends = torch.tensor([low, high], dtype=torch.float64)
    curve = result.curve(torch.cat([ends, steps]))
    return curve.taus.numpy(), curve.counts.numpy()
