"""Pictures of spectra, densities and indices.

Figures are made without pyplot, so nothing here opens a window or keeps state.
"""

from hvpspec.files import PICTURE_SUFFIXES
from hvpspec.plotting.density import plot_density
from hvpspec.plotting.descent import plot_descent
from hvpspec.plotting.figures import check_picture, plot_line, save_figure
from hvpspec.plotting.index_curve import plot_index_curve
from hvpspec.plotting.spectrum import (
    Scale,
    SpectrumHistogram,
    draw_spectrum,
    plot_spectrum,
    spectrum_histogram,
)

__all__ = [
    "PICTURE_SUFFIXES",
    "Scale",
    "SpectrumHistogram",
    "check_picture",
    "draw_spectrum",
    "plot_density",
    "plot_descent",
    "plot_index_curve",
    "plot_line",
    "plot_spectrum",
    "save_figure",
    "spectrum_histogram",
]
