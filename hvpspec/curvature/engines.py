"""Ways to multiply one chunk's share of a matrix with a block of vectors, all of them exact.

Each does first what does not depend on the vectors, which can be kept from product to product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvpspec.curvature.data import Batch
from hvpspec.curvature.graph import nodes, refuse_known_faults
from hvpspec.curvature.matrices import Matrix, ProductGraph
from hvpspec.curvature.objective import Point
from hvpspec.curvature.parameters import add_parts_, aligned
from hvpspec.curvature.stage import as_found
from hvpspec.curvature.tracing import SplitProduct, split_product

#: Shapes of chunks that are traced; batches that all differ go the plain way.
_MOST_TRACES = 3


class Engine(ABC):
    """Multiplies by the share of a matrix that one chunk of the data contributes.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix of its second derivatives.

    Attributes:
        name: what a plan calls it.
        batched: whether it takes all vectors of a block at once.
        leaves: the parameters of the present pass, to differentiate by.
    """

    name: str
    batched: bool

    def __init__(self, point: Point, matrix: Matrix) -> None:
        self.point, self.matrix = point, matrix
        self.begin()

    def begin(self) -> None:
        """Take the parameters anew for a pass, whatever the model wrote into them on the last."""
        self.leaves = self.point.leaves()

    @abstractmethod
    def prepare(self, k: int, batch: Batch) -> Any:
        """Do what no vector is needed for; None if the chunk contributes nothing.

        Args:
            k: number of the chunk in a pass.
            batch: its examples.
        """

    def multiply(self, prepared: Any, V: Tensor) -> Tensor:
        """Multiply the rows of V, shape (b, n), by the chunk's share of the matrix."""
        product = torch.zeros_like(V)
        self.add_product_(product, prepared, V)
        return product

    @abstractmethod
    def add_product_(self, total: Tensor, prepared: Any, V: Tensor) -> None:
        """Add that product to the rows of ``total``, shape (b, n)."""

    def takes(self, batch: Batch) -> bool:
        """Whether a chunk can be multiplied."""
        return True

    @abstractmethod
    def size(self, prepared: Any) -> int:
        """The bytes that something prepared keeps alive."""


class DoubleBackward(Engine):
    """Differentiates first derivatives: one graph per chunk, shared by all vectors.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix of its second derivatives.
        batched: whether one backward pass takes all vectors, or each its own.

    Attributes:
        reached: names of the parameters that were found to have a path to the loss.
        num_nodes: of the graph on the first chunk, by which tracing takes longer.
    """

    def __init__(self, point: Point, matrix: Matrix, *, batched: bool = False) -> None:
        super().__init__(point, matrix)
        self.name = "batched double backward" if batched else "double backward"
        self.reached: set[str] = set()
        self.num_nodes = 0
        self.batched = batched

    def begin(self) -> None:
        """Take all parameters anew."""
        super().begin()
        self._tensors = self.point.objective.tensors(self.leaves)

    def prepare(self, k: int, batch: Batch) -> ProductGraph | None:
        """Return the graph."""
        term = self.point.term(k, batch, self._tensors)
        if term is None:
            return None
        graph = self.matrix.graph(term, self.leaves)
        self.reached |= graph.reached
        if graph.ends and not self.num_nodes:
            refuse_known_faults(graph.ends)
            self.num_nodes = len(nodes(graph.ends))
        return graph if graph.ends else None

    def add_product_(self, total: Tensor, prepared: ProductGraph, V: Tensor) -> None:
        """Read the products with the vectors off the graph."""
        for v, into in [(V, total)] if self.batched else zip(V, total, strict=True):
            columns = aligned(self.point.space, self.point.space.unflatten(v))
            parts = prepared.multiply(columns, batched=self.batched)
            add_parts_(into, self.point.space, parts)

    def size(self, prepared: ProductGraph) -> int:
        """The bytes that the graph saves."""
        return saved_bytes(prepared.ends)


@dataclass(frozen=True)
class _Residuals:
    """What products with one chunk's share of the matrix have in common.

    Attributes:
        split: the product for chunks of this shape.
        share: of the chunk in the point.
        tensors: what its second part takes beside vectors.
    """

    split: SplitProduct
    share: float
    tensors: list[Tensor]


class ForwardOverReverse(Engine):
    """Pushes vectors forward through derivatives, in a graph of tensor operations traced once.

    What does not depend on the vectors is split off, and done once per chunk.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix of its second derivatives.
        batch: a chunk to trace on.
        width: the number of vectors taken at once; None for one after the other.
        compiled: whether the part that depends on the vectors is compiled.

    Attributes:
        largest: bytes of the largest result that is allocated anew for every block.

    Raises:
        Exception: whatever an operation raises that cannot be traced or compiled.
    """

    def __init__(
        self,
        point: Point,
        matrix: Matrix,
        batch: Batch,
        width: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__(point, matrix)
        _refuse_objects(batch)
        way = "compiled " if compiled else "batched " if width is not None else ""
        self.name = f"{way}forward over reverse"
        self.batched = width is not None
        self._width = width
        split = self._trace(batch)
        self.largest = split.largest
        self._splits = {_kinds(batch): split.compiled() if compiled else split}

    def takes(self, batch: Batch) -> bool:
        """Whether a chunk has shapes that were traced, or will be."""
        if not batch.is_plain:
            return False
        return _kinds(batch) in self._splits or len(self._splits) < _MOST_TRACES

    def prepare(self, k: int, batch: Batch) -> _Residuals | None:
        """Evaluate what does not depend on the vectors."""
        kinds = _kinds(batch)
        if kinds not in self._splits:  # a shorter last chunk, which is not worth compiling
            self._splits[kinds] = self._trace(batch)
        split = self._splits[kinds]
        with torch.no_grad():
            loss, residuals = split.prepare([*self.leaves.values(), *batch.leaves])
        self.point.check(k, float(loss))
        share = self.point.share(k)
        # A mean over no target is 0/0, and so are its derivatives.
        return _Residuals(split, share, residuals) if share else None

    def add_product_(self, total: Tensor, prepared: _Residuals, V: Tensor) -> None:
        """Evaluate what does."""
        for v, into in [(V, total)] if self.batched else zip(V, total, strict=True):
            rows = aligned(self.point.space, self.point.space.unflatten(v))
            with torch.no_grad():  # contiguous, as when it was traced
                vectors = [part.contiguous() for part in rows.values()]
                parts = prepared.split.multiply(prepared.tensors, vectors)
            del vectors
            named = dict(zip(rows, parts, strict=True))
            add_parts_(into, self.point.space, named, prepared.share)

    def size(self, prepared: _Residuals) -> int:
        """The bytes of the intermediate results that are kept."""
        return _bytes(prepared.tensors)

    def _trace(self, batch: Batch) -> SplitProduct:
        """Trace the product with the matrix of a chunk's loss."""
        names, objective = list(self.leaves), self.point.objective
        parameters = objective.tensors(self.leaves)

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
        return split_product(product, arguments, len(names), self._width)


def saved_bytes(outputs: Iterable[Tensor]) -> int:
    """The bytes that the tensors which the nodes of a graph saved take."""
    saved = [
        value
        for node in nodes(outputs)
        for name in dir(node)
        if name.startswith("_saved_") and isinstance(value := getattr(node, name), Tensor)
    ]
    return _bytes(saved)


def _bytes(tensors: Iterable[Tensor]) -> int:
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


def _refuse_objects(batch: Batch) -> None:
    """Raise TypeError for a chunk with objects, of which a trace would keep those of one chunk."""
    if not batch.is_plain:
        raise TypeError("a chunk holds objects that are not tensors")


def _kinds(batch: Batch) -> tuple[Any, ...]:
    """Shapes, strides and dtypes of a batch's tensors, and the constants beside them."""
    tensors = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in batch.leaves)
    return (*tensors, *batch.others)
