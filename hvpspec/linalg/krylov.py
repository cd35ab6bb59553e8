"""Lanczos: a recurrence for independent start vectors, and the Krylov space of a block.

Both make each product orthogonal first to what the recurrence says, whose coefficients are those of
``T``, and then to the whole basis (:func:`project_out_`), which removes round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.memory import give_back_freed, on_disk, require_memory
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import require_count
from hvpspec.linalg.ranks import ALONE, Ranks
from hvpspec.progress import Progress
from hvpspec.results import Result, plain


@dataclass(frozen=True, eq=False, repr=False)
class LanczosRun(Result):
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

    def _content(self) -> dict[str, Any]:
        """What ``repr`` shows, in full: a basis is far too large for plain data."""
        return {name: plain(value) for name, value in self._brief().items()}


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
    A.expect(k * num_steps, k)
    # Row j of a basis is q_j; the recurrence alone needs two, which take turns.
    kept = num_steps + 1 if reorthogonalize else 2
    ranks, own = A.ranks, A.ranks.share(n)
    bases = _lanczos_bases(A, k, kept, basis_folder)
    for i in range(k):
        bases[i, 0] = Z[own, i].double() / norms[i]
    del Z  # the caller may have let go of it
    alphas = torch.zeros(k, num_steps, dtype=torch.float64)
    betas = torch.zeros(k, num_steps, dtype=torch.float64)
    num_done, ended, scales = [0] * k, [False] * k, [0.0] * k

    for j in range(num_steps):
        active = [i for i in range(k) if not ended[i]]
        if not active:
            break
        q, before, following = (bases[:, (j + shift) % kept] for shift in (0, -1, 1))
        W = _multiply(A, q if len(active) == k else q[active])
        for w, i in zip(W, active, strict=True):
            # Each term is taken off what the one before left (Paige 1972): of all orders the one
            # in which round-off grows least.
            if j:
                w.sub_(before[i], alpha=float(betas[i, j - 1]))
            alpha = ranks.sum(dot(w, q[i]))
            w.sub_(q[i], alpha=alpha)
            if reorthogonalize:
                _, beta = project_out_(w, bases[i, : j + 1], ranks)
            else:
                beta = norm(w, ranks)
            alphas[i, j], betas[i, j], num_done[i] = alpha, beta, j + 1
            scales[i] = max(scales[i], abs(alpha) + beta)
            # After n steps a basis kept orthogonal is complete; one with copies is not.
            complete = reorthogonalize and j + 1 == n
            ended[i] = complete or beta <= breakdown_tolerance(A, scales[i])
            if ended[i]:
                following[i].zero_()
            else:
                torch.div(w, beta, out=following[i])
        del W, w  # before the next product is made
        if progress is not None:
            progress(sum(num_done), k * num_steps)
    return tuple(
        LanczosRun(
            alphas[i, :m],
            betas[i, :m],
            float(norms[i]),
            ended[i],
            bases[i, :m] if reorthogonalize else None,
            bases[i, m] if reorthogonalize else None,
        )
        for i, m in enumerate(num_done)
    )


class KrylovSpace:
    """The block Krylov space of ``B = P A P``, where P projects out given directions D.

    Rows of V are an orthonormal basis, ``T = V A V^T`` the compression, and

        ``A V^T = V^T T + next^T coupling + D^T C``,   with   ``C = D A V^T``,

    where the rows of ``next``, at most as many as start vectors, are what the next step multiplies.
    All rows are orthogonal to each other and to D. Directions whose residual is round-off are
    dropped from ``next``, so that the identity is that of an operator which differs from A by no
    more than ``dropped``; when none is left, V spans an invariant subspace of it. Where several
    processes share the operator, each keeps its share of the columns of D, V and ``next``,
    :meth:`hvpspec.linalg.ranks.Ranks.share`.

    Args:
        A: the operator.
        start: start vectors as columns, shape (n, b); they need not be orthogonal to D.
        capacity: the most rows of V.
        deflated: D, orthonormal rows, shape (d, n), of which each process has its share.
        limit: what a user would make smaller to have a smaller basis.

    Attributes:
        start: the projected start vectors in the basis, float64, shape (first block, b).
        dropped: what A differs by, in the 2-norm, from an operator without the residuals dropped.

    Raises:
        InputError: the basis does not fit into memory, or the start vectors lie in the span of D.

    Reference:
        Golub & Underwood (1977), the block Lanczos method; Stathopoulos & Saad on thick restarts.
    """

    def __init__(
        self,
        A: SymmetricOperator,
        start: Tensor,
        capacity: int,
        deflated: Tensor | None = None,
        *,
        limit: str = "capacity",
    ) -> None:
        n, width = start.shape
        self._A, self._ranks = A, A.ranks
        share = self._ranks.share_size(n)
        if deflated is None:
            deflated = torch.empty(0, share, dtype=A.dtype, device=A.device)
        self.deflated = deflated
        # No more rows exist than the complement of D has dimensions.
        self.capacity = min(capacity, n - len(deflated))
        rows = self.capacity + width

        def remedy(free: int) -> str:
            fit = free // max(1, share * A.dtype.itemsize)
            return f"a smaller {limit} (a basis of {fit} fits), or fewer parameters (params=...)"

        what = f"a basis of {rows} vectors of length {share}"
        self._basis = _in_memory((rows, share), A, what, remedy)
        # Few runs fill the space before they have their answer.
        A.expect(self.capacity // 4, width)
        self._T = torch.zeros(rows, rows, dtype=torch.float64)
        self._C = torch.zeros(len(deflated), rows, dtype=torch.float64)
        self._scale = self.dropped = 0.0
        # Rows of the basis: those before size are V, those from there to _known are next, and those
        # before _local are coupled to no product that is still to be made.
        self._local = self.size = self._known = 0
        block = start.T[:, self._ranks.share(n)].to(A.dtype).clone()
        norms = torch.linalg.vector_norm(start, dim=0, dtype=torch.float64)
        block /= torch.where(norms == 0, 1, norms)[:, None].to(A.dtype)
        # A direction of D leaves nothing but the round-off of its projection.
        self.start = self._append(block, 100 * A.unit_roundoff)
        if not len(self.start):
            raise InputError("the start vectors lie in the span of what is deflated")
        self.start *= norms.cpu()
        self.dropped = 0.0  # of start vectors nothing is claimed

    @property
    def width(self) -> int:
        """How many products the next step takes; 0 when the space is exhausted."""
        return self._known - self.size

    @property
    def full(self) -> bool:
        """Whether no further step is possible."""
        return self.width == 0 or self._known > self.capacity

    @property
    def T(self) -> Tensor:
        """The compression, float64, shape (size, size)."""
        return self._T[: self.size, : self.size]

    @property
    def coupling(self) -> Tensor:
        """How the residual depends on V, float64, shape (width, size)."""
        return self._T[self.size : self._known, : self.size]

    @property
    def C(self) -> Tensor:
        """The compression's coupling to the deflated directions, float64, shape (d, size)."""
        return self._C[:, : self.size]

    def expand(self) -> int:
        """Multiply ``next`` and extend the basis; return the number of products."""
        rows, before = slice(self.size, self._known), slice(self._local, self.size)
        Q = self._basis[rows]
        W = _multiply(self._A, Q)
        self._scale = max(self._scale, *(norm(w, self._ranks) for w in W))
        if len(self.deflated):
            for row, w in enumerate(W, start=self.size):
                self._C[:, row] = project_out_(w, self.deflated, self._ranks)[0]
        # The recurrence, as in `lanczos`: what the last step left over, or of a restart what
        # couples to all that was kept; then the diagonal block.
        W -= self._T[before, rows].T.to(W) @ self._basis[before]
        diagonal = torch.tensor([[dot(w, q) for q in Q] for w in W], dtype=torch.float64)
        diagonal = self._ranks.sum_(diagonal.to(W.device))
        W -= diagonal.to(W.dtype) @ Q
        # Its two halves, which are computed apart, differ by round-off.
        self._T[rows, rows] = ((diagonal + diagonal.T) / 2).cpu()
        self._local, self.size = self.size, self._known
        R = self._append(W, breakdown_tolerance(self._A, self._scale))
        self._T[self.size : self._known, rows] = R
        self._T[rows, self.size : self._known] = R.T
        return len(W)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in ascending order, their coordinates and their residual norms.

        Returns:
            theta, shape (size,); S, shape (size, size), of which the columns are eigenvectors of T;
            and ``||B x - theta x||`` for each Ritz vector x, shape (size,).
        """
        theta, S = torch.linalg.eigh(self.T)
        return theta, S, torch.linalg.vector_norm(self.coupling @ S, dim=0)

    def rotate(self, S: Tensor) -> Tensor:
        """The vectors with coordinates S, shape (size, k), as rows, shape (k, share of n)."""
        return S.T.to(self._basis) @ self._basis[: self.size]

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Keep only some Ritz vectors, with values ``theta`` (k,) and coordinates S (size, k)."""
        k, width = len(theta), self.width
        X, coupling, C = self.rotate(S), self.coupling @ S, self.C @ S
        following = self._basis[self.size : self._known].clone()
        self._basis[:k], self._basis[k : k + width] = X, following
        self._T.zero_()
        self._T[range(k), range(k)] = theta
        self._T[k : k + width, :k] = coupling
        self._T[:k, k : k + width] = coupling.T
        self._C[:, :k] = C
        self._local, self.size, self._known = 0, k, k + width

    def _append(self, W: Tensor, tolerance: float) -> Tensor:
        """Put rows behind the basis, orthonormal to it and to D; return W in terms of them.

        Rows of W with a remainder below ``tolerance``, and those beyond the dimension, are dropped.
        """
        begin = self._known
        R = torch.zeros(len(W), len(W), dtype=torch.float64)
        for i, w in enumerate(W):
            removed, left = project_out_(w, self._basis[: self._known], self._ranks)
            # Once more, now that w is shorter: the round-off of the first projection counts in
            # proportion to what is left.
            if len(self.deflated):
                _, left = project_out_(w, self.deflated, self._ranks)
            added = self._known - begin
            R[:added, i] = removed[begin:]
            if left <= tolerance or len(self.deflated) + self._known == self._A.shape[0]:
                # V is orthogonal to it, so that the columns of all of these make a matrix of norm
                # at most this, and with its transpose too.
                self.dropped = math.hypot(self.dropped, left)
                continue
            torch.div(w, left, out=self._basis[self._known])
            R[added, i] = left
            self._known += 1
        return R[: self._known - begin]


def project_out_(w: Tensor, basis: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, float]:
    """Make a vector (n,) orthogonal to orthonormal rows (m, n), in place.

    Classical Gram-Schmidt: unlike the modified one it takes two products with a matrix instead of
    m dots, and one message between processes, each of which has its share of the entries of both.
    Each pass leaves round-off of the size of what it removed, so a second one is made where the
    first removed more than it left (Kahan and Parlett: twice is enough).

    Returns:
        The coefficients that were removed, shape (m,), and the norm of what is left.
    """
    removed = ranks.sum_(basis @ w)
    w.addmv_(basis.T, removed, alpha=-1)
    left = norm(w, ranks)
    if norm(removed) > left:
        again = ranks.sum_(basis @ w)
        w.addmv_(basis.T, again, alpha=-1)
        removed, left = removed + again, norm(w, ranks)
    return removed, left


def breakdown_tolerance(A: SymmetricOperator, scale: float) -> float:
    """The residual norm that is round-off of products of size ``scale``."""
    return 10 * A.unit_roundoff * scale


def dot(x: Tensor, y: Tensor) -> float:
    """``<x, y>`` of two vectors, accumulated in float64 without copies of all of them."""
    # Few enough entries at once for a CPU's cache, and many for each call to a GPU.
    piece = 2**16 if x.device.type == "cpu" else 2**24
    pieces = zip(torch.split(x, piece), torch.split(y, piece), strict=True)
    return float(sum(a.double() @ b.double() for a, b in pieces))


def norm(w: Tensor, ranks: Ranks = ALONE) -> float:
    """The Euclidean norm of all entries, of which each process may have a share."""
    return math.sqrt(ranks.sum(dot(w.flatten(), w.flatten())))


def _multiply(A: SymmetricOperator, rows: Tensor) -> Tensor:
    """This process's share of the products with vectors of which it has a share, as rows."""
    n = A.shape[0]
    return A.matmat(A.ranks.whole(rows, n).T).T[:, A.ranks.share(n)].contiguous()


def _in_memory(
    shape: tuple[int, ...], A: SymmetricOperator, what: str, remedy: Callable[[int], str]
) -> Tensor:
    """Memory for vectors; it is not cleared, so that it is taken only as it fills."""
    with A.ranks.together():
        require_memory(math.prod(shape) * A.dtype.itemsize, what, A.device, remedy)
    give_back_freed()  # of which a basis, in one piece, could take nothing
    return torch.empty(shape, dtype=A.dtype, device=A.device)


def _lanczos_bases(
    A: SymmetricOperator, k: int, m: int, folder: str | PathLike[str] | None
) -> Tensor:
    """Memory for k bases of m vectors, or a file; where they do not fit, say what would."""
    share = A.ranks.share_size(A.shape[0])
    if folder is not None:
        if A.device.type != "cpu":
            raise InputError(f"basis_folder is for operators on the CPU, and this is on {A.device}")
        return on_disk((k, m, share), A.dtype, folder)

    def remedy(free: int) -> str:
        vectors = free // max(1, share * A.dtype.itemsize)
        steps, probes = vectors // k - 1, vectors // m
        fits = [f"num_steps={steps}"] * (steps > 0)
        fits += [f"{probes} probes at a time (block_size={probes})"] * (0 < probes < k)
        others = "reorthogonalize=False, or a basis_folder on a disk"
        return f"{' or '.join(fits)}, which fit, or {others}" if fits else others

    what = f"a Lanczos basis of {k} x {m} vectors of length {share}"
    return _in_memory((k, m, share), A, what, remedy)
