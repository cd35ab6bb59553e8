"""A matrix of second derivatives of a risk: its Hessian.

It multiplies vectors in two ways: on a graph that autograd made, and as a function to trace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.func import grad_and_value, jvp

from hvpspec.curvature.derivatives import differentiate
from hvpspec.curvature.risk import Term


class ProductGraph(ABC):
    """A chunk's share of a matrix, as a graph that products with vectors are read off.

    Attributes:
        reached: names of the leaves with a path to the loss.
    """

    reached: frozenset[str]

    @property
    @abstractmethod
    def ends(self) -> list[Tensor]:
        """The tensors that are differentiated; none where the share is zero."""

    @abstractmethod
    def multiply(
        self, columns: Mapping[str, Tensor], *, batched: bool = False
    ) -> dict[str, Tensor]:
        """Multiply a vector, or a block of vectors along a leading dimension.

        Args:
            columns: the vector's part for each leaf.
            batched: whether there is a leading dimension.

        Returns:
            The product's parts, for the leaves in which it is not zero for certain.
        """


class Matrix(ABC):
    """A matrix of second derivatives, to be multiplied in one of two ways."""

    @abstractmethod
    def graph(self, term: Term, leaves: Mapping[str, Tensor]) -> ProductGraph:
        """Return a chunk's share of the matrix in some leaves, by reverse mode alone.

        Args:
            term: the chunk's share of the risk.
            leaves: tensors it was computed from, by name.
        """

    @abstractmethod
    def product(
        self,
        network: Callable[[Sequence[Tensor]], Any],
        loss: Callable[[Any], Tensor],
        theta: Sequence[Tensor],
        v: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Multiply a vector by the matrix of ``loss(network(theta))``, by forward mode and reverse.

        Returns:
            The loss and the product's parts.
        """


class Hessian(Matrix):
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
        loss: Callable[[Any], Tensor],
        theta: Sequence[Tensor],
        v: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Push the vector forward through the gradient."""
        gradient = grad_and_value(lambda t: loss(network(t)))
        (_, value), (Hv, _) = cast(Any, jvp)(gradient, (theta,), (v,))
        return value, Hv


@dataclass(frozen=True)
class _Gradient(ProductGraph):
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
