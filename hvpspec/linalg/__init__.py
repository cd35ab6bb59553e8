"""Algorithms on a symmetric operator.

Everything here sees a matrix only through its products, its size, dtype and device, except for the
dense routines, which give the exact eigenvalues and inertia. Nothing here knows of networks, files
or plots.
"""

from hvpspec.linalg.dense import Inertia, eigvalsh, inertia
from hvpspec.linalg.operator import (
    DenseOperator,
    FunctionOperator,
    IndexBound,
    PointFacts,
    SymmetricOperator,
)

__all__ = [
    "DenseOperator",
    "FunctionOperator",
    "IndexBound",
    "Inertia",
    "PointFacts",
    "SymmetricOperator",
    "eigvalsh",
    "inertia",
]
