"""Index and nullity of a regularised loss against λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from hvpspec.plotting.figures import SERIES, new_figure, resolutions


@dataclass(frozen=True)
class LambdaCurve:
    """Counts at several λ, drawn as a curve, or at one, drawn as a mark.

    Attributes:
        row: names its two panels.
        label: what its colour stands for.
        lambdas: ascending; 0 is drawn at the left end.
        indices: number of negative eigenvalues at each.
        nullities: number of eigenvalues that cannot be told from 0 at each.
    """

    row: str
    label: str
    lambdas: Sequence[float]
    indices: Sequence[int]
    nullities: Sequence[int]


def plot_regularised(
    drawn: Sequence[LambdaCurve], *, taus: Sequence[float], seeds: Sequence[int]
) -> Figure:
    """Draw indices at the left and nullities at the right, a row for each network and data set.

    Args:
        drawn: at least one.
        taus: resolutions.
        seeds: of the networks.
    """
    rows, labels = (list(dict.fromkeys(getattr(c, x) for c in drawn)) for x in ("row", "label"))
    colours = {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels)}
    positive = [x for c in drawn for x in c.lambdas if x > 0]
    left = min(positive, default=1e-8) / 3
    figure = new_figure(len(rows), 2)
    panels = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    marked = list(dict.fromkeys(c.label for c in drawn if len(c.lambdas) == 1))
    # Hollow and of several sizes: where counts agree, one mark is seen inside the other.
    marks: dict[str, dict[str, Any]] = {
        label: {"marker": "s", "ms": 10 - 4 * (i % 2), "mfc": "none", "mew": 1.8, "ls": "none"}
        for i, label in enumerate(marked)
    }
    for i, row in enumerate(rows):
        for ax, what in zip(panels[i], ("index", "nullity"), strict=True):
            for curve in (c for c in drawn if c.row == row):
                counts = curve.indices if what == "index" else curve.nullities
                xs = [max(x, left) for x in curve.lambdas]
                style = marks.get(curve.label, {"lw": 1.6})
                ax.plot(xs, counts, color=colours[curve.label], **style)
            ax.set_xscale("log")
            # ReLU networks have tens of negative eigenvalues where smooth ones have thousands.
            ax.set_yscale("symlog", linthresh=1)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
            ax.set_ylim(bottom=0)
            ax.set_ylabel(what)
            ax.grid(alpha=0.25)
            ax.set_title(row, fontsize=10)
    handles = [
        Line2D([], [], color=colours[label], label=label, **marks.get(label, {}))
        for label in labels
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    which = ", ".join(map(str, sorted(set(seeds))))
    figure.supxlabel(
        "λ of L + λ‖θ‖² (logarithmic; λ = 0 at the left end); counts logarithmic from 1 on\n"
        "index: eigenvalues of H + 2λI below −τ; nullity: within ±τ;"
        f" {resolutions(taus)} (noise floors); seed {which}",
        fontsize=10,
    )
    return figure
