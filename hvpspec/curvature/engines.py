"""Ways to multiply one chunk's share of a matrix with vectors, all of them exact.

Each first prepares what does not depend on the vectors, which can be kept from product to product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpspec.curvature.data import Batch
from hvpspec.curvature.graph import nodes, refuse_known_faults
from hvpspec.curvature.linearise import linearise
from hvpspec.curvature.matrices import Matrix, ProductGraph
from hvpspec.curvature.objective import Point
from hvpspec.curvature.parameters import add_parts_, aligned
from hvpspec.curvature.stage import as_found

#: Shapes of chunks that are traced; tracing each of many would take longer than it saves.
_MOST_TRACES = 3


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
