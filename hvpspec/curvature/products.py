"""Matrix-vector products over all of the data, made the way that is fastest here."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hvpspec.curvature.batches import Batch
from hvpspec.curvature.engines import DoubleBackward, Engine, ForwardOverReverse
from hvpspec.curvature.matrices import Matrix
from hvpspec.curvature.risk import EmpiricalRisk
from hvpspec.curvature.trials import Trial, agree
from hvpspec.errors import ComputationError, DataChangedError, HvpspecError, InputError
from hvpspec.linalg.memory import available_memory, give_back_freed

#: Ways to multiply; "auto" starts with the first and changes to what is faster.
EngineName = Literal[
    "auto",
    "double backward",
    "batched double backward",
    "forward over reverse",
    "batched forward over reverse",
    "compiled forward over reverse",
]

#: The widest block multiplied at once: wider ones gain little, and take as much more memory.
_MOST_VECTORS = 32
# Steps of planning: what each tries, and the seconds it is expected to take: at least, for each
# node of the gradient's graph, and for each second of a block on one chunk by plain double
# backward. It is taken only when the products would have taken as long.
_STEPS = {
    "compare": ("double backward", "batched double backward"),
    "trace": ("batched forward over reverse", "forward over reverse"),
    "compile": ("compiled forward over reverse",),
}
_PRICES = {
    "compare": (0.1, 0.0, 1.5),
    "trace": (0.8, 1.5e-2, 1.5),
    "compile": (60.0, 0.1, 0.5),
}
# The C library takes pieces of memory beyond 32 MB from the system each time, which clears them
# first: half of the time went there (mallopt(3), M_MMAP_THRESHOLD). Smaller ones stay in the cache.
_LARGEST = 2**24


@dataclass(frozen=True)
class Plan:
    """How products with blocks of one width are made.

    Attributes:
        engine: the way of multiplying.
        num_vectors: the width of the block.
        num_examples: in a chunk, of which the last may be shorter; 0 before ways were timed.
        kept: whether what does not depend on the vectors is kept from product to product.
        seconds: for each way that was tried, what a block takes over all of the data, by the time
            that it took on the first chunk.
        notes: which ways were dropped, and why.
    """

    engine: str
    num_vectors: int
    num_examples: int
    kept: bool
    seconds: dict[str, float]
    notes: tuple[str, ...]


@dataclass
class _Course:
    """The way that is taken for one width of block, and what is known of others.

    Attributes:
        engine: the way.
        steps: what remains to be tried.
        expected: seconds that the next product will take.
        num_examples: in a chunk, once ways were timed.
        keep: whether to keep what it prepares.
        spent: seconds of products since the last step.
        seconds: what each way that was tried takes for a block.
        notes: which ways were dropped, and why.
    """

    engine: Engine
    steps: list[str]
    expected: float
    num_examples: int = 0
    keep: bool = False
    spent: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Kept:
    """What an engine prepared, for all chunks.

    Attributes:
        engine: the engine of the plan.
        parts: for each chunk the engine that took it, and what it prepared.
        data: the tensors it was prepared from, with their versions.
    """

    engine: Engine
    parts: list[tuple[Engine, Any]]
    data: list[tuple[Tensor, int]]


class Products:
    """Products with a matrix of second derivatives of a risk, without the l2 term.

    The first is made by double backward. When products with blocks of some width would, with the
    next, have taken as long as a comparison, the ways of multiplying are timed on the first chunk;
    when they would have taken as long as tracing (and then compiling), that is tried, too. So a
    short run is not planned at all, and planning takes about half of any other at most. A way that
    does not agree with double backward on the first chunk is dropped with a warning.

    Args:
        risk: the function.
        matrix: which matrix.
        engine: one way for all products after the first, or "auto".
        memory_budget: bytes for what is kept from product to product; None for a quarter of what is
            free when it is first asked for.

    Raises:
        InputError: the engine is unknown or the budget negative.
    """

    def __init__(
        self, risk: EmpiricalRisk, matrix: Matrix, engine: str, memory_budget: int | None
    ) -> None:
        if engine not in get_args(EngineName):
            names = ", ".join(map(repr, get_args(EngineName)))
            raise InputError(f"engine must be one of {names}, got {engine!r}")
        if memory_budget is not None and memory_budget < 0:
            raise InputError(f"memory_budget must be at least 0 bytes, got {memory_budget}")
        self._risk, self._matrix = risk, matrix
        self._wish, self._budget = engine, memory_budget
        self._plain: DoubleBackward | None = None
        self._first_seconds = 0.0
        self._widest = _MOST_VECTORS
        self._courses: dict[int, _Course] = {}
        self._kept: _Kept | None = None
        self._cut = False
        self._longest = 0

    @property
    def reached(self) -> set[str] | None:
        """Names of the parameters with a path to the loss; None before the first product."""
        return self._plain.reached if self._plain is not None else None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """How products are made by now, for each width of block that was asked for."""
        return tuple(
            Plan(c.engine.name, width, c.num_examples, c.keep, dict(c.seconds), tuple(c.notes))
            for width, c in sorted(self._courses.items())
        )

    def multiply(self, V: Tensor) -> Tensor:
        """Multiply the rows of V, shape (k, n), on smaller chunks if memory does not suffice.

        Raises:
            ComputationError: it does not suffice for a single example.
        """
        while True:
            try:
                return self._multiply(V)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = _first_line(error)
            self._halve_chunks(reason)  # when what the error held on to is free again

    def _halve_chunks(self, reason: str) -> None:
        """Go on with half of the examples in a chunk, and say so."""
        self._kept, self._courses = None, {}
        if self._longest < 2:
            raise ComputationError(
                f"out of memory in a product on a single example ({reason}); multiply fewer "
                "vectors at once, or select fewer parameters with params=..."
            )
        smaller = math.ceil(self._longest / 2)
        warnings.warn(
            f"out of memory with {self._longest} examples in a chunk: going on with {smaller}",
            UserWarning,
            stacklevel=2,
        )
        self._longest = smaller
        try:
            self._risk.rechunk(smaller)
        except HvpspecError as error:
            raise ComputationError(
                f"out of memory ({reason}), and the examples cannot be parted ({error})"
            ) from error

    def _multiply(self, V: Tensor) -> Tensor:
        """Multiply the rows of V, parted into blocks that are not too wide."""
        if self._plain is None:
            start = time.perf_counter()
            plain = DoubleBackward(self._risk, self._matrix)
            product = self._pass(plain, V[:1], keep=False)
            self._plain = plain  # only now that it has found nothing to refuse
            self._first_seconds = time.perf_counter() - start
            if len(V) == 1:
                return product
        num_blocks = math.ceil(len(V) / self._widest)
        width = math.ceil(len(V) / num_blocks)
        if width * num_blocks > len(V):  # a block of another width would need a plan of its own
            rows = nn.functional.pad(V, (0, 0, 0, width * num_blocks - len(V)))
            return self._multiply(rows)[: len(V)]
        if num_blocks == 1:
            return self._multiply_block(V)
        return torch.cat([self._multiply_block(block) for block in torch.split(V, width)])

    def _multiply_block(self, V: Tensor) -> Tensor:
        """Multiply a block the way that is planned for its width, and go on planning."""
        assert self._plain is not None
        width = len(V)
        course = self._courses.get(width)
        if course is None:
            course = _Course(self._plain, self._steps(), expected=self._first_seconds * width)
            self._courses[width] = course
        # What is to come for certain is this block, at the present speed.
        while course.steps:
            price, step = min((self._price(step, width), step) for step in course.steps)
            if course.spent + course.expected < price:
                break
            course.steps.remove(step)
            self._take(step, course, V)
            give_back_freed()
            course = self._courses[width]
        if width > self._widest:  # as has just been found out
            del self._courses[width]
            return self._multiply(V)
        start = time.perf_counter()
        product = self._pass(course.engine, V, keep=course.keep)
        course.expected = time.perf_counter() - start
        course.spent += course.expected
        return product

    def _steps(self) -> list[str]:
        """What is to be tried."""
        return list(_STEPS) if self._wish == "auto" else [self._wish]

    def _price(self, step: str, width: int) -> float:
        """The seconds that a step of planning is expected to take; 0 for a way asked for."""
        assert self._plain is not None
        least, per_node, blocks = _PRICES.get(step, (0.0, 0.0, 0.0))
        one_chunk = self._first_seconds * width / self._risk.num_chunks
        return max(least, per_node * self._plain.num_nodes) + blocks * one_chunk

    def _take(self, step: str, course: _Course, V: Tensor) -> None:
        """Take a step of planning: time some ways on the first chunk, and go the fastest."""
        course.spent = 0.0
        names = [
            name
            for name in _STEPS.get(step, (step,))
            if len(V) > 1 or not name.startswith("batched") or name == self._wish
        ]
        while names:
            large = self._time(names, course, V)
            if large is not None:
                self._cut_chunks(large, course, V)
        course.expected = min(course.seconds.values(), default=course.expected)

    def _time(self, names: list[str], course: _Course, V: Tensor) -> ForwardOverReverse | None:
        """Time some ways on the first chunk, take them off the list, and note the fastest.

        Returns:
            A way that may go better on smaller chunks, before those behind it are timed.
        """
        assert self._plain is not None
        remaining, names[:] = list(names), []
        with self._risk.chunks() as chunks:
            counting = ((k, batch) for k, batch in chunks if self._risk.share(k))
            k, batch = next(counting, (0, None))
            graph = self._plain.prepare(k, batch) if batch is not None else None
            if batch is None or graph is None:  # a constant gradient is as fast as can be
                return None
            # A block's intermediate results take about as much as so many graphs.
            free = available_memory(self._risk.device)
            self._widest = min(self._widest, max(1, free // (4 * max(1, self._plain.size(graph)))))
            if len(V) > self._widest:
                return None
            # Not the block itself: it may lie where the matrix is zero, and all ways agree.
            generator = torch.Generator().manual_seed(0)
            V = torch.randn(V.shape, generator=generator).to(V)
            mix = torch.randn(min(2, len(V)), len(V), generator=generator).to(V)
            expected = self._plain.multiply(graph, mix @ V)
            scale = self._risk.reference.scale * float(torch.linalg.vector_norm(mix @ V))
            del graph
            for number, name in enumerate(remaining, start=1):
                # One after the other takes no less where all at once is fast, but as long to trace.
                if name == "forward over reverse" and isinstance(course.engine, ForwardOverReverse):
                    continue
                try:
                    engine = self._engine(name, batch, len(V))
                    trial = Trial.of(engine, k, batch, V, mix)
                except Exception as error:  # an operation may be beyond a tracer in any way
                    if isinstance(error, HvpspecError) or _is_out_of_memory(error):
                        raise
                    course.notes.append(f"{name}: not possible here ({_first_line(error)})")
                    continue
                if not agree(trial.product, expected, scale):
                    warnings.warn(
                        f"{name} differs from double backward on the first chunk of the data and "
                        "is not used; please report this network",
                        UserWarning,
                        stacklevel=2,
                    )
                    course.notes.append(f"{name}: differs from double backward")
                    continue
                keep = trial.num_bytes * self._risk.num_chunks <= self._room()
                seconds = trial.multiply_seconds + (0.0 if keep else trial.prepare_seconds)
                seconds *= self._risk.num_chunks
                if seconds < min(course.seconds.values(), default=math.inf):
                    course.engine, course.keep, course.num_examples = engine, keep, len(batch)
                course.seconds[name] = seconds
                if isinstance(engine, ForwardOverReverse) and self._is_large(engine):
                    names[:] = remaining[number:]
                    return engine
        return None

    def _is_large(self, engine: ForwardOverReverse) -> bool:
        """Whether a block's intermediate results on a chunk are, and smaller chunks are untried."""
        # Where a way was asked for by its name, results must not depend on the clock.
        open_to_it = self._wish == "auto" and self._risk.device.type == "cpu" and not self._cut
        return open_to_it and engine.largest > _LARGEST

    def _cut_chunks(self, engine: ForwardOverReverse, course: _Course, V: Tensor) -> None:
        """Cut chunks so that a way's intermediate results are smaller, unless that is slower."""
        self._cut = True  # tried once: a size that does not go down with the chunk would go on
        pieces = math.ceil(engine.largest / _LARGEST)
        smaller = math.ceil(course.num_examples / pieces)  # of about equal length
        if smaller >= course.num_examples:
            return
        before, cut = self._risk.data.chunk_size, _Course(engine, [], math.inf)
        try:
            self._risk.rechunk(smaller)
            self._time([engine.name], cut, V)
        except Exception as error:  # examples that belong together, or tensors that are for all
            if _is_out_of_memory(error):
                raise
            reason = _first_line(error)
            course.notes.append(f"chunks of {smaller} examples: not possible here ({reason})")
        # They also take less memory, and win what is within a trial's accuracy.
        least = min(cut.seconds.values(), default=math.inf)
        if least >= 1.1 * min(course.seconds.values()):
            self._risk.rechunk(before)
            return
        note = f"chunks of {smaller} examples in place of {course.num_examples}"
        course.engine, course.keep, course.num_examples = cut.engine, cut.keep, cut.num_examples
        course.seconds |= cut.seconds
        course.notes += [*cut.notes, note]
        self._kept = None
        self._courses = {len(V): course}  # what was found out for other widths held for others

    def _engine(self, name: str, batch: Batch, width: int) -> Engine:
        """Make the engine of a name, for a first chunk and a width."""
        assert self._plain is not None
        if name == "double backward":
            return self._plain
        if name == "batched double backward":
            return DoubleBackward(self._risk, self._matrix, batched=True)
        if name == "forward over reverse":
            return ForwardOverReverse(self._risk, self._matrix, batch)
        compiled = name.startswith("compiled")
        return ForwardOverReverse(self._risk, self._matrix, batch, width, compiled=compiled)

    def _room(self) -> float:
        """The bytes that what is kept may take."""
        if self._budget is None:
            self._budget = available_memory(self._risk.device) // 4
        return self._budget

    def _pass(self, engine: Engine, V: Tensor, *, keep: bool) -> Tensor:
        """Add up the products with all chunks, from what was kept or anew."""
        total = torch.zeros_like(V)
        if self._kept is not None and self._kept.engine is engine:
            self._check_kept()
            for part_of, prepared in self._kept.parts:
                part_of.add_product_(total, prepared, V)
            return total
        if keep:
            self._kept = None  # what was kept for another way makes room
        parts: list[tuple[Engine, Any]] = []
        data: list[tuple[Tensor, int]] = []
        for each in {id(e): e for e in (engine, self._plain) if e is not None}.values():
            each.begin()
        with self._risk.chunks() as chunks:
            for k, batch in chunks:
                self._longest = max(self._longest, len(batch))
                versions = [(tensor, tensor._version) for tensor in batch.leaves]
                # Tracing each of many shapes would take longer than it saves.
                own = engine if engine.takes(batch) or self._plain is None else self._plain
                prepared = own.prepare(k, batch)
                if prepared is None:
                    continue
                own.add_product_(total, prepared, V)
                if keep:
                    parts.append((own, prepared))
                    data += versions
                del prepared  # before the next chunk's is made
        if keep:
            self._kept = _Kept(engine, parts, data)
        return total

    def _check_kept(self) -> None:
        """Raise DataChangedError if parameters or data are others than when parts were kept."""
        assert self._kept is not None
        self._risk.check_parameters()
        if any(tensor._version != version for tensor, version in self._kept.data):
            raise DataChangedError(
                "the data were changed in place between two products; make a new operator"
            )


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice, for which PyTorch has no type on CPUs."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)
