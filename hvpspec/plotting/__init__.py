"""Pictures of spectra, of densities and of indices, by resolution and along training.

Figures are made without pyplot, so nothing here opens a window or keeps state.
"""

from hvpspec.plotting.density import plot_density
from hvpspec.plotting.figures import PICTURE_SUFFIXES, check_picture, save_figure
from hvpspec.plotting.index_curve import plot_index_curve
from hvpspec.plotting.regularised import LambdaCurve, plot_regularised
from hvpspec.plotting.solutions import SolutionMap, plot_solutions
from hvpspec.plotting.spectra import SpectrumPanel, plot_ranks, plot_spectra
from hvpspec.plotting.spectrum import (
    Scale,
    SpectrumHistogram,
    draw_spectrum,
    plot_spectrum,
    spectrum_histogram,
)
from hvpspec.plotting.trajectories import Trajectory, plot_trajectories

__all__ = [
    "PICTURE_SUFFIXES",
    "LambdaCurve",
    "Scale",
    "SolutionMap",
    "SpectrumHistogram",
    "SpectrumPanel",
    "Trajectory",
    "check_picture",
    "draw_spectrum",
    "plot_density",
    "plot_index_curve",
    "plot_ranks",
    "plot_regularised",
    "plot_solutions",
    "plot_spectra",
    "plot_spectrum",
    "plot_trajectories",
    "save_figure",
    "spectrum_histogram",
]
