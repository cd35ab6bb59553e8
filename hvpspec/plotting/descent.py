"""Pictures of a way down: f and the index on it, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hvpspec.plotting.figures import NEGATIVE, POSITIVE, new_figure, short

if TYPE_CHECKING:
    from hvpspec.landscape import Descent


def plot_descent(way: Descent, *, title: str | None = None) -> Figure:
    """Draw f, and the index at each resolution, at the points of a way down.

    Args:
        way: from `hvpspec.landscape.lower_index`.
        title: one line above the picture.
    """
    figure = new_figure(1, 2)
    left, right = figure.subplots(1, 2)
    steps = range(len(way.points))
    left.plot(steps, way.values, "o-", color=POSITIVE, lw=1.4)
    left.set_ylabel("f")
    styles = ["o-", "s--", "^:", "v-."]
    for k, tau in enumerate(way.taus.tolist()):
        label = f"τ = {short(tau)}"
        right.plot(steps, way.indices[:, k], styles[k % 4], color=NEGATIVE, lw=1.2, label=label)
    right.set_ylabel("number of eigenvalues λ < −τ")
    right.set_yscale("symlog", linthresh=1)
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    right.legend(fontsize=9)
    for ax in (left, right):
        ax.set_xlabel("point on the way")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
    figure.suptitle(title or f"end: {way.end.kind}", fontsize=11)
    return figure
