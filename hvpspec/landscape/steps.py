"""Steps from a point: Newton's, reflected ones towards saddles, and down along an eigenvector."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import scipy.optimize
import scipy.sparse.linalg
import torch
from torch import Tensor

from hvpspec.errors import ComputationError, NonFiniteError
from hvpspec.landscape.landscapes import Landscape
from hvpspec.linalg.extremes import eigsh
from hvpspec.linalg.operator import SymmetricOperator, WrappedOperator
from hvpspec.progress import Progress

#: Up to this size steps are taken from all eigenpairs, a matter of seconds each.
DENSE_UP_TO = 2000

#: After so many gradients a search stops: ten times what the paper's networks take.
MAX_GRADIENTS = 20_000

#: Called with a point, f there and the norm of the gradient, as a search goes on.
Observer = Callable[[Tensor, float, float], None]

# Of the lowest eigenvalues, relative to the norm.
_TOL = 1e-6

# A solution of H p = -g counts as one if its residual, computed anew, is at most so much of g.
_SOLVED = 0.1

# Halvings of a step before it is given up: 2^-30 of it changes f by less than round-off.
_HALVINGS = 30


@dataclass
class Walk:
    """A landscape, with what was spent on it.

    Attributes:
        landscape: the function.
        observer: told of every point that is accepted.
        max_gradients: after which a search stops where it is.
        num_gradients: spent so far.
        num_matvecs: spent so far.
    """

    landscape: Landscape
    observer: Observer | None = None
    max_gradients: int = MAX_GRADIENTS
    num_gradients: int = 0
    num_matvecs: int = 0

    @property
    def left(self) -> int:
        """How many gradients may still be spent."""
        return max(0, self.max_gradients - self.num_gradients)

    def gradient(self, theta: Tensor) -> Tensor:
        """The gradient at a point, counted."""
        self.num_gradients += 1
        return self.landscape.gradient(theta)

    def curvature(self, theta: Tensor, k: int = 1) -> Curvature:
        """The Hessian at a point, with at least the k lowest eigenpairs."""
        H = _Counted(self.landscape.hessian(theta), self)
        return DenseCurvature(H) if self.landscape.n <= DENSE_UP_TO else IterativeCurvature(H, k)

    def attempt(self, theta: Tensor) -> tuple[float, Tensor | None]:
        """The value and the gradient where a step leads; infinity and None if not finite."""
        self.num_gradients += 1
        try:
            return self.landscape.value_and_gradient(theta)
        except NonFiniteError:
            return math.inf, None

    def tell(self, theta: Tensor, value: float, gradient: Tensor) -> None:
        """Tell the observer of a point."""
        if self.observer is not None:
            self.observer(theta, value, norm(gradient))


@contextmanager
def _in_passing() -> Iterator[None]:
    """Do not tell at each point that a faster way of multiplying was not taken.

    Where a network is saturated, cancellation makes the ways differ, and the plain one is right.
    What is computed at the end of a walk still says so.
    """
    with warnings.catch_warnings():
        for way in ("layer .* the block assembled", "linearised products differ"):
            warnings.filterwarnings("ignore", message=way)
        yield


class _Counted(WrappedOperator):
    """An operator whose products are counted by a walk."""

    def __init__(self, A: SymmetricOperator, walk: Walk) -> None:
        super().__init__(A)
        self._walk = walk

    def _matmat(self, V: Tensor) -> Tensor:
        self._walk.num_matvecs += V.shape[1]
        with _in_passing():
            return self._A.matmat(V)

    def to_dense(self, *, progress: Progress | bool | None = None) -> Tensor:
        """The matrix of the operator beneath, whose products count."""
        before = self._A.num_matvecs
        with _in_passing():
            A = self._A.to_dense(progress=progress)
        self._walk.num_matvecs += self._A.num_matvecs - before
        return A

    def _around(self, A: SymmetricOperator) -> SymmetricOperator:
        return _Counted(A, self._walk)


class Curvature(ABC):
    """The Hessian H at a point, as steps need it.

    Attributes:
        H: the operator.
    """

    def __init__(self, H: SymmetricOperator) -> None:
        self.H = H

    @property
    @abstractmethod
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The lowest eigenvalues in ascending order, shape (k,), or all; their vectors, (n, k)."""

    @property
    def values(self) -> Tensor:
        """The lowest eigenvalues in ascending order, shape (k,), or all of them."""
        return self.pairs[0]

    @property
    def vectors(self) -> Tensor:
        """Their eigenvectors, shape (n, k)."""
        return self.pairs[1]

    @property
    @abstractmethod
    def norm(self) -> float:
        """The largest absolute value of an eigenvalue, to a per cent."""

    @property
    @abstractmethod
    def floor(self) -> float:
        """Below this absolute value the sign of an eigenvalue means nothing."""

    @abstractmethod
    def newton(self, g: Tensor, smallest: float) -> Tensor | None:
        """``-H^-1 g``, shape (n,); None if it cannot be solved.

        Args:
            g: the gradient, shape (n,).
            smallest: eigenvalues up to this are taken for zero, where they are known, and what g
                has of their eigenvectors is left out.
        """

    @abstractmethod
    def towards(self, g: Tensor, k: int | None, longest: float) -> Tensor | None:
        """A step towards a critical point of index k, shape (n,); None if it cannot be solved.

        It goes up along the k lowest eigenvectors and down along all others. With ``c_i = <v_i,
        g>`` it is ``sum_{i < k} (c_i / |l_i|) v_i - sum_{i >= k} (c_i / |l_i|) v_i`` (Cerjan &
        Miller 1981), which at a saddle of index k is Newton's.

        Args:
            g: the gradient, shape (n,).
            k: the index; None for Newton's step.
            longest: the step's largest coefficient, where they are known, or else its length.
        """


class DenseCurvature(Curvature):
    """From all eigenpairs."""

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues and eigenvectors."""
        values, vectors = torch.linalg.eigh(self.H.to_dense())
        return values, vectors

    @property
    def norm(self) -> float:
        """The largest absolute value of an eigenvalue."""
        return float(self.values[[0, -1]].abs().max())

    @property
    def floor(self) -> float:
        """The backward error of LAPACK."""
        return self.H.shape[0] * self.H.unit_roundoff * self.norm

    def newton(self, g: Tensor, smallest: float) -> Tensor:
        """From all eigenpairs but those of the null space."""
        return -self.vectors @ self._scaled(g, self.values, smallest)

    def towards(self, g: Tensor, k: int | None, longest: float) -> Tensor:
        """From all eigenpairs; each coefficient is clipped, so that small eigenvalues rule none."""
        divisors = self.values
        if k is not None:
            divisors = self.values.abs()
            divisors[:k] *= -1
        return -self.vectors @ self._scaled(g, divisors, self.floor).clamp(-longest, longest)

    def _scaled(self, g: Tensor, divisors: Tensor, smallest: float) -> Tensor:
        """The coefficients of g, each over its divisor, and 0 where that is taken for zero."""
        counted = self.values.abs() > smallest
        c = self.vectors.T @ g
        return torch.where(counted, c / torch.where(counted, divisors, 1.0), 0.0)


class IterativeCurvature(Curvature):
    """From the k lowest eigenpairs, where they are asked for, and Krylov methods."""

    def __init__(self, H: SymmetricOperator, k: int) -> None:
        super().__init__(H)
        self._k = k

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The k lowest eigenpairs, to a millionth of the norm."""
        found = eigsh(self.H, k=self._k, which="SA", tol=_TOL)
        return found.values, found.vectors

    @cached_property
    def norm(self) -> float:
        """The largest absolute value of an eigenvalue, to a per cent."""
        return float(eigsh(self.H, k=1, which="LM", tol=1e-2).values.abs().max())

    @property
    def floor(self) -> float:
        """What the tolerance and round-off leave of the lowest eigenvalue."""
        return max(_TOL, self.H.shape[0] * self.H.unit_roundoff) * self.norm

    def newton(self, g: Tensor, smallest: float) -> Tensor | None:
        """By CG, and by MINRES where that does not solve it, as for an indefinite Hessian."""
        p = self._solve(self.H, g, scipy.sparse.linalg.cg)
        return self._solve(self.H, g, scipy.sparse.linalg.minres) if p is None else p

    def towards(self, g: Tensor, k: int | None, longest: float) -> Tensor | None:
        """By CG on ``H + 2 sum_{i < k} |l_i| v_i v_i^T``, and by eigenpairs for those.

        Further negative eigenvalues, of which there may be hundreds, are shifted above 0.
        """
        if k is None:
            p = self.newton(g, self.floor)
        else:
            values = self.values.to(g)
            V, up, shift = self.vectors[:, :k], values[:k], -2 * values[k:].clamp(max=0).sum()
            c = V.T @ g
            A = _Reflected(self.H, V, up, shift)
            p = self._solve(A, g - V @ c, scipy.sparse.linalg.cg)
            if p is not None:
                climb = torch.where(up.abs() > self.floor, c / up.abs(), 0.0)
                p = p - V @ (V.T @ p) + V @ climb
        return p if p is None or norm(p) <= longest else p * (longest / norm(p))

    def _solve(
        self, A: SymmetricOperator | _Reflected, g: Tensor, method: Callable[..., Any]
    ) -> Tensor | None:
        """Solve ``A p = -g`` to a residual that is computed anew.

        SciPy's MINRES may report success where it has not solved (scipy issue 16868).
        """
        solution, _ = method(A.to_scipy(), -g.cpu().numpy(), rtol=1e-4, maxiter=3000)
        p = torch.as_tensor(solution, dtype=g.dtype, device=g.device)
        residual = norm(A.matvec(p) + g)
        return p if residual <= _SOLVED * norm(g) else None


class _Reflected:
    """``H + s I + 2 sum |l_i| v_i v_i^T`` over some eigenpairs with negative eigenvalues."""

    def __init__(self, H: SymmetricOperator, V: Tensor, values: Tensor, shift: Tensor) -> None:
        self._H, self._V, self._values, self._shift = H, V, values.clamp(max=0).abs(), shift

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply a vector, shape (n,)."""
        back = 2 * self._V @ (self._values * (self._V.T @ v))
        return self._H.matvec(v) + self._shift * v + back

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """For SciPy's solvers."""
        like = self._V

        def multiply(x: object) -> object:
            return self.matvec(torch.as_tensor(x).to(like)).cpu().numpy()

        return scipy.sparse.linalg.LinearOperator(self._H.shape, matvec=multiply, dtype="float64")


def norm(x: Tensor) -> float:
    """The norm of a vector."""
    return float(torch.linalg.vector_norm(x))


def _lbfgs(
    f: Callable[[Tensor], tuple[float, Tensor]],
    theta: Tensor,
    gtol: float,
    walk: Walk,
    observer: Observer | None = None,
) -> Tensor:
    """Minimise a function by SciPy's L-BFGS-B, as long as the walk has gradients left.

    Args:
        f: returns the value and the gradient at a point.
        theta: where to begin, shape (n,).
        gtol: the largest entry of the gradient at which it ends.
        walk: has a number of gradients left.
        observer: told of each step.
    """

    def both(x: object) -> tuple[float, object]:
        value, gradient = f(torch.as_tensor(x).to(theta))
        return value, gradient.cpu().numpy()

    def tell(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        if observer is not None:
            point = torch.as_tensor(intermediate_result.x).to(theta)
            observer(point, float(intermediate_result.fun), math.nan)

    options = {"maxcor": 30, "ftol": 0.0, "gtol": gtol, "maxiter": walk.left, "maxfun": walk.left}
    found = scipy.optimize.minimize(
        both, theta.cpu().numpy(), jac=True, method="L-BFGS-B", options=options, callback=tell
    )
    return torch.as_tensor(found.x).to(theta)


def lbfgs(walk: Walk, theta: Tensor, gtol: float) -> Tensor:
    """Minimise f until the largest entry of the gradient is below ``gtol``.

    It stops before where values of f, good to half the digits of the gradient, tell no more.
    """

    def both(point: Tensor) -> tuple[float, Tensor]:
        value, g = walk.attempt(point)
        # The line search goes back from where f is not finite.
        return value, torch.zeros_like(theta) if g is None else g

    end = _lbfgs(both, theta, gtol, walk, walk.observer)
    if not bool(torch.isfinite(end).all()):
        raise NonFiniteError("the way down leads to infinity: f may be unbounded below; add l2")
    return end


def newton(walk: Walk, theta: Tensor, curvature: Curvature | None = None) -> Tensor:
    """Newton's method, whose steps are accepted by the gradient's norm alone, until that stays.

    Values of f do not see the last half of the digits.

    Args:
        walk: counts what is spent.
        theta: where to begin, shape (n,).
        curvature: at that point, where it is known.

    Returns:
        The last point.
    """
    u = torch.finfo(theta.dtype).eps / 2
    g = walk.gradient(theta)
    while norm(g) > 0 and walk.left:
        H = curvature or walk.curvature(theta)
        curvature = None
        # Along a curve of minima eigenvalues are tiny as long as the point is not on it, and a step
        # is right without them.
        for smallest in (H.floor, u**0.5 * H.norm):
            step = _shortened(walk, theta, g, H.newton(g, smallest))
            if step is not None:
                break
        if step is None:
            break
        size = norm(g)
        theta, value, g = step
        walk.tell(theta, value, g)
        # Where the gradient is what rounding the point makes of it, a step that gains gains much.
        if norm(g) <= 4 * u * H.norm * norm(theta) and norm(g) > 0.1 * size:
            break
    return theta


def _shortened(
    walk: Walk, theta: Tensor, g: Tensor, p: Tensor | None
) -> tuple[Tensor, float, Tensor] | None:
    """Where the first of p, p / 2, p / 4, ... leads that lowers the gradient's norm; None if none.

    Returns:
        The point, f and the gradient there.
    """
    if p is not None:
        for k in range(_HALVINGS):
            moved = theta + p / 2**k
            value, g_new = walk.attempt(moved)
            # A fair share of what the linear model promises, so that round-off is no progress.
            if g_new is not None and norm(g_new) < (1 - 0.1 / 2**k) * norm(g):
                return moved, value, g_new
    return None


def flatten(walk: Walk, theta: Tensor) -> Tensor:
    """Minimise ``||g||^2 / 2``, whose gradient is ``H g``.

    What it ends at is critical or gradient-flat.
    """

    def both(point: Tensor) -> tuple[float, Tensor]:
        g, H = walk.gradient(point), walk.landscape.hessian(point)
        walk.num_matvecs += 1
        return float(g @ g) / 2, H.matvec(g)

    return _lbfgs(both, theta, 0.0, walk)


def towards(walk: Walk, theta: Tensor, k: int | None) -> Tensor:
    """Walk towards a critical point of index k, or of whatever index for None, and onto it.

    Steps are as long as the linear model of the gradient holds, a trust region of its own kind.
    Where Newton's steps no longer lower the gradient's norm, that is minimised by itself.

    Args:
        walk: counts what is spent.
        theta: where to begin, shape (n,).
        k: the index; None for Newton's steps, which go to whatever critical point is near.

    Returns:
        The last point, which is not critical if the walk got stuck.

    Raises:
        ComputationError: the equations of a step could not be solved.
    """
    g = walk.gradient(theta)
    H = walk.curvature(theta, (k or 0) + 1)
    longest = max(norm(theta), 1.0)
    trust = 0.1 * longest
    while walk.left and trust > 1e-12 * longest:
        p = H.towards(g, k, trust)
        if p is None:
            raise ComputationError(
                "the equations of a step could not be solved: the Hessian is nearly singular; "
                "raise l2, or start elsewhere"
            )
        value, g_new = walk.attempt(theta + p)
        if g_new is None:
            trust = min(trust, norm(p)) / 4
            continue
        change = H.H.matvec(p)
        # Relative to what is there: near null directions no change at all is predicted.
        error = norm(g_new - g - change) / (max(norm(change), norm(g)) or 1.0)
        if error > 0.5 or (k is None and norm(g_new) >= norm(g)):
            trust = min(trust, norm(p)) / 4
            continue
        if error < 0.1:
            trust = min(2 * trust, longest)  # so that a way to infinity takes its time
        theta, g = theta + p, g_new
        walk.tell(theta, value, g)
        if norm(p) <= 1e-5 * longest:
            return newton(walk, theta)
        H = walk.curvature(theta, (k or 0) + 1)
    return newton(walk, flatten(walk, theta)) if k is None else theta


def downhill(walk: Walk, theta: Tensor, v: Tensor, g: Tensor, curvature: float) -> Tensor | None:
    """A step along a direction in which f falls, by halving; None where no step lowers f.

    Args:
        walk: counts what is spent.
        theta: the point, shape (n,).
        v: a unit vector, shape (n,), taken with the sign that does not climb.
        g: the gradient at the point.
        curvature: ``<v, H v>``, below 0; or 0 where f falls to third order only.

    Returns:
        A point with ``f <= f(theta) + t <g, v> + curvature t^2 / 4``, which Taylor's formula grants
        for small t (half of its second-order decrease).
    """
    F = walk.landscape
    slope = float(g @ v)
    v, slope = (v, slope) if slope <= 0 else (-v, -slope)
    here = F.value(theta)
    t = max(norm(theta), 1.0)
    for _ in range(_HALVINGS):
        try:
            value = F.value(theta + t * v)
        except NonFiniteError:
            value = math.inf  # too long a step
        if value < here and value <= here + t * slope + curvature * t * t / 4:
            return theta + t * v
        t /= 2
    return None


def minimise(walk: Walk, theta: Tensor) -> Tensor:
    """Go down until no eigenvalue is negative, and on to where the gradient is round-off.

    Args:
        walk: counts what is spent.
        theta: where to begin, shape (n,).
    """
    # Values of f tell no more about where its gradient, some sqrt(u) of the first one, is zero.
    gtol = 1e-8 * float(walk.gradient(theta).abs().max())
    while walk.left:
        theta = lbfgs(walk, theta, gtol)
        H = walk.curvature(theta)
        if float(H.values[0]) >= -H.floor:
            before = theta
            theta = newton(walk, theta, H)
            # After a small step eigenvalues are about what they were.
            if norm(theta - before) <= 1e-3 * norm(theta):
                return theta
            H = walk.curvature(theta)
        lowest = float(H.values[0])
        if lowest >= -H.floor:
            return theta
        lower = downhill(walk, theta, H.vectors[:, 0], walk.gradient(theta), lowest)
        if lower is None:  # so near to 0 is the eigenvalue, as near a curve of minima
            return newton(walk, theta, H)
        theta = lower
    return theta
