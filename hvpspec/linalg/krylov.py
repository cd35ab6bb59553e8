"""A growing orthonormal basis of a block Krylov space, and the operator compressed to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.memory import available_memory, require_memory
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.recurrence import breakdown_tolerance, length, lengths, project_out_


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
        self._A, self._ranks, self._own = A, A.ranks, A.ranks.share(n)
        share = self._ranks.share_size(n)
        self.deflated = torch.empty(0, share, dtype=A.dtype, device=A.device)
        if deflated is not None:
            self.deflated = deflated
        # No more rows exist than the complement of D has dimensions.
        self.capacity = min(capacity, n - len(self.deflated))
        rows = self.capacity + width
        vector = share * A.dtype.itemsize
        fit = available_memory(A.device) // max(1, vector)
        with self._ranks.together():
            require_memory(
                rows * vector,
                f"a basis of {rows} vectors of length {share}",
                A.device,
                f"a smaller {limit} (a basis of {fit} fits), or fewer parameters (params=...)",
            )
        self._basis = torch.empty(rows, share, dtype=A.dtype, device=A.device)
        self._T = torch.zeros(rows, rows, dtype=torch.float64)
        self._C = torch.zeros(len(self.deflated), rows, dtype=torch.float64)
        self._scale = 0.0
        self.dropped = 0.0
        self._local = 0
        self.size = self._known = 0
        block = start.T[:, self._own].to(A.dtype).clone()
        project_out_(block, self.deflated, self._ranks)
        norms = torch.linalg.vector_norm(start, dim=0, dtype=torch.float64)
        block /= torch.where(norms == 0, 1, norms)[:, None].to(A.dtype)
        # A direction of D leaves nothing but the round-off of its projection.
        added, self.start = self._append(block, 100 * A.unit_roundoff)
        if not added:
            raise InputError("the start vectors lie in the span of what is deflated")
        self.start *= norms.cpu()
        self._known = added
        self.dropped = 0.0  # of start vectors nothing is claimed

    @property
    def dim(self) -> int:
        """Dimension n of the whole space."""
        return self._A.shape[0]

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
        rows = slice(self.size, self._known)
        block = self._ranks.whole(self._basis[rows], self.dim)
        W = self._A.matmat(block.T).T[:, self._own].clone()
        self._C[:, rows] = project_out_(W, self.deflated, self._ranks).double().cpu()
        self._scale = max(self._scale, *lengths(W, self._ranks))
        # The recurrence first, in float64: what the full pass then removes is round-off.
        recent = slice(self._local, self._known)
        coefficients = torch.zeros(self._known, len(W), dtype=torch.float64)
        local = self._ranks.sum_(self._basis[recent].double() @ W.double().T)
        W -= (local.T @ self._basis[recent].double()).to(W.dtype)
        coefficients[recent] = local.cpu()
        coefficients += project_out_(W, self._basis[: self._known], self._ranks).double().cpu()
        self._T[: self._known, rows] = coefficients
        self._T[rows, : self._known] = coefficients.T
        # Two computed halves of the diagonal block differ by round-off.
        self._T[rows, rows] = (self._T[rows, rows] + self._T[rows, rows].T) / 2
        self._local, self.size = self.size, self._known
        added, R = self._append(W, breakdown_tolerance(self._A, self._scale))
        self._known += added
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

    def _append(self, W: Tensor, tolerance: float) -> tuple[int, Tensor]:
        """Orthonormalise rows behind the basis; return their number and W in terms of them.

        Rows of W with a remainder below ``tolerance``, and those beyond the dimension, are dropped.
        """
        begin = self._known
        room = self._A.shape[0] - len(self.deflated) - begin
        R = torch.zeros(len(W), len(W), dtype=torch.float64)
        added = 0
        for i, w in enumerate(W):
            own = self._basis[begin : begin + added]
            R[:added, i] += project_out_(w, own, self._ranks).double().cpu()
            remainder = length(w, self._ranks)
            if remainder <= tolerance or added == room:
                # V is orthogonal to it, so that the columns of all of these make a matrix of norm
                # at most this, and with its transpose too.
                self.dropped = math.hypot(self.dropped, remainder)
                continue
            w /= remainder
            # A short remainder carries relatively large round-off along everything before it.
            project_out_(w, self.deflated, self._ranks)
            project_out_(w, self._basis[: begin + added], self._ranks)
            w /= length(w, self._ranks)
            self._basis[begin + added] = w
            R[added, i] = remainder
            added += 1
        return added, R[:added]
