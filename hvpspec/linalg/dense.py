"""Exact answers from a matrix in memory: all eigenvalues, and the inertia by LDL^T."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from scipy.sparse.linalg import eigsh
from torch import Tensor

from hvpspec.errors import ComputationError, InputError
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.operator import SymmetricOperator, as_operator, require_scale
from hvpspec.linalg.tiles import largest_entry
from hvpspec.progress import Progress
from hvpspec.results import Result


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
        ComputationError: its entries are so small or large that their squares are no numbers.

    Example:
        >>> eigvalsh(torch.diag(torch.tensor([2.0, 0.0, -1.0])))
        tensor([-1.,  0.,  2.], dtype=torch.float64)
    """
    return block_eigvalsh(*live_block(dense_float64(A)))


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
        ComputationError: its entries are so small or large that their squares are no numbers.

    Reference:
        Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 11; LAPACK ``dsytrf``.

    Example:
        >>> inertia(torch.diag(torch.tensor([2.0, 0.0, -1.0])), tau=0.5)
        InertiaResult(negative=1, zero=1, positive=1, tau=0.5)
    """
    require_tau(tau)
    live, num_zero_rows = live_block(dense_float64(A))
    negative, zero, positive = pivot_signs(live, tau)
    if tau > 0:
        _, _, positive = pivot_signs(live, -tau)
    zero = num_zero_rows + len(live) - negative - positive
    return InertiaResult(negative, zero, positive, tau)


def block_eigvalsh(live: Tensor, num_zero_rows: int) -> Tensor:
    """The eigenvalues of a matrix given as its block without zero rows, and their number."""
    # LAPACK's driver works on a copy of the matrix.
    require_memory(live.numel() * 8, "the eigenvalue computation")
    zeros = torch.zeros(num_zero_rows, dtype=torch.float64)
    return torch.cat([torch.linalg.eigvalsh(live), zeros]).sort().values


def dense_float64(A: SymmetricOperator | Tensor, progress: Progress | None = None) -> Tensor:
    """The matrix of ``A`` on the CPU, assembled in float64 where possible, if it is in range."""
    matrix = as_operator(A).in_float64().to_dense(progress=progress).to("cpu", torch.float64)
    require_scale(float(largest_entry(matrix)), matrix.dtype)
    return matrix


def assembly_error(A: SymmetricOperator, matrix: Tensor) -> float:
    """Estimate ``||matrix - A||_2`` from products with random unit vectors.

    For an error E without structure, ``||E z||`` of a random unit vector is half of ``||E||_2``;
    the largest of four is doubled once more for safety. An assembly by unit vectors and a product
    with a random one add up the same terms in different orders, so their difference shows the
    round-off of both.
    """
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(A.shape[0], 4, generator=generator, dtype=torch.float64)
    Z = (Z / torch.linalg.vector_norm(Z, dim=0)).to(A.dtype)
    difference = matrix @ Z.double() - A.matmat(Z.to(A.device)).to("cpu", torch.float64)
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
