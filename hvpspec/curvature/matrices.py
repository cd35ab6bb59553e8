"""The matrices of second derivatives of an objective: its Hessian and its Gauss-Newton matrix.

Each multiplies vectors in two ways. ``graph`` returns the graph that autograd makes of a chunk's
share, from which products are read off by reverse mode; ``product`` is a function to trace, which
pushes one vector forward, and returns the loss and the product's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from hvpspec.curvature.derivatives import differentiate
from hvpspec.curvature.objective import Term
from hvpspec.errors import InputError


class Hessian:
    """The second derivatives themselves.

    Reference:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    """

    def graph(self, term: Term, leaves: Mapping[str, Tensor]) -> _Gradient:
        """Return the gradient with its graph, of which ``<gradient, v>`` is differentiated."""
        return _Gradient.of(term.value, leaves)

    def product(
        self,
        network: Callable[[Sequence[Tensor]], Any],
        loss: Callable[[Sequence[Tensor], Any], Tensor],
        theta: Sequence[Tensor],
        v: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Push the vector forward through the gradient."""
        gradient = grad_and_value(lambda t: loss(t, network(t)))
        (_, value), (Hv, _) = cast(Any, jvp)(gradient, (theta,), (v,))
        return value, Hv


class GaussNewton:
    """``J^T (d^2 l / dz dz) J``, J the derivative of the outputs z: a linearised network's Hessian.

    Reference:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
        Computation 14 (2002).
    """

    def graph(self, term: Term, leaves: Mapping[str, Tensor]) -> _Linearised:
        """Return the graphs of ``J^T w`` for a dummy w and of the loss's gradient by z."""
        flat, structure = tree_flatten(term.outputs)
        outputs = {
            str(i): part
            for i, part in enumerate(flat)
            if isinstance(part, Tensor) and part.requires_grad
        }
        # Cut off from the network, so that what follows is differentiated by the outputs alone.
        z = {name: part.detach().requires_grad_() for name, part in outputs.items()}
        cut = [z.get(str(i), part) for i, part in enumerate(flat)]
        try:
            value = term.value_at(tree_unflatten(cut, structure))
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            # What the network had returned is lost.
            raise InputError(
                "the loss writes into the outputs, which are then no longer the network's; copy "
                "them first, outputs.clone()"
            ) from error
        if differentiate(value, leaves, retain_graph=True):
            raise InputError(
                f"the loss takes tensors from the network that are not found in its outputs, of "
                f"type {type(term.outputs).__name__}; return a tensor, or tensors in tuples, lists "
                "or dicts"
            )
        loss = _Gradient.of(value, z)
        used = {name: outputs[name] for name in outputs if name in loss.reached}
        w = {name: torch.zeros_like(part, requires_grad=True) for name, part in used.items()}
        pulled = differentiate(used.values(), leaves, list(w.values()), create_graph=True)
        return _Linearised(frozenset(pulled), leaves, used, w, pulled, loss)

    def product(
        self,
        network: Callable[[Sequence[Tensor]], Any],
        loss: Callable[[Sequence[Tensor], Any], Tensor],
        theta: Sequence[Tensor],
        v: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Push the vector forward through the network, and through the loss's gradient, and back.

        ``J^T`` is the transpose of what takes v to ``J v``: taken from the network itself, it would
        evaluate that once more.
        """

        def push(v: Sequence[Tensor]) -> tuple[Any, Any]:
            z, Jv = cast(Any, jvp)(network, (theta,), (v,))
            return Jv, z

        Jv, pull, z = cast(Any, vjp)(push, v, has_aux=True)
        (_, value), (HJv, _) = cast(Any, jvp)(grad_and_value(lambda z: loss(theta, z)), (z,), (Jv,))
        (Gv,) = pull(HJv)
        return value, Gv


@dataclass(frozen=True)
class _Gradient:
    """A gradient's parts that depend on the leaves, with their graph."""

    reached: frozenset[str]
    leaves: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]

    @classmethod
    def of(cls, value: Tensor, leaves: Mapping[str, Tensor]) -> _Gradient:
        """Differentiate a scalar."""
        gradient = differentiate(value, leaves, create_graph=True)
        # A gradient that no longer depends on the parameters has a zero derivative.
        parts = {name: g for name, g in gradient.items() if g.requires_grad}
        return cls(frozenset(gradient), leaves, parts)

    @property
    def ends(self) -> list[Tensor]:
        """The gradient."""
        return list(self.parts.values())

    def multiply(
        self, columns: Mapping[str, Tensor], *, batched: bool = False
    ) -> dict[str, Tensor]:
        """Differentiate ``<gradient, v>``, where v is zero in what has no column."""
        names = [name for name in self.parts if name in columns]
        return differentiate(
            [self.parts[name] for name in names],
            self.leaves,
            [columns[name] for name in names],
            retain_graph=True,
            batched=batched,
        )


@dataclass(frozen=True)
class _Linearised:
    """A network's derivative J and what the loss does with its outputs.

    Attributes:
        leaves: what J differentiates by.
        outputs: those that the loss depends on.
        w: a dummy for each of them.
        pulled: ``J^T w``, with its graph.
        loss: the loss's gradient by the outputs.
    """

    reached: frozenset[str]
    leaves: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    w: Mapping[str, Tensor]
    pulled: Mapping[str, Tensor]
    loss: _Gradient

    @property
    def ends(self) -> list[Tensor]:
        """All that is differentiated on the way of a vector."""
        if not (self.pulled and self.loss.parts):
            return []
        return [*self.pulled.values(), *self.loss.ends, *self.outputs.values()]

    def multiply(
        self, columns: Mapping[str, Tensor], *, batched: bool = False
    ) -> dict[str, Tensor]:
        """Multiply by J, as the derivative of ``<J^T w, v>`` by w, then by the rest."""
        Jv = differentiate(
            self.pulled.values(),
            self.w,
            [columns[name] for name in self.pulled],
            retain_graph=True,
            batched=batched,
        )
        HJv = self.loss.multiply(Jv, batched=batched)
        return differentiate(
            [self.outputs[name] for name in HJv],
            self.leaves,
            list(HJv.values()),
            retain_graph=True,
            batched=batched,
        )


Matrix = Hessian | GaussNewton
ProductGraph = _Gradient | _Linearised
