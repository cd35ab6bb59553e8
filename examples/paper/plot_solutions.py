"""Trained networks as points of a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from hvpspec.plotting.figures import new_figure, short


@dataclass(frozen=True)
class SolutionMap:
    """Networks by their first two principal components.

    Attributes:
        title: of the panel.
        first: coordinates by the first component.
        second: by the second.
        explained: the parts of the variance in the two.
        losses: which colour the points.
        indices: written beside points of which they are known.
    """

    title: str
    first: Sequence[float]
    second: Sequence[float]
    explained: tuple[float, float]
    losses: Sequence[float]
    indices: Sequence[int | None]


def plot_solutions(maps: Sequence[SolutionMap], *, taus: tuple[float, float] | None) -> Figure:
    """Draw each map, in at most two columns.

    Args:
        maps: at least one.
        taus: smallest and largest resolution of the indices; None if there are none.
    """
    columns = min(2, len(maps))
    rows = math.ceil(len(maps) / columns)
    figure = new_figure(rows, columns)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, drawn in zip(panels, maps, strict=False):
        known = [i is not None for i in drawn.indices]
        points = ax.scatter(
            drawn.first,
            drawn.second,
            c=drawn.losses,
            cmap="viridis",
            # Networks that learned nothing would else leave one colour to all others.
            norm=LogNorm(),
            s=[34 if k else 16 for k in known],
            linewidths=[0.9 if k else 0 for k in known],
            edgecolors="black",
        )
        for x, y, number in zip(drawn.first, drawn.second, drawn.indices, strict=True):
            if number is not None:
                ax.annotate(
                    str(number), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7
                )
        bar = figure.colorbar(points, ax=ax, label="train loss (logarithmic)")
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.yaxis.set_minor_locator(NullLocator())
        one, two = drawn.explained
        ax.set_xlabel(f"first principal component ({one:.1%} of the variance)")
        ax.set_ylabel(f"second ({two:.1%})")
        ax.set_aspect("equal", adjustable="datalim")
        ax.grid(alpha=0.25)
        ax.set_title(drawn.title, fontsize=10)
    for ax in panels[len(maps) :]:
        ax.remove()
    note = "one point per initialisation (seeds from 0)"
    if taus is not None:
        low, high = (short(tau) for tau in taus)
        note += f"; numbers at ringed points: their index at τ, the noise floor, {low} to {high}"
    figure.supxlabel(note, fontsize=10 if columns == 2 else 9)
    return figure
