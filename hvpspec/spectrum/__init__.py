"""The questions a user asks of an operator, each answered by a frozen result.

The Morse index counts the directions that go down, at a resolution, with a proof where there is
one. The spectral measure gives densities, counts and traces of functions from one run. Everything
here rests on ``linalg`` alone.
"""

from hvpspec.spectrum.bulk import Outlier, Outliers, split_eigenvalues
from hvpspec.spectrum.certified import Certified
from hvpspec.spectrum.exact import Exact, Inertia
from hvpspec.spectrum.matrix_free import Filtered, Quadrature
from hvpspec.spectrum.measure import spectral_measure
from hvpspec.spectrum.morse import index
from hvpspec.spectrum.results import (
    IndexCurve,
    IndexResult,
    Rung,
    describe_gradient,
    relative_decrease,
)
from hvpspec.spectrum.slq import CountResult, SpectralMeasure
from hvpspec.spectrum.smoothing import Density, Distribution, LogDensity

__all__ = [
    "Certified",
    "CountResult",
    "Density",
    "Distribution",
    "Exact",
    "Filtered",
    "IndexCurve",
    "IndexResult",
    "Inertia",
    "LogDensity",
    "Outlier",
    "Outliers",
    "Quadrature",
    "Rung",
    "SpectralMeasure",
    "describe_gradient",
    "index",
    "relative_decrease",
    "spectral_measure",
    "split_eigenvalues",
]
