"""Matrix-vector products over all of the data, by the engine that a rule chooses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from hvpspec.curvature.choice import (
    UNANNOUNCED,
    Cost,
    Count,
    EngineName,
    Plan,
    choose,
    most_at_once,
)
from hvpspec.curvature.data import Batch
from hvpspec.curvature.engines import (
    DoubleBackward,
    Engine,
    Linearised,
    Matrix,
    ProductGraph,
    bytes_of,
    saved,
)
from hvpspec.curvature.graph import nodes
from hvpspec.curvature.objective import Point
from hvpspec.errors import DataChangedError, HvpspecError, InputError, first_line
from hvpspec.linalg.memory import available_memory, is_out_of_memory


@dataclass
class _Way:
    """How blocks of one width are multiplied.

    Attributes:
        name: of the engine.
        engine: what makes the products.
        at_once: the number of vectors that it takes at once.
        made: the number that were multiplied.
        review: the number after which the choice is made anew.
        keeps: whether what the engine prepares is kept where there is a next product.
    """

    name: str
    engine: Engine
    at_once: int
    made: int
    review: float = math.inf
    keeps: bool = False


@dataclass(frozen=True)
class _Kept:
    """What an engine prepared, for all chunks.

    Attributes:
        engine: for which it was prepared.
        chunk_size: the most examples in a chunk.
        parts: for each chunk the engine that took it, and what that prepared.
        data: the tensors it was prepared from, with their versions.
    """

    engine: Engine
    chunk_size: int | None
    parts: list[tuple[Engine, Any]]
    data: list[tuple[Tensor, int]]


class Products:
    """Products with a matrix of second derivatives at a point, without the l2 term.

    The choice of an engine rests on counted arithmetic and on the number of products to come, so
    that two runs choose alike. An engine other than plain double backward is first compared with
    it, on the first chunk; one that differs is dropped with a warning.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix.
        engine: one for all products, or "auto".
        memory_budget: bytes for what is kept from product to product; None for a quarter of what is
            free when it is first asked for.

    Raises:
        InputError: the engine is unknown or the budget negative.
    """

    def __init__(
        self, point: Point, matrix: Matrix, engine: str, memory_budget: int | None
    ) -> None:
        if engine not in get_args(EngineName):
            names = ", ".join(map(repr, get_args(EngineName)))
            raise InputError(f"engine must be one of {names}, got {engine!r}")
        if memory_budget is not None and memory_budget < 0:
            raise InputError(f"memory_budget must be at least 0 bytes, got {memory_budget}")
        self._point, self._matrix = point, matrix
        self._engine, self._memory_budget = engine, memory_budget
        self._plain: DoubleBackward | None = None
        self._announced: dict[int, int] = {}
        self._is_checked = False
        self._forget()

    def _forget(self) -> None:
        """Let go of what was kept, counted and chosen for the former chunks."""
        self._kept: _Kept | None = None
        self._cost: Cost | None = None
        self._ways: dict[int, _Way] = {}
        self._notes: dict[tuple[str, int], str] = {}

    @property
    def reached(self) -> set[str] | None:
        """Names of the parameters with a path to the loss; None before the first product."""
        return self._plain.reached if self._plain is not None else None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """How products are made by now, for each width of block that was asked for."""
        return tuple(
            Plan(way.name, width, way.at_once, way.keeps, tuple(self._notes.values()))
            for width, way in sorted(self._ways.items())
        )

    def expect(self, num_vectors: int, width: int) -> None:
        """Announce that so many vectors are to be multiplied, in blocks of some width."""
        if num_vectors > self._announced.get(width, 0):
            self._announced[width] = num_vectors
            way = self._ways.get(width)
            if way is not None and way.review < math.inf:
                way.review = 0

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply the rows of V, shape (k, n), on smaller chunks if memory does not suffice.

        Raises:
            DataChangedError: data or parameters are not those of the first pass.
            ComputationError: memory does not suffice for a single example.
        """
        if not self._is_checked:  # later changes are found in every product
            self._point.within_memory(self._point.require_products)
            self._is_checked = True
        return self._point.within_memory(lambda: self._multiply(V), self._forget)

    def _multiply(self, V: Tensor) -> Tensor:
        """Multiply with what was kept, or in a pass over the data."""
        way, kept = self._ways.get(len(V)), self._kept
        if way is not None and way.made >= way.review:
            assert self._cost is not None
            name, _ = next(self._candidates(self._cost, len(V), way.made))
            if name == way.name:
                way.review = self._review(len(V), way.made)
            else:
                way = None
        if way is None:
            return self._pass(V, None)
        if kept is None or kept.engine is not way.engine:
            return self._pass(V, way)
        if kept.chunk_size != self._point.data.chunk_size:
            return self._pass(V, way)
        self._point.check_parameters()
        if any(tensor._version != version for tensor, version in kept.data):
            raise DataChangedError(
                "the data were changed in place between two products; make a new operator"
            )
        product = torch.zeros_like(V)
        with self._point.placed():
            for engine, prepared in kept.parts:
                _add_product_(product, engine, prepared, V, way.at_once)
        way.made += len(V)
        return product

    def _pass(self, V: Tensor, way: _Way | None) -> Tensor:
        """Add up the products with all chunks.

        Args:
            V: block of vectors, shape (k, n).
            way: how to multiply; None to choose on the first chunk that counts.
        """
        product = torch.zeros_like(V)
        self._plain = plain = self._plain or DoubleBackward(self._point, self._matrix)
        if way is None or way.keeps:
            self._kept = None  # to make room
        width = len(V)
        # A single product has nothing to keep for: it takes the memory of one chunk.
        has_more = width in self._ways or self._announced.get(width, 0) > width
        for engine in {plain} if way is None else {plain, way.engine}:
            engine.begin()
        parts: list[tuple[Engine, Any]] = []
        data: list[tuple[Tensor, int]] = []
        with self._point.chunks() as chunks:
            for k, batch in chunks:
                versions = [(tensor, tensor._version) for tensor in batch.leaves]
                if way is None:
                    way, prepared = self._choose(plain, k, batch, width)
                    engine = plain if way is None else way.engine
                else:
                    engine = way.engine if way.engine.takes(batch) else plain
                    prepared = engine.prepare(k, batch)
                if way is None or prepared is None:
                    continue
                _add_product_(product, engine, prepared, V, way.at_once)
                if way.keeps and has_more:
                    parts.append((engine, prepared))
                    data += versions
                del prepared  # before the next chunk's is made
        # Where no chunk counts, there is nothing to choose by, and nothing to multiply.
        way = way or _Way("double-backward", plain, 1, made=0)
        if way.keeps and has_more:
            self._kept = _Kept(way.engine, self._point.data.chunk_size, parts, data)
        self._ways[width] = way
        way.made += width
        return product

    def _choose(
        self, plain: DoubleBackward, k: int, batch: Batch, width: int
    ) -> tuple[_Way | None, Any]:
        """Choose how to multiply blocks of some width, on the first chunk that counts.

        Returns:
            The way, and what its engine prepared for the chunk; None for both where the chunk's
            share of the matrix is zero, by which nothing can be chosen.
        """
        if self._cost is None:
            with Count() as count:
                graph = plain.prepare(k, batch)
            if graph is not None:
                self._cost = _cost(count, graph, [*batch.leaves, *plain.tensors.values()])
        else:
            graph = plain.prepare(k, batch)
        if graph is None or self._cost is None:
            return None, None
        made = self._ways[width].made if width in self._ways else 0
        engine: Engine = plain
        prepared: Any = graph
        for name, at_once in self._candidates(self._cost, width, made):
            if name == "double-backward":
                break
            found = self._try(name, at_once, plain, graph, k, batch)
            if found is not None:
                engine, prepared = found
                break
        way = _Way(name, engine, at_once, made)
        if self._engine == "auto" and engine is plain:
            way.review = self._review(width, made)
        if self._memory_budget is None:
            self._memory_budget = available_memory(self._point.device) // 4
        way.keeps = engine.size(prepared) * self._point.num_chunks <= self._memory_budget
        return way, prepared

    def _review(self, width: int, made: int) -> int:
        """When to choose anew: beyond what was announced, once as many have been made again."""
        return max(self._announced.get(width, 0), 2 * made + width)

    def _candidates(self, cost: Cost, width: int, made: int) -> Iterator[tuple[str, int]]:
        """The engines to try for blocks of some width, and the vectors that each takes at once."""
        device, name = self._point.device, self._engine
        at_once = most_at_once(cost, width, device)
        if name == "auto":
            expected = max(self._announced.get(width, 0), UNANNOUNCED * made)
            name = choose(cost, expected * self._point.num_chunks, device)
        if name in ("linearised", "compiled"):
            yield name, at_once
            if at_once > 1:  # an operation that takes no block may still take a vector
                yield name, 1
            name = choose(cost, 0, device)
        if name == "batched" and at_once > 1:
            yield name, at_once
        yield "double-backward", 1

    def _try(
        self,
        name: str,
        at_once: int,
        plain: DoubleBackward,
        graph: ProductGraph,
        k: int,
        batch: Batch,
    ) -> tuple[Engine, Any] | None:
        """Compare an engine with double backward on a chunk.

        Returns:
            The engine, and what it prepared; None where it cannot be used, which is noted.
        """
        if (name, at_once) in self._notes:
            return None
        point = self._point
        # Not the vectors that are to be multiplied: the matrix may be zero where they lie.
        # Two stand for a block of any width, unless the engine is traced for its width.
        count = min(at_once, 2) if name == "batched" else at_once
        generator = torch.Generator().manual_seed(0)
        V = torch.randn(count, point.space.dim, generator=generator).to(point.device, point.dtype)
        mix = torch.randn(1, count, generator=generator).to(V)
        expected, product = torch.zeros_like(V[:1]), torch.zeros_like(V)
        _add_product_(expected, plain, graph, mix @ V, 1)
        if not bool(torch.isfinite(expected).all()):
            return None  # nothing to compare with: whoever asked for the product will say so
        engine: Engine = plain
        prepared: Any = graph
        try:
            if name != "batched":
                width = at_once if at_once > 1 else None
                compiled = name == "compiled"
                engine = Linearised(point, self._matrix, batch, width, compiled=compiled)
                prepared = engine.prepare(k, batch)
            _add_product_(product, engine, prepared, V, count)
        except Exception as error:  # an operation may be beyond a tracer in any way
            if isinstance(error, HvpspecError) or is_out_of_memory(error):
                raise
            reason = f"not possible here ({first_line(error)})"
            self._notes[name, at_once] = f"{name}, {at_once} at once: {reason}"
            return None
        # To half the digits, which is far beyond round-off; where the product cancels, to the
        # round-off of a loss.
        eps = 2 * point.unit_roundoff
        size = torch.linalg.vector_norm
        allowed = math.sqrt(eps) * size(expected) + eps * point.scale * size(mix @ V)
        if not size(mix @ product - expected) <= allowed:
            warnings.warn(
                f"{name} products differ from those of double backward on the first chunk of the "
                "data and are not used; please report this network",
                UserWarning,
                stacklevel=2,
            )
            self._notes[name, at_once] = f"{name}, {at_once} at once: differs from double backward"
            return None
        return engine, prepared


def _cost(count: Count, graph: ProductGraph, fixed: Iterable[Tensor]) -> Cost:
    """What a product takes by double backward, from what making the graph took.

    Args:
        count: of the operations that made it.
        graph: the gradient's, on the first chunk.
        fixed: data and parameters, which are not multiplied by the number of vectors.
    """
    tensors, where = saved(graph.ends), {t.untyped_storage().data_ptr() for t in fixed}
    moving = [t for t in tensors if t.untyped_storage().data_ptr() not in where]
    return Cost(
        # Backward through the graph takes about twice what making it took.
        calls=2 * count.calls,
        arithmetic=2 * count.arithmetic,
        num_nodes=len(nodes(graph.ends)),
        largest=max((t.nbytes for t in moving), default=0),
        size=bytes_of(tensors),
    )


def _add_product_(total: Tensor, engine: Engine, prepared: Any, V: Tensor, at_once: int) -> None:
    """Add a chunk's products with the rows of V to those of ``total``, some of them at once."""
    if at_once == 1:
        for v, into in zip(V, total, strict=True):
            engine.add_product_(into, prepared, v)
        return
    for rows, into in zip(torch.split(V, at_once), torch.split(total, at_once), strict=True):
        if len(rows) == at_once:
            engine.add_product_(into, prepared, rows)
        else:  # a block of another width would need a trace of its own
            padded = torch.zeros_like(V[:at_once])
            padded[: len(rows)] = rows
            product = torch.zeros_like(padded)
            engine.add_product_(product, prepared, padded)
            into.add_(product[: len(rows)])
