"""Algorithms on a symmetric operator.

Everything here sees a matrix only through its products, its size, dtype and device, except for the
dense routines, which give the exact eigenvalues and inertia. Nothing here knows of networks, files
or plots.
"""

from hvpspec.linalg.dense import InertiaResult, eigvalsh, inertia
from hvpspec.linalg.estimates import Estimate, diagonal, frobenius_norm, trace
from hvpspec.linalg.extremes import Eigenpairs, eigsh
from hvpspec.linalg.krylov import LanczosRun, lanczos
from hvpspec.linalg.noise import Noise, measure_noise
from hvpspec.linalg.operator import (
    AffineOperator,
    DenseOperator,
    FunctionOperator,
    IndexBound,
    PointFacts,
    PreconditionedOperator,
    SymmetricOperator,
    WrappedOperator,
)
from hvpspec.linalg.probes import draw_probes
from hvpspec.linalg.quadrature import Rule, gauss, gauss_radau, mass_below

__all__ = [
    "AffineOperator",
    "DenseOperator",
    "Eigenpairs",
    "Estimate",
    "FunctionOperator",
    "IndexBound",
    "InertiaResult",
    "LanczosRun",
    "Noise",
    "PointFacts",
    "PreconditionedOperator",
    "Rule",
    "SymmetricOperator",
    "WrappedOperator",
    "diagonal",
    "draw_probes",
    "eigsh",
    "eigvalsh",
    "frobenius_norm",
    "gauss",
    "gauss_radau",
    "inertia",
    "lanczos",
    "mass_below",
    "measure_noise",
    "trace",
]
