"""Exact answers from a matrix in memory: all eigenvalues, and the inertia by LDL^T."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from scipy.sparse.linalg import eigsh
from torch import Tensor

from hvpspec.errors import ComputationError, InputError, NonFiniteError
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.operator import SymmetricOperator, as_operator
from hvpspec.linalg.tiles import largest_entry
from hvpspec.results import Result

#: Where the largest entry lies within 1 / _FAR and _FAR, squares of all that counts are in range.
_FAR = 2.0**256


@dataclass(frozen=True, repr=False)
class InertiaResult(Result):
    """How many eigenvalues lie below ``-tau``, within ``[-tau, tau]`` and above ``tau``."""

    negative: int
    zero: int
    positive: int
    tau: float


def eigvalsh(A: SymmetricOperator | Tensor) -> Tensor:
    """All eigenvalues in float64, from the dense matrix.

    Rows and columns that are exactly zero are taken out first; each is an exact zero eigenvalue.

    Args:
        A: an operator, assembled in float64 where it can be, or a symmetric matrix of shape (n, n).

    Returns:
        The eigenvalues in ascending order, float64, shape (n,), on the CPU.

    Raises:
        InputError: the matrix is not symmetric or does not fit into memory.
        ComputationError: an eigenvalue is larger than float64 can hold.

    Example:
        >>> eigvalsh(torch.diag(torch.tensor([2.0, 0.0, -1.0])))
        tensor([-1.,  0.,  2.], dtype=torch.float64)
    """
    matrix = dense_float64(A)
    unit = bring_into_range_(matrix)
    eigenvalues = block_eigvalsh(*live_block(matrix))
    in_range(float(eigenvalues[[0, -1]].abs().max()), unit)
    return eigenvalues * unit


def inertia(A: SymmetricOperator | Tensor, tau: float = 0.0) -> InertiaResult:
    """Count the eigenvalues below ``-tau`` and above ``tau`` by two LDL^T factorisations.

    By Sylvester's law of inertia the negative pivots of ``A + tau I`` number the eigenvalues below
    ``-tau``, and the positive pivots of ``A - tau I`` those above ``tau``. The counts are exact for
    a matrix within a small multiple of ``n u ||A||`` of the given one (backward stability of
    Bunch-Kaufman pivoting), so choose ``tau`` above that, as :func:`hvpspec.index` does by default.

    At ``tau = 0`` these are the raw signs of the computed pivots. Only those of eigenvalues beyond
    ``n u ||A||`` are certain: in a singular matrix each zero eigenvalue is counted as negative,
    zero or positive as round-off has it, and another order of the rows may give other counts.

    Args:
        A: an operator, assembled in float64 where it can be, or a symmetric matrix of shape (n, n).
        tau: the resolution, in units of the eigenvalues, at least 0.

    Returns:
        The three counts, which add up to n.

    Raises:
        InputError: the matrix is not symmetric or does not fit into memory, or ``tau`` is negative.

    Reference:
        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 11; LAPACK ``dsytrf``.

    Example:
        >>> inertia(torch.diag(torch.tensor([2.0, 0.0, -1.0])), tau=0.5)
        InertiaResult(negative=1, zero=1, positive=1, tau=0.5)
    """
    require_tau(tau)
    matrix = dense_float64(A)
    shift = in_units(tau, bring_into_range_(matrix))
    live, _ = live_block(matrix)
    negative, pivots_zero_below, _ = pivot_signs(live, shift)
    if shift == 0:
        positive = live.shape[0] - negative - pivots_zero_below
    else:
        _, _, positive = pivot_signs(live, -shift)
    return InertiaResult(negative, len(matrix) - negative - positive, positive, tau)


def block_eigvalsh(live: Tensor, num_zero_rows: int) -> Tensor:
    """The eigenvalues of a matrix given as its block without zero rows, and their number."""
    # LAPACK's driver works on a copy of the matrix.
    require_memory(live.numel() * 8, "the eigenvalue computation")
    zeros = torch.zeros(num_zero_rows, dtype=torch.float64)
    return torch.cat([torch.linalg.eigvalsh(live), zeros]).sort().values


def dense_float64(A: SymmetricOperator | Tensor) -> Tensor:
    """Return the matrix of ``A`` in float64 on the CPU, assembled in float64 where possible."""
    return as_operator(A).in_float64().to_dense().to("cpu", torch.float64)


def bring_into_range_(A: Tensor) -> float:
    """Divide a float64 matrix, in place, so that no square of what counts is out of range.

    The divisor is a power of two, so that every entry stays exact but those below ``1e-307`` of the
    largest: what they lose is less than the round-off of anything done with the matrix.

    Returns:
        The divisor; 1 unless the largest entry is very large or very small.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
    """
    largest = float(largest_entry(A))
    if not math.isfinite(largest):
        raise NonFiniteError("the matrix contains NaN or infinity; scale it, or the loss")
    if largest == 0 or 1 / _FAR <= largest <= _FAR:
        return 1.0
    unit = math.ldexp(1.0, math.frexp(largest)[1] - 1)
    A /= unit
    return unit


def in_units(x: float, unit: float) -> float:
    """A number in the units of a matrix that was brought into range.

    What would overflow lies beyond all eigenvalues, which are at most ``n _FAR``, and so does what
    is returned for it.
    """
    return min(max(x / unit, -(_FAR**2)), _FAR**2)


def in_range(norm: float, unit: float) -> float:
    """``norm * unit``, the norm of a matrix before it was brought into range.

    Raises:
        ComputationError: it is larger than float64 can hold.
    """
    if math.isinf(norm * unit):
        raise ComputationError(
            f"the largest eigenvalue, {norm:.1f} times {unit:.1e}, is out of float64's range; "
            "scale the matrix, or the loss"
        )
    return norm * unit


def assembly_error(A: SymmetricOperator, matrix: Tensor, unit: float = 1.0) -> float:
    """Estimate ``||matrix - A / unit||_2`` from products with random unit vectors.

    For an error E without structure, ``||E z||`` of a random unit vector is half of ``||E||_2``;
    the largest of four is doubled once more for safety. An assembly by unit vectors and a product
    with a random one add up the same terms in different orders, so their difference shows the
    round-off of both.

    Args:
        A: the operator.
        matrix: float64, on the CPU, shape (n, n).
        unit: a power of two, by which the matrix was divided.
    """
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(A.shape[0], 4, generator=generator, dtype=torch.float64)
    Z = (Z / torch.linalg.vector_norm(Z, dim=0)).to(A.dtype)
    # About half of the unit's exponent is taken out of the vectors and the rest out of their
    # products, so that neither leave the range of float64.
    first = math.ldexp(1.0, -(math.frexp(unit)[1] // 2))
    product = A.matmat((Z * first).to(A.device)).to("cpu", torch.float64) / (unit * first)
    difference = matrix @ Z.double() - product
    return 4 * float(torch.linalg.vector_norm(difference, dim=0).max())


def live_block(A: Tensor) -> tuple[Tensor, int]:
    """Return ``A`` (n, n) without its exactly zero rows and columns, and their number."""
    live = A.any(0)
    num_live = int(live.sum())
    return (A if num_live == len(A) else A[live][:, live]), len(A) - num_live


def spectral_norm(A: Tensor) -> float:
    """``||A||_2`` of a symmetric matrix to about a per cent, by Lanczos (ARPACK)."""
    n = A.shape[0]
    if n <= 20:  # ARPACK's default basis would span the whole space
        return float(torch.linalg.matrix_norm(A, 2)) if n else 0.0
    start = np.random.default_rng(0).standard_normal(n)
    extreme = eigsh(A.numpy(), k=1, which="LM", v0=start, tol=1e-2, return_eigenvectors=False)
    return float(abs(extreme[0]))


def pivot_signs(A: Tensor, shift: float) -> tuple[int, int, int]:
    """Count the negative, zero and positive eigenvalues of D where ``A + shift I = L D L^T``."""
    n = A.shape[0]
    if n == 0:
        return 0, 0, 0
    require_memory(n * n * 8, f"the LDL^T factorisation of a {n} x {n} matrix")
    # The transposed view is in LAPACK's column order, and a symmetric matrix is its own transpose.
    shifted = A.numpy().T.copy(order="F")
    shifted[np.diag_indices(n)] += shift
    work_size, info = lapack.dsytrf_lwork(n, lower=1)
    D, pivots, info = lapack.dsytrf(shifted, lower=1, lwork=int(work_size), overwrite_a=1)
    if info < 0:
        raise ComputationError(f"LAPACK dsytrf refused argument {-info}; please report this")
    # info > 0 says that a pivot is exactly zero: a singular matrix, which is counted, not an error.
    diagonal = D.diagonal()
    single = pivots > 0
    # A 2 x 2 pivot of Bunch-Kaufman is indefinite by construction: one eigenvalue of each sign.
    num_double = (n - int(single.sum())) // 2
    negative = int((diagonal[single] < 0).sum()) + num_double
    zero = int((diagonal[single] == 0).sum())
    return negative, zero, n - negative - zero


def require_tau(tau: float) -> None:
    """Raise InputError unless ``tau`` is a finite number, at least 0."""
    try:
        sound = math.isfinite(tau) and tau >= 0
    except (TypeError, ValueError):  # no number at all, or more than one
        sound = False
    if not sound:
        raise InputError(f"tau must be a finite number of at least 0, got {tau!r}")
