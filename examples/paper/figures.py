"""What the pictures share: size, colours and numbers in words."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Colours that are apart for all readers (Okabe and Ito).
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANEL, _WIDE_PANEL = (5.2, 4.0), (9.0, 4.2)  # inches


def new_figure(rows: int, columns: int) -> Figure:
    """An empty figure with room for panels; a single column is wide enough for the notes."""
    width, height = _WIDE_PANEL if columns == 1 else _PANEL
    figure = Figure((width * columns, height * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def colours_of(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label, in the order in which they first come."""
    return {label: SERIES[i % len(SERIES)] for i, label in enumerate(dict.fromkeys(labels))}


def short(x: float) -> str:
    """A number to two digits, with a power of ten where Python would write an exponent."""
    digits, _, exponent = f"{x:.2g}".partition("e")
    return rf"${digits}\times10^{{{int(exponent)}}}$" if exponent else digits


def interval(values: pd.Series) -> str:
    """From the least to the largest of some numbers, in words."""
    low, high = short(values.min()), short(values.max())
    return low if low == high else f"{low} to {high}"
