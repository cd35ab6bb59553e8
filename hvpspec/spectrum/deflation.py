"""Directions taken out of a search for negative eigenvalues, and how they are renewed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hvpspec.linalg.krylov import KrylovSpace


@dataclass(frozen=True)
class Deflated:
    """Directions taken out: W, nearly invariant, and Q, on which A is negative.

    Attributes:
        vectors: orthonormal rows, W before Q, shape (w + q, n), of which each of several processes
            has its share of the columns.
        G: A compressed to them, float64, shape (w + q, w + q).
        residuals: bounds on ``||A x||`` outside of all vectors, for the rows of W, shape (w,).
    """

    vectors: Tensor
    G: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    residuals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def num_invariant(self) -> int:
        """Number of rows of W."""
        return len(self.residuals)

    @cached_property
    def invariant(self) -> Tensor:
        """The eigenvalues of A compressed to W, ascending, shape (w,)."""
        w = self.num_invariant
        values: Tensor = torch.linalg.eigvalsh(self.G[:w, :w])
        return values

    @property
    def num_negative(self) -> int:
        """Number of rows of Q."""
        return len(self.G) - self.num_invariant

    @property
    def error(self) -> float:
        """What A differs by from an operator that couples W to nothing beyond W and Q."""
        return float(torch.linalg.vector_norm(self.residuals))


def compression(space: KrylovSpace, deflated: Deflated) -> Tensor:
    """A compressed to everything seen: the deflated directions and the round's basis."""
    top = torch.cat([deflated.G, space.C], 1)
    return torch.cat([top, torch.cat([space.C.T, space.T], 1)])


def harvest(space: KrylovSpace, deflated: Deflated, tau: float, finest: float) -> Deflated:
    """Take out the round's converged Ritz vectors and all that lie below ``-tau``."""
    theta, S, residuals = space.ritz()
    w = deflated.num_invariant
    tolerance = _tolerance(finest, len(theta) + w)
    converged = residuals <= tolerance
    negative = ~converged & (theta < -tau)
    chosen = torch.cat([S[:, converged], S[:, negative]], 1)
    num_converged = int(converged.sum())
    if chosen.shape[1] == 0:
        return deflated
    new, coupling = space.rotate(chosen), space.C @ chosen
    new_theta = torch.cat([theta[converged], theta[negative]])
    invariant, rest = slice(0, num_converged), slice(num_converged, None)

    vectors = torch.cat([deflated.vectors[:w], new[invariant], deflated.vectors[w:], new[rest]])
    order = torch.cat(
        [
            torch.arange(w),
            len(deflated.G) + torch.arange(num_converged),
            torch.arange(w, len(deflated.G)),
            len(deflated.G) + torch.arange(num_converged, len(new_theta)),
        ]
    )
    G = torch.cat(
        [
            torch.cat([deflated.G, coupling], 1),
            torch.cat([coupling.T, torch.diag(new_theta)], 1),
        ]
    )[order][:, order]
    harvested = Deflated(vectors, G, torch.cat([deflated.residuals, residuals[converged]]))
    return _rayleigh_ritz(harvested, tau)


def _tolerance(tau: float, count: int) -> float:
    """The residual of which so many move no eigenvalue by more than a part of tau."""
    return 0.05 * tau / math.sqrt(max(count, 1))


def refit(deflated: Deflated, tau: float) -> Deflated:
    """Make what was deflated for a coarser tau fit a finer one.

    Of the rows of W whose residual is now too large, those below ``-tau`` join Q, which need not be
    invariant, and the others are let go.
    """
    w, all_rows = deflated.num_invariant, torch.arange(len(deflated.G))
    fits = deflated.residuals <= _tolerance(tau, w)
    negative = ~fits & (deflated.G.diagonal()[:w] < -tau)
    kept, let_go = all_rows[:w][fits], all_rows[:w][~fits & ~negative]
    order = torch.cat([kept, all_rows[w:], all_rows[:w][negative]])
    outside = torch.linalg.vector_norm(deflated.G[kept][:, let_go], dim=1)
    refitted = Deflated(
        deflated.vectors[order.to(deflated.vectors.device)],
        deflated.G[order][:, order],
        torch.hypot(deflated.residuals[fits], outside),
    )
    return _rayleigh_ritz(refitted, tau)


def _rayleigh_ritz(deflated: Deflated, tau: float) -> Deflated:
    """Rotate Q to its Ritz vectors and let go of those that are not below ``-tau``."""
    w = deflated.num_invariant
    values, Y = torch.linalg.eigh(deflated.G[w:, w:])
    kept, dropped = Y[:, values < -tau], Y[:, values >= -tau]
    rotation = torch.zeros(len(deflated.G), w + kept.shape[1], dtype=torch.float64)
    rotation[range(w), range(w)] = 1
    rotation[w:, w:] = kept
    vectors = rotation.T.to(deflated.vectors) @ deflated.vectors
    # What couples W to a direction that is let go lies outside of all vectors from now on.
    outside = torch.linalg.vector_norm(deflated.G[:w, w:] @ dropped, dim=1)
    residuals = torch.hypot(deflated.residuals, outside)
    return Deflated(vectors, rotation.T @ deflated.G @ rotation, residuals)
