"""Several spectra side by side: histograms, and eigenvalues by rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from hvpspec.plotting.figures import SERIES, Floats, new_figure, short
from hvpspec.plotting.spectrum import draw_spectrum, spectrum_histogram


@dataclass(frozen=True, eq=False)
class SpectrumPanel:
    """All eigenvalues of a matrix.

    Attributes:
        eigenvalues: ascending, shape (n,).
        noise_floor: bound on the error of an eigenvalue.
        low: where the bulk begins.
        high: where it ends.
    """

    eigenvalues: Floats
    noise_floor: float
    low: float
    high: float


def plot_spectra(spectra: Mapping[str, SpectrumPanel], *, symlog: bool) -> Figure:
    """Draw histograms in two columns, with the bulk marked below each.

    Args:
        spectra: by the titles of their panels, at least one.
        symlog: whether axes are logarithmic outside the noise floor.
    """
    rows = math.ceil(len(spectra) / 2)
    figure = new_figure(rows, 2)
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for ax, (title, found) in zip(panels, spectra.items(), strict=False):
        edge = ax.get_xaxis_transform()
        inside = ((found.low <= found.eigenvalues) & (found.eigenvalues <= found.high)).sum()
        label = f"bulk [{short(found.low)}, {short(found.high)}]: {inside:,}"
        style = {"color": "black", "marker": "|", "lw": 3}
        ax.plot([found.low, found.high], [0.015, 0.015], transform=edge, label=label, **style)
        histogram = spectrum_histogram(
            found.eigenvalues, noise_floor=found.noise_floor, symlog=symlog, bins=80
        )
        draw_spectrum(ax, histogram)
        ax.set_xlabel(f"eigenvalue λ ({'symlog' if symlog else 'linear'} axis)")
        if symlog:
            _thin_ticks(ax, found.noise_floor)
        _head(ax, title, "upper center")
    for ax in panels[len(spectra) :]:
        ax.remove()
    note = "; the axis is linear within ± the noise floor, logarithmic outside" if symlog else ""
    figure.supxlabel(f"counts at τ, the noise floor of each matrix{note}", fontsize=10)
    return figure


def plot_ranks(spectra: Mapping[str, Mapping[str, SpectrumPanel]]) -> Figure:
    """Draw the eigenvalues of several matrices by rank, both axes logarithmic.

    Args:
        spectra: by the titles of their panels and by the names of the matrices, at least one.
    """
    rows = math.ceil(len(spectra) / 2)
    figure = new_figure(rows, 2)
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for ax, (title, matrices) in zip(panels, spectra.items(), strict=False):
        for i, (name, found) in enumerate(matrices.items()):
            style = {"color": SERIES[i % len(SERIES)], "lw": 1.5}
            values, floor = found.eigenvalues, found.noise_floor
            above, below = values[values > floor][::-1], -values[values < -floor]
            ranks = range(1, len(above) + 1)
            ax.plot(ranks, above, label=f"{name}: {len(above):,} > τ, {len(below):,} < −τ", **style)
            ax.plot(range(1, len(below) + 1), below, ls="--", **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("rank")
        ax.set_ylabel("|eigenvalue λ|")
        ax.grid(alpha=0.25)
        _head(ax, title, "upper right")
    for ax in panels[len(spectra) :]:
        ax.remove()
    floors = [found.noise_floor for panel in spectra.values() for found in panel.values()]
    figure.supxlabel(
        "solid: positive eigenvalues, from the largest; dashed: negative ones, from the most"
        f" negative; those beyond τ,\nthe noise floor of each matrix, {short(min(floors))} to"
        f" {short(max(floors))}; layers: diagonal blocks of the Hessian",
        fontsize=10,
    )
    return figure


def _thin_ticks(ax: Axes, noise_floor: float) -> None:
    """Leave out the ticks of a symlog axis whose numbers would run into that at 0."""
    left, right = ax.get_xlim()
    ticks = [t for t in ax.xaxis.get_majorticklocs() if t == 0 or abs(t) > 1e3 * noise_floor]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.set_xlim(left, right)


def _head(ax: Axes, title: str, place: Literal["upper center", "upper right"]) -> None:
    """Name a panel, and explain its lines in room made above them."""
    ax.set_title(title, fontsize=10)
    bottom, top = ax.get_ylim()
    lines = len(ax.get_legend_handles_labels()[1])
    ax.set_ylim(bottom, top * (top / bottom) ** (0.1 * lines))
    ax.legend(loc=place, fontsize=8)
