"""Ways to multiply one chunk's share of a matrix with vectors, all of them exact.

A matrix of second derivatives, the Hessian or the Gauss-Newton matrix, multiplies in two ways.
``graph`` returns the graph that autograd makes of a chunk's share, from which products are read off
by reverse mode; ``product`` is a function to trace, which pushes one vector forward. An engine
takes one of the two, and first prepares what does not depend on the vectors, which can be kept from
product to product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from hvpspec.curvature.data import Batch
from hvpspec.curvature.graph import differentiate, nodes, refuse_known_faults
from hvpspec.curvature.linearise import linearise
from hvpspec.curvature.objective import Point, Term
from hvpspec.curvature.parameters import add_parts_, aligned
from hvpspec.curvature.stage import as_found
from hvpspec.errors import InputError

#: Shapes of chunks that are traced; tracing each of many would take longer than it saves.
_MOST_TRACES = 3


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


class Engine(ABC):
    """Multiplies by the share of a matrix that one chunk of the data contributes.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix of its second derivatives.

    Attributes:
        leaves: the parameters of the present pass, to differentiate by.
        tensors: all parameters, selected or not.
    """

    def __init__(self, point: Point, matrix: Matrix) -> None:
        self.point, self.matrix = point, matrix
        self.begin()

    def begin(self) -> None:
        """Take the parameters anew for a pass, whatever the model wrote into them on the last."""
        self.leaves = self.point.leaves()
        self.tensors = self.point.objective.tensors(self.leaves)

    @abstractmethod
    def prepare(self, k: int, batch: Batch) -> Any:
        """Do what needs no vector, for chunk ``k`` of a pass; None if its share is zero."""

    @abstractmethod
    def add_product_(self, total: Tensor, prepared: Any, V: Tensor) -> None:
        """Add products with a chunk's share of the matrix.

        Args:
            total: shape (n,) or (b, n), as V.
            prepared: what was prepared for the chunk.
            V: a vector, or the rows of a block that is taken at once.
        """

    def takes(self, batch: Batch) -> bool:
        """Whether a chunk can be multiplied."""
        return True

    @abstractmethod
    def size(self, prepared: Any) -> int:
        """The bytes that something prepared keeps alive."""


class DoubleBackward(Engine):
    """Differentiates the gradient: one graph per chunk, shared by all vectors.

    Attributes:
        reached: names of the parameters that were found to have a path to the loss.
    """

    def __init__(self, point: Point, matrix: Matrix) -> None:
        super().__init__(point, matrix)
        self.reached: set[str] = set()
        self._is_checked = False

    def prepare(self, k: int, batch: Batch) -> ProductGraph | None:
        """Return the graph."""
        term = self.point.term(k, batch, self.tensors)
        if term is None:
            return None
        graph = self.matrix.graph(term, self.leaves)
        self.reached |= graph.reached
        if not graph.ends:
            return None
        if not self._is_checked:
            refuse_known_faults(graph.ends)
            self._is_checked = True
        return graph

    def add_product_(self, total: Tensor, prepared: ProductGraph, V: Tensor) -> None:
        """Read the products off the graph."""
        space = self.point.space
        columns = aligned(space, space.unflatten(V))
        add_parts_(total, space, prepared.multiply(columns, batched=V.ndim == 2))

    def size(self, prepared: ProductGraph) -> int:
        """The bytes that the graph saves."""
        return bytes_of(saved(prepared.ends))


@dataclass(frozen=True)
class _Residuals:
    """What linearised products with one chunk's share of the matrix have in common.

    Attributes:
        multiply: the product for chunks of this shape, of the tensors and a vector's parts.
        tensors: what it takes beside vectors.
        share: of the chunk in the objective.
    """

    multiply: Callable[..., Sequence[Tensor]]
    tensors: list[Tensor]
    share: float


class Linearised(Engine):
    """Pushes vectors forward through the gradient, in a graph of tensor operations traced once.

    What does not depend on the vectors is split off, and done once per chunk.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix of its second derivatives.
        batch: a chunk to trace on.
        width: the number of vectors taken at once; None for one without a leading dimension.
        compiled: whether the part that depends on the vectors is compiled.

    Raises:
        Exception: whatever an operation raises that cannot be traced or compiled.
    """

    def __init__(
        self,
        point: Point,
        matrix: Matrix,
        batch: Batch,
        width: int | None,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(point, matrix)
        if not batch.is_plain:  # a trace would keep the objects of one chunk for all
            raise TypeError("a chunk holds objects that are not tensors")
        self._width = width
        first, second = self._trace(batch)
        if compiled:
            second = torch.compile(second, dynamic=False, fullgraph=True)
        self._traces = {_kinds(batch): (first, second)}

    def takes(self, batch: Batch) -> bool:
        """Whether a chunk has shapes that were traced, or will be."""
        if not batch.is_plain:
            return False
        return _kinds(batch) in self._traces or len(self._traces) < _MOST_TRACES

    def prepare(self, k: int, batch: Batch) -> _Residuals | None:
        """Evaluate what does not depend on the vectors."""
        kinds = _kinds(batch)
        if kinds not in self._traces:  # a shorter last chunk, which is not worth compiling
            self._traces[kinds] = self._trace(batch)
        first, second = self._traces[kinds]
        with torch.no_grad():
            loss, *residuals = first(*self.leaves.values(), *batch.leaves)
        self.point.check(k, float(loss))
        share = self.point.share(k)
        # A mean over no target is 0/0, and so are its derivatives.
        return _Residuals(second, residuals, share) if share else None

    def add_product_(self, total: Tensor, prepared: _Residuals, V: Tensor) -> None:
        """Evaluate what does."""
        space = self.point.space
        vectors = aligned(space, space.unflatten(V))
        with torch.no_grad():
            # Contiguous, as when it was traced.
            contiguous = [part.contiguous() for part in vectors.values()]
            parts = prepared.multiply(*prepared.tensors, *contiguous)
        add_parts_(total, space, dict(zip(vectors, parts, strict=True)), prepared.share)

    def size(self, prepared: _Residuals) -> int:
        """The bytes of the intermediate results that are kept."""
        return bytes_of(prepared.tensors)

    def _trace(self, batch: Batch) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Trace the product with the matrix of a chunk's loss."""
        names, objective, parameters = list(self.leaves), self.point.objective, self.tensors

        def product(
            theta: Sequence[Tensor], data: Sequence[Tensor], v: Sequence[Tensor]
        ) -> tuple[Tensor, Sequence[Tensor]]:
            tensors = iter(data)
            chunk = batch.map(lambda _: next(tensors))

            def all_of(theta: Sequence[Tensor]) -> dict[str, Tensor]:
                return {**parameters, **dict(zip(names, theta, strict=True))}

            def network(theta: Sequence[Tensor]) -> Any:
                return objective.outputs(all_of(theta), chunk)

            def loss(theta: Sequence[Tensor], outputs: Any) -> Tensor:
                return objective.loss_of(all_of(theta))(outputs, chunk.targets)

            with as_found(objective.modules):
                return self.matrix.product(network, loss, theta, v)

        arguments = [*(leaf.detach() for leaf in self.leaves.values()), *batch.leaves]
        return linearise(product, arguments, len(names), self._width)


def saved(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that the nodes of a graph saved."""
    return [
        value
        for node in nodes(outputs)
        for name in dir(node)
        if name.startswith("_saved_") and isinstance(value := getattr(node, name), Tensor)
    ]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes that tensors take, each counted once, and no more of a storage than there is.

    A chunk is a part of the data's storage, which counts for no more than the chunk.
    """
    parts: dict[int, dict[tuple[int, int], int]] = {}
    whole: dict[int, int] = {}
    for t in tensors:
        storage = t.untyped_storage()
        whole[storage.data_ptr()] = storage.nbytes()
        parts.setdefault(storage.data_ptr(), {})[t.data_ptr(), t.nbytes] = t.nbytes
    return sum(min(whole[at], sum(views.values())) for at, views in parts.items())


def _kinds(batch: Batch) -> tuple[Any, ...]:
    """Shapes, strides and dtypes of a batch's tensors, and the constants beside them."""
    tensors = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in batch.leaves)
    return (*tensors, *batch.others)
