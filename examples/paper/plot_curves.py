"""The index along trainings: against the loss, and against the epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hvpspec.plotting.figures import SERIES, new_figure, resolutions, scale_counts


@dataclass(frozen=True)
class Trajectory:
    """One training.

    Attributes:
        row: what its two panels have in common with others of the same kind.
        column: names its column of panels.
        label: what its colour stands for.
        epochs: when the index was looked at, ascending.
        losses: then.
        indices: then.
        bound: no index can be higher, where that is known.
    """

    row: str
    column: str
    label: str
    epochs: Sequence[int]
    losses: Sequence[float]
    indices: Sequence[int]
    bound: int | None


def plot_trajectories(
    drawn: Sequence[Trajectory], *, taus: Sequence[float], seeds: Sequence[int]
) -> Figure:
    """Draw indices against losses, and below that against epochs.

    Args:
        drawn: the trainings, at least one.
        taus: resolutions of the indices.
        seeds: of the trainings.
    """
    rows, columns = list(dict.fromkeys(t.row for t in drawn)), sorted({t.column for t in drawn})
    labels = list(dict.fromkeys(t.label for t in drawn))
    colours = {label: SERIES[i % len(SERIES)] for i, label in enumerate(labels)}
    figure = new_figure(2 * len(rows), len(columns))
    panels = figure.subplots(2 * len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            here = [t for t in drawn if (t.row, t.column) == (row, column)]
            against_loss, against_epochs = panels[2 * i, j], panels[2 * i + 1, j]
            for t in here:
                style = {"color": colours[t.label], "lw": 1.1, "marker": "o", "ms": 3.5}
                against_loss.plot(t.losses, t.indices, **style)
                # The end of a training, filled and larger.
                end = {"color": colours[t.label], "marker": "s", "ms": 7, "mec": "black"}
                against_loss.plot(t.losses[-1:], t.indices[-1:], ls="none", **end)
                against_epochs.plot(t.epochs, t.indices, **style)
            _finish(
                against_loss, here, "train loss f of these images (logarithmic, falls to the right)"
            )
            _scale_losses(against_loss)
            _finish(against_epochs, here, "epoch")
            against_epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
            against_loss.set_title(f"{column}: {row}", fontsize=10)
    handles = [
        *(
            Line2D([], [], color=colours[label], marker="o", ms=3.5, label=label)
            for label in labels
        ),
        Line2D([], [], color="white", marker="s", mec="black", ms=7, label="last epoch"),
    ]
    if any(t.bound is not None for t in drawn):
        handles.append(Line2D([], [], color="black", ls="--", lw=1, label="structural upper bound"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    which = ", ".join(map(str, sorted(set(seeds))))
    figure.supxlabel(
        f"index: eigenvalues λ < −τ, {resolutions(taus)} (noise floors);"
        f" one line per seed ({which})",
        fontsize=10,
    )
    return figure


def _scale_losses(ax: Axes) -> None:
    """A logarithm that training goes along from left to right, with plain numbers at its ticks."""
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _finish(ax: Axes, here: Sequence[Trajectory], x: str) -> None:
    """Name the axes, and draw what the structure allows where that is near."""
    ax.set_xlabel(x)
    ax.set_ylabel("index")
    ax.grid(alpha=0.25)
    top = max(max(t.indices) for t in here)
    for bound in {t.bound for t in here if t.bound is not None}:
        if bound <= 1.5 * top:
            ax.axhline(bound, ls="--", color="black", lw=1)
            top = max(top, bound)
    ax.set_ylim(0, max(1.1 * top, 1))
    scale_counts(ax)
