"""What all pictures share: sizes, colours, the format of numbers, and writing to a file."""

from __future__ import annotations

import io
import math
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from hvpspec.files import PICTURE_SUFFIXES, check_target, write_atomically

Floats = NDArray[np.float64]

# Colour-blind readers can distinguish vermilion and blue; grey stands for round-off.
NEGATIVE, POSITIVE, NOISE = "#D55E00", "#0072B2", "#8C8C8C"
_PANEL = (9.0, 4.2)  # inches; at 110 dots per inch a picture is 990 pixels wide
_SMALL_PANEL = (5.2, 4.0)
_DPI = 110


class _ShownFigure(Figure):
    """A figure that a notebook displays without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def check_picture(path: str | PathLike[str]) -> None:
    """Raise InputError if a picture could not be written, before the work for it starts."""
    check_target(Path(path), PICTURE_SUFFIXES)


def save_figure(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure to a file, atomically.

    Args:
        figure: the figure.
        path: the file, whose ending, one of `PICTURE_SUFFIXES`, sets the format. An existing file
            is replaced.

    Raises:
        InputError: the ending is unknown, or the file cannot be written.
    """
    path = Path(path)
    check_picture(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    write_atomically(path, buffer.getvalue())


def new_figure(rows: int, columns: int = 1) -> Figure:
    """Return an empty figure with room for panels, which are narrower if side by side."""
    width, height = _PANEL if columns == 1 else _SMALL_PANEL
    figure = _ShownFigure((width * columns, height * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would attach a canvas that can draw
    return figure


def figure_of(ax: Axes | None) -> tuple[Figure, Axes]:
    """Return the figure of given axes, or a new figure with axes."""
    if ax is None:
        figure = new_figure(1)
        return figure, figure.subplots()
    return cast("Figure", ax.figure), ax


def plot_line(
    x: ArrayLike,
    y: ArrayLike,
    ends: tuple[ArrayLike, ArrayLike],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    ax: Axes | None = None,
) -> Figure:
    """Draw a curve within a band.

    Args:
        x: abscissae, ascending, shape (k,).
        y: ordinates of the curve, shape (k,).
        ends: lower and upper end of the band, shape (k,) each; NaN for none.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        log: whether the horizontal axis is logarithmic.
        ax: axes to draw into; None for a new figure.
    """
    figure, ax = figure_of(ax)
    ax.fill_between(x, *ends, color=POSITIVE, alpha=0.3, lw=0)
    ax.plot(x, y, color=POSITIVE, lw=1.4)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.set_xscale("log" if log else "linear")
    ax.grid(alpha=0.25)
    return figure


def tick_decades(ax: Axes, threshold: float) -> None:
    """Put ticks at 0 and at a few powers of ten on both sides, for a symmetric log axis."""
    left, right = ax.get_xlim()
    first = math.floor(math.log10(threshold)) + 1
    last = math.floor(math.log10(max(-left, right)))
    # At most five ticks on either side, so that their labels do not overlap.
    powers = 10.0 ** np.arange(last, first - 1, -max(1, math.ceil((last - first) / 4)))
    ticks = np.concatenate([-powers, [0.0], powers[::-1]])
    ax.xaxis.set_major_locator(FixedLocator(ticks[(left <= ticks) & (ticks <= right)].tolist()))
    ax.xaxis.set_minor_locator(NullLocator())


def short(x: float) -> str:
    """Format a number to two digits, with a power of ten instead of an exponent."""
    digits, _, exponent = f"{x:.2g}".partition("e")
    return rf"${digits}\times10^{{{int(exponent)}}}$" if exponent else digits
