"""Landscapes: functions of a point with their gradients and Hessians."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

from hvpspec.curvature.losses import Loss
from hvpspec.curvature.objective import Objective
from hvpspec.curvature.operator import HessianOperator
from hvpspec.errors import (
    InputError,
    NonFiniteError,
    NotDifferentiableError,
    type_and_line,
)
from hvpspec.landscape.lipschitz import proved_lipschitz
from hvpspec.landscape.smoothness import Kink, kink_distance, kinks
from hvpspec.linalg.operator import Piece, PointFacts, SymmetricOperator, WrappedOperator
from hvpspec.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator


# Up to this size the Hessians of a network at several points, n products each, are taken at once,
# for so many points.
_STACKED_UP_TO, _STACK = 200, 64


class Landscape(ABC):
    """A function f of a point, twice differentiable, in float64.

    Attributes:
        n: the number of coordinates.
        device: where points live.
        kinks: what stands in the way of a second derivative; empty for a smooth function.
    """

    dtype = torch.float64
    kinks: tuple[Kink, ...] = ()

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n, self.device = n, torch.device(device)

    def point(self, theta: Any) -> Tensor:
        """A point of this landscape as a tensor of its own, shape (n,).

        Raises:
            InputError: it has another shape, or is not finite, or no tensor of real numbers.
        """
        try:
            given = torch.as_tensor(theta).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"theta must be a tensor, got {type(theta).__name__}") from error
        if given.is_complex():
            raise InputError("theta must be real, got complex numbers")
        point = given.to(self.device, self.dtype, copy=True)
        if point.shape != (self.n,):
            raise InputError(f"theta must have shape ({self.n},), got {tuple(point.shape)}")
        if not bool(torch.isfinite(point).all()):
            raise InputError("theta contains NaN or infinity; pass a finite point")
        return point

    @abstractmethod
    def value(self, theta: Tensor) -> float:
        """``f`` at a point of shape (n,)."""

    @abstractmethod
    def gradient(self, theta: Tensor) -> Tensor:
        """The gradient of ``f`` at a point, shape (n,)."""

    @abstractmethod
    def hessian(self, theta: Tensor) -> SymmetricOperator:
        """The Hessian of ``f`` at a point."""

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Both at a point, at the cost of the gradient where that is possible."""
        return self.value(theta), self.gradient(theta)

    def values(self, thetas: Tensor) -> Tensor:
        """``f`` at a stack of points of shape (s, n); shape (s,)."""
        return torch.tensor([self.value(theta) for theta in thetas], dtype=self.dtype)

    def gradients(self, thetas: Tensor) -> Tensor:
        """The gradients at a stack of points, shape (s, n)."""
        return torch.stack([self.gradient(theta) for theta in thetas])

    def hessians(self, thetas: Tensor) -> Tensor:
        """The Hessians at a stack of points, shape (s, n, n)."""
        return torch.stack([self.hessian(theta).to_dense() for theta in thetas])

    def check(self, theta: Tensor) -> None:  # noqa: B027 - a formula needs no check
        """See that derivatives at a point are those of ``f``, once it has been found.

        Raises:
            HvpspecError: they are not.
        """

    def kink_distance(self, theta: Tensor) -> float:
        """The least absolute value of what enters a kink of the function; infinite without one."""
        return math.inf

    def proved_lipschitz(self, theta: Tensor, radius: float) -> float:
        """A Lipschitz constant of the Hessian on a ball.

        Raises:
            InputError: none can be proved; the message says why.
        """
        raise InputError("no bound is known for a function of one's own: pass lipschitz=K")


class FunctionLandscape(Landscape):
    """A landscape given by a formula.

    Args:
        n: the number of coordinates.
        f: takes a point of shape (n,) and returns a scalar tensor, by operations of PyTorch that
            can be differentiated twice, and under ``torch.func.vmap`` for stacks of points.
        device: where points live.

    Example:
        >>> F = FunctionLandscape(2, lambda x: (x @ x - 1) ** 2)
        >>> x = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> F.value(x), F.gradient(x), F.hessian(x).to_dense().diagonal()
        (0.0, tensor([0., 0.], dtype=torch.float64), tensor([8., 0.], dtype=torch.float64))
    """

    def __init__(
        self, n: int, f: Callable[[Tensor], Tensor], *, device: torch.device | str = "cpu"
    ) -> None:
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}")
        super().__init__(n, device)
        self.f = f

    def value(self, theta: Tensor) -> float:
        """``f`` at a point of shape (n,)."""
        with torch.no_grad():
            return float(self._evaluated(theta))

    def gradient(self, theta: Tensor) -> Tensor:
        """The gradient of ``f`` at a point, shape (n,)."""
        leaf = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            self._evaluated(leaf), leaf, allow_unused=True, materialize_grads=True
        )
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError("the gradient is NaN or infinite at a point where f is finite")
        return gradient

    def hessian(self, theta: Tensor) -> SymmetricOperator:
        """The Hessian of ``f`` at a point, by double backward."""
        leaf = theta.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            self._evaluated(leaf),
            leaf,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return _FunctionHessian(leaf, gradient)

    def values(self, thetas: Tensor) -> Tensor:
        """``f`` at a stack of points of shape (s, n), at once; shape (s,)."""
        return self._stacked(self._apart, thetas)

    def gradients(self, thetas: Tensor) -> Tensor:
        """The gradients at a stack of points, at once, shape (s, n)."""
        return self._stacked(grad(self._apart), thetas)

    def hessians(self, thetas: Tensor) -> Tensor:
        """The Hessians at a stack of points, at once, shape (s, n, n)."""
        return self._stacked(hessian(self._apart), thetas)

    def _apart(self, theta: Tensor) -> Tensor:
        """``f`` as a scalar, of a point of its own, into which it may write."""
        return self.f(theta.clone()).reshape(())

    def _stacked(self, function: Callable[..., Any], thetas: Tensor) -> Tensor:
        """A function at a stack of points."""
        try:
            values: Tensor = vmap(function)(thetas)
        except RuntimeError as error:
            raise InputError(
                f"torch.func.vmap cannot take f at a stack of points ({type_and_line(error)})"
            ) from error
        return values

    def _evaluated(self, theta: Tensor) -> Tensor:
        """``f``, one finite number, of a point of its own, into which it may write."""
        value: Any = self.f(theta.clone())
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"f must return one number as a tensor, got {kind}")
        if value.dtype != self.dtype:  # the floor of round-off is that of float64
            raise InputError(f"f must compute in float64, but returns {value.dtype}")
        if theta.requires_grad and not value.requires_grad:
            raise InputError("f does not depend on theta by operations that PyTorch differentiates")
        if not bool(torch.isfinite(value.detach())):
            why = "it may be unbounded below" if float(value.detach()) < 0 else "start elsewhere"
            raise NonFiniteError(f"f is {float(value.detach())} at a point; {why}")
        return value.reshape(())


class _FunctionHessian(SymmetricOperator):
    """The Hessian of a function whose gradient has a graph."""

    _keeps_apart = True

    def __init__(self, leaf: Tensor, gradient: Tensor) -> None:
        super().__init__(len(leaf), dtype=leaf.dtype, device=leaf.device)
        self._leaf, self._gradient = leaf, gradient

    def _matmat(self, V: Tensor) -> Tensor:
        if not self._gradient.requires_grad:  # of a linear function
            return torch.zeros_like(V)
        (rows,) = torch.autograd.grad(
            self._gradient,
            self._leaf,
            V.T,
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return rows.T


class NetworkLandscape(Landscape):
    """``f(theta) = L(theta) + sum_i l2_i theta_i^2 + <tilt, theta>`` of a network, in float64.

    ``L`` is the loss over the data, as for :class:`hvpspec.HessianOperator`. The network is only
    read: a point goes into it by :meth:`write` alone. What an answer stands on is checked once.

    Args:
        model: the network.
        loss: a function of outputs and targets.
        data: the examples.
        l2: the coefficient of the squared norm: a number, a vector of shape (n,), or a mapping from
            names of parameters to numbers, all others 0.
        tilt: the vector of a linear term, shape (n,); None for none. For almost every one f has
            nondegenerate critical points only (Sard).
        allow_kinks: whether to go on where the network is not twice differentiable everywhere. Then
            no point is certified.
        options: ``params``, ``chunk_size``, ``mode`` and ``group``, as for an operator.

    Attributes:
        objective: ``L``, in float64.
        start: the network's present weights, shape (n,).
        l2: the coefficients, shape (n,).

    Raises:
        InputError: an argument cannot be used, or the network has kinks; the message names the
            layer and what to put in its place.
        HvpspecError: see :class:`hvpspec.HessianOperator`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> F = NetworkLandscape(model, nn.MSELoss(), (torch.ones(2, 1), torch.ones(2, 1)), l2=1.0)
        >>> F.gradient(torch.tensor([0.5], dtype=torch.float64))  # 2 (0.5 - 1) + 2 * 0.5
        tensor([0.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | nn.Module | Callable[[Any, Any], Tensor],
        data: Any,
        *,
        l2: float | Tensor | Mapping[str, float] = 0.0,
        tilt: Tensor | None = None,
        allow_kinks: bool = False,
        **options: Any,
    ) -> None:
        objective = Objective(model, loss, data, dtype=torch.float64, **options)
        if objective.is_coupled or _drops(objective):
            raise InputError(
                "batch statistics and dropout make f depend on the batch or on chance; call "
                "model.eval(), which is another function with critical points of its own"
            )
        super().__init__(objective.space.dim, objective.device)
        objective.hessian().check_symmetry()
        if objective.guard.float64_fails:
            raise InputError(
                "the network cannot compute in float64, without which no critical point is "
                f"reached: {objective.guard.float64_fails}"
            )
        self.objective = objective
        self.kinks = kinks(objective)
        if self.kinks and not allow_kinks:
            raise NotDifferentiableError(
                f"{self.kinks[0]}; critical points of such a function lie on kinks, where it has "
                "no Hessian (allow_kinks=True goes on, and certifies nothing)"
            )
        self.start = objective.space.flatten(objective.leaves()).detach()
        self.l2 = self._coefficients(l2)
        self.tilt = torch.zeros_like(self.start) if tilt is None else self.point(tilt)

    def _coefficients(self, l2: float | Tensor | Mapping[str, float]) -> Tensor:
        """The coefficient of each parameter, shape (n,)."""
        space = self.objective.space
        if isinstance(l2, Mapping):
            unknown = sorted(set(l2) - set(space.names))
            if unknown:
                raise InputError(
                    f"l2 names {unknown[0]!r}, which is none of {', '.join(space.names)}"
                )
            each = [float(l2.get(name, 0.0)) for name in space.names]
            found = torch.repeat_interleave(
                torch.tensor(each, dtype=self.dtype), torch.tensor(space.sizes)
            ).to(self.device)
        elif getattr(l2, "ndim", 0):
            found = self.point(l2)
        else:
            found = torch.full_like(self.start, float(l2))
        if not bool(torch.isfinite(found).all() and (found >= 0).all()):
            raise InputError("l2 must hold finite numbers of at least 0")
        return found

    @property
    def of_the_loss(self) -> NetworkLandscape:
        """The same without l2 and tilt: ``L`` alone."""
        other = copy.copy(self)
        other.l2, other.tilt = torch.zeros_like(self.l2), torch.zeros_like(self.tilt)
        return other

    def write(self, theta: Tensor, model: nn.Module | None = None) -> None:
        """Put a point, shape (n,), into the network, or into a copy of it, in that one's dtype."""
        parts = self.objective.space.unflatten(self.point(theta))
        parameters = self.objective.parameters()
        if model is not None:
            parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, part in parts.items():
                own = parameters[name]
                own.copy_(torch.view_as_complex(part) if own.is_complex() else part)

    def value(self, theta: Tensor) -> float:
        """``f`` at a point of shape (n,)."""
        return self.objective.value(theta) + self._simple(theta)

    def _simple(self, theta: Tensor) -> float:
        """The quadratic and the linear term."""
        return float(self.l2 @ theta.square() + self.tilt @ theta)

    def gradient(self, theta: Tensor) -> Tensor:
        """The gradient of ``f`` at a point, shape (n,)."""
        return self.objective.gradient(theta).add_(2 * self.l2 * theta).add_(self.tilt)

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Both at a point, in one pass over the data."""
        point = self.objective.at(theta)
        gradient, _ = point.gradient()
        value = point.objective_value() + self._simple(theta)  # from the losses of the same pass
        return value, gradient.add_(2 * self.l2 * theta).add_(self.tilt)

    def gradients(self, thetas: Tensor) -> Tensor:
        """The gradients at a stack of points, shape (s, n), at once where the network is small."""
        if self.n > _STACKED_UP_TO:
            return super().gradients(thetas)
        return self._stacked(grad, thetas) + 2 * self.l2 * thetas + self.tilt

    def hessians(self, thetas: Tensor) -> Tensor:
        """The Hessians at a stack of points, shape (s, n, n), likewise."""
        if self.n > _STACKED_UP_TO:
            return super().hessians(thetas)
        return self._stacked(hessian, thetas) + torch.diag(2 * self.l2)

    def _stacked(self, derivative: Callable[..., Any], thetas: Tensor) -> Tensor:
        """A derivative of the loss at a stack of points."""
        point = self.objective.at()

        def loss(theta: Tensor) -> Tensor:
            tensors = self.objective.tensors(self.objective.space.unflatten(theta))
            shares = [point.share(k) * self.objective.evaluate(b, tensors)[0] for k, b in chunks]
            return sum(shares[1:], shares[0])

        with point.chunks() as passing:
            chunks = [(k, batch) for k, batch in passing if point.share(k)]
            derivatives: Tensor = vmap(derivative(loss), chunk_size=_STACK)(thetas)
        return derivatives

    def hessian(self, theta: Tensor) -> SymmetricOperator:
        """The Hessian of ``f`` at a point."""
        theta = theta.detach().clone()
        return _RegularisedHessian(
            HessianOperator.of(self.objective, theta, is_checked=True), self, theta
        )

    def check(self, theta: Tensor) -> None:
        """Compare products at a point with differences of the gradient there.

        Raises:
            NotDifferentiableError: they are not its derivative.
        """
        self.objective.guard.check_at(self.objective, theta)

    def kink_distance(self, theta: Tensor) -> float:
        """The least absolute value of what enters a kink; NaN where it is not known."""
        if not self.kinks:
            return math.inf
        known = all(kink.is_at_zero for kink in self.kinks)
        return kink_distance(self.objective, theta) if known else math.nan

    def proved_lipschitz(self, theta: Tensor, radius: float) -> float:
        """A Lipschitz constant of the Hessian on a ball; l2 and tilt add nothing to it."""
        return proved_lipschitz(self.objective, theta, radius)


def _drops(objective: Objective) -> bool:
    """Whether a dropout layer is on."""
    return objective.mode == "as given" and any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p
        for module in objective.modules
    )


class _RegularisedHessian(WrappedOperator):
    """The Hessian of the loss with ``2 l2_i`` on the diagonal."""

    def __init__(self, A: SymmetricOperator, landscape: NetworkLandscape, theta: Tensor) -> None:
        super().__init__(A)
        self._landscape, self._theta = landscape, theta

    def _matmat(self, V: Tensor) -> Tensor:
        return self._A.matmat(V) + (2 * self._landscape.l2)[:, None] * V

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        yield from super()._pieces(A, progress)
        A.diagonal().add_(2 * self._landscape.l2)

    def _around(self, A: SymmetricOperator) -> SymmetricOperator:
        return _RegularisedHessian(A, self._landscape, self._theta)

    def facts(self) -> PointFacts:
        """``f``, the norm of its gradient, and the bound for the loss, which holds for f, too."""
        gradient_norm = float(torch.linalg.vector_norm(self._landscape.gradient(self._theta)))
        return replace(
            super().facts(), loss=self._landscape.value(self._theta), gradient_norm=gradient_norm
        )
