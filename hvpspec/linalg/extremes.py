"""A few eigenpairs at the ends of the spectrum, by thick-restart Lanczos."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.krylov import KrylovSpace
from hvpspec.linalg.operator import SymmetricOperator, as_operator, require_scale
from hvpspec.linalg.probes import probes_for, require_count, seeded
from hvpspec.progress import Progress, shown
from hvpspec.results import Result, Row, Subject

#: Which eigenvalues: largest, smallest, largest in absolute value, or half from each end.
Which = Literal["LA", "SA", "LM", "BE"]


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(Result):
    """Some eigenvalues and eigenvectors.

    Attributes:
        values: ascending, float64, shape (k,).
        vectors: orthonormal columns, shape (n, k), in the operator's dtype and on its device.
        residual_norms: ``||A x - value x||`` by a product with each vector, float64, shape (k,).
        converged: whether a residual is within the tolerance, shape (k,).
        num_matvecs: matrix-vector products spent.
        which: "LA", "SA", "LM" or "BE", see :func:`eigsh`.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    converged: Tensor
    num_matvecs: int
    which: Which = "LM"

    _FORMAT: ClassVar[str] = "hvpspec-eigs"

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """The lines of the table: each eigenvalue, the largest first."""
        rows: list[Row] = [
            ("eigenvalue", "residual", "there is an eigenvalue within this distance")
        ]
        columns = self.values.tolist(), self.residual_norms.tolist(), self.converged.tolist()
        for value, residual, converged in reversed(list(zip(*columns, strict=True))):
            # As many digits as the distance to an eigenvalue leaves, and a few more.
            state = "converged" if converged else "NOT converged"
            rows.append((f"{value: .8g}", f"{residual:.1e}", state))
        return [*rows, ("products", f"{self.num_matvecs:,}", "matrix-vector products")]

    def _brief(self) -> dict[str, object]:
        return {
            "values": [float(f"{value:.6g}") for value in self.values[:6].tolist()],
            "k": len(self.values),
            "which": self.which,
            "num_converged": int(self.converged.sum()),
            "num_matvecs": self.num_matvecs,
        }

    def _content(self) -> dict[str, Any]:
        content = super()._content()
        del content["vectors"]  # as long as the network
        return content


def eigsh(
    A: SymmetricOperator | Tensor,
    k: int = 6,
    which: Which = "LM",
    *,
    tol: float | None = None,
    max_matvecs: int | None = None,
    x0: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | bool | None = None,
) -> Eigenpairs:
    """A few eigenpairs at the ends of the spectrum.

    Lanczos with full re-orthogonalisation and thick restarts, in memory for ``2 k + 30`` vectors
    beside the result, of which each of several processes keeps its share. A single start vector
    sees one copy of a repeated eigenvalue, so when k pairs have converged a fresh start in their
    complement looks for what was missed, until it finds nothing beyond them.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        k: how many, from 1 to n.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest in absolute value, ``"BE"``
            half from each end (one more from the high end if k is odd).
        tol: above 0; the search ends when the residuals that Lanczos knows are at most
            ``tol ||A||``, and a pair has converged whose measured one is at most twice that; None
            for the square root of the unit round-off, which makes a separated eigenvalue accurate
            to round-off.
        max_matvecs: the most products to spend, at least ``2 k``, since k measure the residuals;
            None for ``100 k + 1000``.
        x0: where to start: a vector of shape (n,), or approximate eigenvectors as columns, shape
            (n, m), such as those of the same network some steps ago; None for a random vector.
        generator: the source of start vectors; None for one with seed 0.
        progress: True for a bar; or called with the products spent and the most there will be.

    Returns:
        The pairs; those that did not converge within ``max_matvecs`` are marked.

    Raises:
        InputError: an argument is not allowed, or the basis does not fit into memory.
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64.

    Reference:
        Wu & Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J.
        Matrix Anal. Appl. 22 (2000).

    Example:
        >>> eigsh(torch.diag(torch.arange(10.0)), k=2, which="LA").values.round(decimals=4)
        tensor([8., 9.], dtype=torch.float64)
    """
    operator = as_operator(A)
    n = operator.shape[0]
    require_count("k", k)
    if k > n:
        raise InputError(f"k must be between 1 and the size {n}, got {k}")
    if which not in ("LA", "SA", "LM", "BE"):
        raise InputError(f"which must be 'LA', 'SA', 'LM' or 'BE', got {which!r}")
    tol = operator.unit_roundoff**0.5 if tol is None else tol
    if not (math.isfinite(tol) and tol > 0):
        raise InputError(f"tol must be positive and finite, got {tol}")
    max_matvecs = 100 * k + 1000 if max_matvecs is None else max_matvecs
    if not hasattr(max_matvecs, "__index__") or max_matvecs < 2 * k:
        raise InputError(
            f"max_matvecs must be at least 2 k = {2 * k}, k to find the pairs and k to measure "
            f"their residuals, got {max_matvecs}"
        )
    operator.check_symmetry()
    start = None if x0 is None else _start_vector(operator, x0)
    with shown(progress, "eigenvalues") as report:
        search = _Search(operator, k, which, tol, max_matvecs - k, start, seeded(generator), report)
        values, X = search.run()
    X = operator.ranks.whole(X, n)
    product = operator.matmat(X.T)
    errors = product.double() - X.T.double() * values.to(X.device)
    residuals = torch.linalg.vector_norm(errors, dim=0).cpu()
    return Eigenpairs(
        values, X.T, residuals, residuals <= 2 * tol * search.norm, search.spent + k, which
    )


# Products from one look at what has converged to the next: eigenvalues of a small matrix, which
# take less time than that many products with any matrix that is not small itself.
_STEPS_BETWEEN_LOOKS = 8


@dataclass
class _Search:
    """Rounds of thick-restart Lanczos, each in the complement of what was found before."""

    A: SymmetricOperator
    k: int
    which: Which
    tol: float
    max_matvecs: int
    start: Tensor | None
    generator: torch.Generator
    progress: Progress | None
    spent: int = 0
    norm: float = 0.0

    def run(self) -> tuple[Tensor, Tensor]:
        """Return k values in ascending order and this process's share of their vectors, as rows."""
        n = self.A.shape[0]
        values = torch.empty(0, dtype=torch.float64)
        X = torch.empty(0, self.A.ranks.share_size(n), dtype=self.A.dtype, device=self.A.device)
        while len(values) < n:
            # A round that only looks for what was missed looks at each end asked for.
            missing = max(2 if self.which == "BE" else 1, self.k - len(values))
            theta, new = self._round(X, missing)
            require_scale(self.norm, self.A.dtype)
            before = values[wanted(values, self.k, self.which)]
            values, X = torch.cat([values, theta]), torch.cat([X, new])
            best = wanted(values, self.k, self.which)
            settled = len(before) == self.k and bool((best < len(values) - len(theta)).all())
            if settled or (self.spent >= self.max_matvecs and len(values) >= self.k):
                break
        best = wanted(values, self.k, self.which)
        order = best[values[best].argsort()]
        return values[order], X[order.to(X.device)]

    def _round(self, found: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find ``count`` pairs in the complement of ``found``, or fewer if it is exhausted."""
        A = self.A
        # Later rounds look for what the first missed, for which its start is no good.
        start, self.start = self.start, None
        if start is None:
            start = probes_for(A, "gaussian", 1, self.generator)
        # A restart keeps 1.5 count + 15 of these, so that 0.5 count + 15 are new: with much fewer,
        # a small count would hardly converge.
        space = KrylovSpace(A, start, 2 * count + 30, found, limit="k")
        while True:
            for _ in range(_STEPS_BETWEEN_LOOKS):
                if space.full or self.spent >= self.max_matvecs:
                    break
                self.spent += space.expand()
            if self.progress is not None:
                self.progress(min(self.spent, self.max_matvecs), self.max_matvecs)
            theta, S, residuals = space.ritz()
            self.norm = max(self.norm, float(theta.abs().max()))
            best = wanted(theta, count, self.which)
            # One Ritz value more than wanted, so that what bounds them from within has been seen.
            done = len(theta) > count and bool((residuals[best] <= self.tol * self.norm).all())
            if done or space.width == 0 or self.spent >= self.max_matvecs:
                # An invariant subspace is known whole, and all of it is of use.
                chosen = torch.arange(len(theta)) if space.width == 0 else best
                return theta[chosen], space.rotate(S[:, chosen])
            if space.full:
                # Beside the wanted pairs, some of their neighbours speed up what follows.
                kept = wanted(theta, count + (space.size - count) // 2, self.which)
                space.restart(theta[kept], S[:, kept])


def _start_vector(A: SymmetricOperator, x0: Tensor) -> Tensor:
    """One start vector, shape (n, 1), from the directions given.

    A single vector sees all of them: the Krylov space of a sum of m eigenvectors with different
    eigenvalues holds each of them after m steps.
    """
    n = A.shape[0]
    if x0.ndim not in (1, 2) or x0.shape[0] != n or not x0.numel():
        raise InputError(f"x0 must have shape ({n},) or ({n}, m), got {tuple(x0.shape)}")
    columns = x0.detach().to(A.device, A.dtype).reshape(n, -1)
    lengths = torch.linalg.vector_norm(columns, dim=0)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise InputError("x0 must be finite and without zero columns; pass directions, or None")
    start: Tensor = (columns / lengths).sum(1, keepdim=True)
    return start


def wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the k wanted entries of a tensor (all, if there are fewer), shape (k,)."""
    k = min(k, len(values))
    ascending = values.argsort()
    if which == "LA":
        return ascending[len(values) - k :]
    if which == "SA":
        return ascending[:k]
    if which == "LM":
        return values.abs().argsort(descending=True)[:k]
    return torch.cat([ascending[: k // 2], ascending[len(values) - (k - k // 2) :]])
