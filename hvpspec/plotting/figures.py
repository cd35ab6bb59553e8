"""What all pictures share: size, colours, numbers in words, and how a file is written."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from hvpspec.files import check_target, write_atomically

#: File endings that `save_figure` can write.
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")

Floats = NDArray[np.float64]

# Vermilion and blue stay apart for colour-blind readers; grey is what means nothing.
NEGATIVE, POSITIVE, NOISE = "#D55E00", "#0072B2", "#8C8C8C"
#: Colours of further kinds, as far apart as two of them can be for all readers (Okabe and Ito).
SERIES = (POSITIVE, NEGATIVE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANEL = (9.0, 4.2)  # inches; at 110 dots per inch a picture is 990 pixels wide
_SMALL_PANEL = (5.2, 4.0)
_DPI = 110


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before the work for it starts.

    Args:
        path: the file; its ending chooses the format.

    Raises:
        InputError: unknown ending, no such folder, or no permission.
    """
    check_target(path, PICTURE_SUFFIXES)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its file's ending, whole or not at all.

    Args:
        figure: what to write.
        path: the file, ending in one of `PICTURE_SUFFIXES`; one that exists is replaced.

    Raises:
        InputError: unknown ending, or the file cannot be written.
    """
    check_picture(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    write_atomically(path, buffer.getvalue())


def new_figure(rows: int, columns: int = 1) -> Figure:
    """An empty figure with room for panels; side by side they are narrower."""
    width, height = _PANEL if columns == 1 else _SMALL_PANEL
    figure = Figure((width * columns, height * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def power_of_ten(x: float, _: int | None) -> str:
    """Label a tick at 0 or at a power of ten."""
    if x == 0:
        return "0"
    return f"${'-' if x < 0 else ''}10^{{{round(math.log10(abs(x)))}}}$"


def short(x: float) -> str:
    """A number to two digits, with a power of ten where Python would write an exponent."""
    digits, _, exponent = f"{x:.2g}".partition("e")
    return rf"${digits}\times10^{{{int(exponent)}}}$" if exponent else digits


def resolutions(taus: Sequence[float]) -> str:
    """In words, which resolutions several counts were made at; at least one."""
    low, high = short(min(taus)), short(max(taus))
    return f"τ = {low}" if low == high else f"τ from {low} to {high}"


def scale_counts(ax: Axes) -> None:
    """Put whole numbers at the ticks of the vertical axis."""
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
