"""The Lanczos recurrence for a block of independent start vectors that advance together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import Tensor

from hvpspec.errors import ComputationError, InputError
from hvpspec.linalg.memory import (
    available_memory,
    give_back_freed,
    on_disk,
    require_memory,
)
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import require_count
from hvpspec.linalg.ranks import ALONE, Ranks
from hvpspec.progress import Progress


@dataclass(frozen=True)
class LanczosRun:
    """What m steps from one start vector z leave behind.

    With the basis Q (rows) and ``T = tridiag(betas[:-1], alphas, betas[:-1])`` there holds
    ``A Q^T = Q^T T + betas[-1] q e_m^T`` with the unit vector q = ``next_vector``.

    Attributes:
        alphas: diagonal of T, float64, shape (m,), on the CPU.
        betas: off-diagonal of T and, as the last entry, the norm of the residual, shape (m,).
        norm: Euclidean norm of z.
        exhausted: whether the residual is zero to round-off, so that T is A on an invariant
            subspace that contains z, and everything said of z is exact.
        basis: Q, shape (m, n), None if it was not kept. Of several processes each has its share of
            the columns, :meth:`hvpspec.linalg.ranks.Ranks.share`.
        next_vector: q, shape (n,), zero if exhausted, None if the basis was not kept; shared out
            in the same way.
    """

    alphas: Tensor
    betas: Tensor
    norm: float
    exhausted: bool
    basis: Tensor | None = field(default=None, repr=False)
    next_vector: Tensor | None = field(default=None, repr=False)

    @property
    def scale(self) -> float:
        """The size of the products, by which a breakdown is judged."""
        return float((self.alphas.abs() + self.betas).max())

    @property
    def T(self) -> Tensor:
        """The tridiagonal matrix, shape (m, m)."""
        off = self.betas[:-1]
        return torch.diag(self.alphas) + torch.diag(off, 1) + torch.diag(off, -1)


def lanczos(
    A: SymmetricOperator,
    Z: Tensor,
    num_steps: int,
    *,
    reorthogonalize: bool = True,
    basis_folder: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[LanczosRun, ...]:
    """Run Lanczos from each column of a block, with one block product a step.

    Coefficients are accumulated in float64 whatever the operator's dtype. A residual below
    ``10 u ||T||`` is a breakdown: an invariant subspace has been found, and that run ends there.
    Where several processes share the operator, each keeps its share of every vector's entries.

    Args:
        A: the operator.
        Z: start vectors as columns, shape (n, k).
        num_steps: how many steps, at least 1; more than n are not made.
        reorthogonalize: keep every residual orthogonal to the whole basis, of ``k (m + 1) n``
            numbers, shared out among processes. Without it memory is O(k n) and copies of
            converged eigenvalues appear, which share the weight of one: good for densities, not for
            counts.
        basis_folder: where the basis lies on a disk instead of in memory, on CPUs.
        progress: called with the number of products done and the most there will be.

    Returns:
        One run per column.

    Raises:
        InputError: Z is no block, a start vector is zero, ``num_steps`` is too small, or the basis
            does not fit.

    Reference:
        Golub & Meurant, Matrices, Moments and Quadrature, ch. 4; Parlett, The Symmetric Eigenvalue
        Problem, ch. 13 and section 6.9 (twice is enough).

    Example:
        >>> from hvpspec import DenseOperator
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> run, = lanczos(A, torch.ones(3, 1), 3)
        >>> torch.linalg.eigvalsh(run.T).round(decimals=5), run.exhausted
        (tensor([1., 2., 4.], dtype=torch.float64), True)
    """
    require_count("num_steps", num_steps)
    if Z.ndim != 2:
        raise InputError(
            f"Z must hold start vectors as columns, shape (n, k), got {tuple(Z.shape)}"
        )
    n, k = Z.shape
    num_steps = min(num_steps, n)
    norms = torch.linalg.vector_norm(Z, dim=0, dtype=torch.float64)
    if bool((norms == 0).any()):
        raise InputError("a start vector is zero; Lanczos needs a direction to start from")
    kept = num_steps + 1 if reorthogonalize else 2
    ranks, own = A.ranks, A.ranks.share(n)
    share = ranks.share_size(n)
    # Row j of a probe's basis is q_j; without reorthogonalisation rows 0 and 1 take turns. Not
    # cleared, so that it takes memory only as it fills.
    shape = (k, kept, share)
    if basis_folder is None:
        _require_room(shape, A)
        give_back_freed()  # of which the basis, in one piece, could take nothing
        basis = torch.empty(shape, dtype=A.dtype, device=A.device)
    elif A.device.type == "cpu":
        basis = on_disk(shape, A.dtype, basis_folder)
    else:
        raise InputError(f"basis_folder is for operators on the CPU, and this is on {A.device}")
    for i in range(k):
        basis[i, 0] = Z[own, i].double() / norms[i]
    del Z  # the caller may have let go of it
    alphas = torch.zeros(k, num_steps, dtype=torch.float64)
    betas = torch.zeros(k, num_steps, dtype=torch.float64)
    num_done = [0] * k
    ended = [False] * k
    scales = [0.0] * k
    done = 0

    for j in range(num_steps):
        active = [i for i in range(k) if not ended[i]]
        if not active:
            break
        q = basis[:, j % kept]
        Q = ranks.whole(q if len(active) == k else q[active], n)
        W = A.matmat(Q.T).T[:, own].contiguous()
        del Q
        done += len(active)
        for w, i in zip(W, active, strict=True):
            if j:
                w.sub_(basis[i, (j - 1) % kept], alpha=float(betas[i, j - 1]))
        diagonal = ranks.sums([dot(w, q[i]) for w, i in zip(W, active, strict=True)])
        for w, i, alpha in zip(W, active, diagonal, strict=True):
            w.sub_(q[i], alpha=alpha)
        if reorthogonalize:
            off_diagonal = project_each_out_(W, [basis[i, : j + 1] for i in active], ranks)
        else:
            off_diagonal = lengths(W, ranks)
        for w, i, alpha, beta in zip(W, active, diagonal, off_diagonal, strict=True):
            alphas[i, j], betas[i, j], num_done[i] = alpha, beta, j + 1
            scales[i] = max(scales[i], abs(alpha) + beta)
            # After n steps a basis kept orthogonal is complete; one with copies is not.
            complete = reorthogonalize and j + 1 == n
            ended[i] = complete or beta <= breakdown_tolerance(A, scales[i])
            q_next = basis[i, (j + 1) % kept]
            if ended[i]:
                q_next.zero_()
            else:
                torch.div(w, beta, out=q_next)
        del W, w  # before the next product is made
        if progress is not None:
            progress(done, k * num_steps)
    return tuple(
        LanczosRun(
            alphas[i, : num_done[i]],
            betas[i, : num_done[i]],
            float(norms[i]),
            ended[i],
            basis[i, : num_done[i]] if reorthogonalize else None,
            basis[i, num_done[i]] if reorthogonalize else None,
        )
        for i in range(k)
    )


def _require_room(shape: tuple[int, int, int], A: SymmetricOperator) -> None:
    """Raise InputError where a basis of k x m vectors does not fit, and say what would."""
    k, m, length = shape
    vectors = available_memory(A.device) // max(1, length * A.dtype.itemsize)
    steps, probes = vectors // k - 1, vectors // m
    fits = [f"num_steps={steps}"] * (steps > 0)
    fits += [f"{probes} probes at a time (block_size={probes})"] * (0 < probes < k)
    others = "reorthogonalize=False, or a basis_folder on a disk"
    remedy = f"{' or '.join(fits)}, which fit, or {others}" if fits else others
    with A.ranks.together():
        require_memory(
            k * m * length * A.dtype.itemsize,
            f"a Lanczos basis of {k} x {m} vectors of length {length}",
            A.device,
            remedy,
        )


def dot(x: Tensor, y: Tensor) -> float:
    """``<x, y>`` of two vectors, accumulated in float64 without copies of all of them."""
    pieces = zip(torch.split(x, _piece(x)), torch.split(y, _piece(y)), strict=True)
    return float(sum(a.double() @ b.double() for a, b in pieces))


def norm(x: Tensor) -> float:
    """The Euclidean norm of all entries, accumulated in float64 without a copy of all of them."""
    pieces = (piece.double() for piece in torch.split(x.flatten(), _piece(x)))
    return math.sqrt(sum(a @ a for a in pieces))


def _piece(x: Tensor) -> int:
    """Entries converted at once: few enough for a CPU's cache, and many for each call to a GPU."""
    return 2**16 if x.device.type == "cpu" else 2**24


def require_scale(norm: float, dtype: torch.dtype) -> None:
    """Raise ComputationError where lengths of products and of their round-off are not to be had.

    They are roots of sums of squares in float64, which underflow or overflow. Products below the
    smallest normal number of their own type are rounded by more than ``u`` times their size. Zero
    is exact.
    """
    double = torch.finfo(torch.float64)
    most = math.sqrt(double.max) * double.eps
    least = max(1 / most, torch.finfo(dtype).smallest_normal)
    if norm != 0 and not least <= norm <= most:
        raise ComputationError(
            f"products of size {norm:.0e} are out of range, since they or their squares underflow "
            f"or overflow in {dtype}; scale the matrix, or the loss"
        )


def breakdown_tolerance(A: SymmetricOperator, scale: float) -> float:
    """The residual norm that is round-off of products of size ``scale``."""
    return 10 * A.unit_roundoff * scale


def project_out_(w: Tensor, basis: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Make a vector, or rows, orthogonal to orthonormal rows, in place.

    Classical Gram-Schmidt; a second pass is made where the first removed more of ``w`` than it
    left, so that its round-off is no longer small beside it (Kahan and Parlett: twice is enough).

    Args:
        w: shape (n,) or (k, n).
        basis: orthonormal rows, shape (m, n).
        ranks: the processes, each of which has its share of the columns of both.

    Returns:
        The coefficients that were removed, shape (m,) or (m, k).
    """
    removed = _project_once_(w, basis, ranks)
    if norm(removed) > length(w, ranks):
        removed += _project_once_(w, basis, ranks)
    return removed


def project_each_out_(W: Tensor, bases: Sequence[Tensor], ranks: Ranks = ALONE) -> list[float]:
    """Make each row orthogonal to orthonormal rows of its own, like :func:`project_out_`.

    Args:
        W: shape (k, n).
        bases: for each row of W, shape (m, n).
        ranks: the processes, each of which has its share of the columns of all.

    Returns:
        The norms of what is left of the rows.
    """
    left, again = [0.0] * len(W), list(range(len(W)))
    for _ in range(2):
        removed = ranks.sum_(torch.stack([bases[i] @ W[i] for i in again]))
        for i, coefficients in zip(again, removed, strict=True):
            W[i].addmv_(bases[i].T, coefficients, alpha=-1)
        for i, x in zip(again, lengths([W[i] for i in again], ranks), strict=True):
            left[i] = x
        again = [i for i, x in zip(again, removed, strict=True) if norm(x) > left[i]]
        if not again:
            break
    return left


def length(w: Tensor, ranks: Ranks = ALONE) -> float:
    """The norm of all entries, of which each process has a share."""
    return lengths([w], ranks)[0]


def lengths(rows: Iterable[Tensor], ranks: Ranks) -> list[float]:
    """The norms of some vectors, of which each process has a share."""
    own = [norm(w) for w in rows]
    return own if ranks.size == 1 else [math.sqrt(s) for s in ranks.sums([x**2 for x in own])]


def _project_once_(w: Tensor, basis: Tensor, ranks: Ranks) -> Tensor:
    """One pass of classical Gram-Schmidt: ``w -= basis^T (basis w)``."""
    removed = ranks.sum_(basis @ w.mT if w.ndim == 2 else basis @ w)
    if w.ndim == 2:
        w.addmm_(removed.mT, basis, alpha=-1)
    else:
        w.addmv_(basis.T, removed, alpha=-1)
    return removed
