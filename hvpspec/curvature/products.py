"""Matrix-vector products over all of the data, made the way that is fastest here."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hvpspec.curvature.effort import Effort
from hvpspec.curvature.engines import DoubleBackward, Engine
from hvpspec.curvature.matrices import Matrix
from hvpspec.curvature.objective import Point
from hvpspec.curvature.planning import EngineName, Plan, Planner
from hvpspec.errors import DataChangedError, InputError


@dataclass(frozen=True)
class _Kept:
    """What an engine prepared, for all chunks.

    Attributes:
        engine: the engine of the plan.
        chunk_size: the most examples in a chunk.
        parts: for each chunk the engine that took it, and what it prepared.
        data: the tensors it was prepared from, with their versions.
    """

    engine: Engine
    chunk_size: int | None
    parts: list[tuple[Engine, Any]]
    data: list[tuple[Tensor, int]]


class Products:
    """Products with a matrix of second derivatives of a point, without the l2 term.

    One is made by double backward first, and the others as a :class:`Planner` tells.

    Args:
        point: the function, where it is looked at.
        matrix: which matrix.
        engine: one way for all products, "auto" or "reproducible".
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
        self._planner: Planner | None = None
        self._kept: _Kept | None = None

    @property
    def reached(self) -> set[str] | None:
        """Names of the parameters with a path to the loss; None before the first product."""
        return self._planner.plain.reached if self._planner is not None else None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """How products are made by now, for each width of block that was asked for."""
        return self._planner.plans if self._planner is not None else ()

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply the rows of V, shape (k, n), on smaller chunks if memory does not suffice.

        Raises:
            ComputationError: it does not suffice for a single example.
        """
        if self._planner is None:
            self._point.within_memory(self._point.require_products)
        return self._point.within_memory(lambda: self._multiply(V), self._forget)

    def _forget(self) -> None:
        """Let go of what was kept and planned for the former chunks."""
        self._kept = None
        if self._planner is not None:
            self._planner.forget()

    def _multiply(self, V: Tensor) -> Tensor:
        """Multiply the rows of V, parted into blocks that are not too wide."""
        if self._planner is None:
            start = time.perf_counter()
            plain = DoubleBackward(self._point, self._matrix)
            with Effort() if self._engine == "reproducible" else nullcontext() as effort:
                product = self._pass(plain, plain, V[:1], keep=False)
            seconds = effort.seconds if effort else time.perf_counter() - start
            # Only now that nothing was found that is to be refused.
            self._planner = Planner(plain, seconds, self._engine, self._memory_budget)
            # Where one way was asked for, its bits are.
            if len(V) == 1 and self._engine in ("auto", "reproducible", plain.name):
                return product
        num_blocks = math.ceil(len(V) / self._planner.widest)
        width = math.ceil(len(V) / num_blocks)
        if width * num_blocks > len(V):  # a block of another width would need a plan of its own
            rows = nn.functional.pad(V, (0, 0, 0, width * num_blocks - len(V)))
            return self._multiply(rows)[: len(V)]
        if num_blocks == 1:
            return self._multiply_block(V, self._planner)
        return torch.cat([self._multiply(block) for block in torch.split(V, width)])

    def _multiply_block(self, V: Tensor, planner: Planner) -> Tensor:
        """Multiply a block the way that is planned for its width."""
        course = planner.course(V)
        if course is None:
            return self._multiply(V)
        start = time.perf_counter()
        product = self._pass(course.engine, planner.plain, V, keep=course.keep)
        planner.took(course, time.perf_counter() - start)
        return product

    def _pass(self, engine: Engine, plain: Engine, V: Tensor, *, keep: bool) -> Tensor:
        """Add up the products with all chunks, from what was kept or anew.

        Args:
            engine: the way for all chunks that it takes.
            plain: the way for the others.
            V: block of vectors, shape (k, n).
            keep: whether to keep what does not depend on them.
        """
        total = torch.zeros_like(V)
        chunk_size = self._point.data.chunk_size
        kept = self._kept
        if kept is not None and (kept.engine, kept.chunk_size) == (engine, chunk_size):
            self._check_kept(kept)
            with self._point.placed():
                for part_of, prepared in kept.parts:
                    part_of.add_product_(total, prepared, V)
            return total
        if keep:
            self._kept = None  # what was kept for another way makes room
        parts: list[tuple[Engine, Any]] = []
        data: list[tuple[Tensor, int]] = []
        for each in {engine, plain}:
            each.begin()
        with self._point.chunks() as chunks:
            for k, batch in chunks:
                versions = [(tensor, tensor._version) for tensor in batch.leaves]
                # Tracing each of many shapes would take longer than it saves.
                own = engine if engine.takes(batch) else plain
                prepared = own.prepare(k, batch)
                if prepared is None:
                    continue
                own.add_product_(total, prepared, V)
                if keep:
                    parts.append((own, prepared))
                    data += versions
                del prepared  # before the next chunk's is made
        if keep:
            self._kept = _Kept(engine, chunk_size, parts, data)
        return total

    def _check_kept(self, kept: _Kept) -> None:
        """Raise DataChangedError if parameters or data are others than when parts were kept."""
        self._point.check_parameters()
        if any(tensor._version != version for tensor, version in kept.data):
            raise DataChangedError(
                "the data were changed in place between two products; make a new operator"
            )
