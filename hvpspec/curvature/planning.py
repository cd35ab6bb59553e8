"""The planner: which way of multiplying is fastest for this network, these data and this block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hvpspec.curvature.data import Batch
from hvpspec.curvature.engines import DoubleBackward, Engine, ForwardOverReverse
from hvpspec.curvature.trials import Trial, agree
from hvpspec.errors import HvpspecError, first_line
from hvpspec.linalg.memory import available_memory, give_back_freed, is_out_of_memory

#: Ways to multiply; "auto" starts with "double backward" and changes to what is faster by the
#: clock, "reproducible" to what usually is, once that pays by the arithmetic that was counted.
EngineName = Literal[
    "auto",
    "reproducible",
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
# Seconds of one vector on one chunk from which arithmetic is all that a block has to do: taking its
# vectors at once saves nothing, and to try it costs as long as the whole block.
_LONG = 1.0
# Where the same bits are wanted again, the width of blocks must not go by what other programs leave
# free, as long as it is so much.
_ENOUGH = 2**32
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
class Course:
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
class _Test:
    """What ways of multiplying are tried on.

    Attributes:
        k: number of the chunk.
        batch: its examples.
        V: block of vectors, shape (width, n).
        mix: mixtures of them, shape (2 or 1, width).
        expected: the product of the mixtures, by double backward.
        scale: see :func:`hvpspec.curvature.trials.agree`.
    """

    k: int
    batch: Batch
    V: Tensor
    mix: Tensor
    expected: Tensor
    scale: float


class Planner:
    """Chooses how blocks are multiplied, for each width of block apart.

    A first product was made by double backward. When products with blocks of some width would, with
    the next, have taken as long as a comparison, the ways of multiplying are timed on the first
    chunk; when they would have taken as long as tracing (and then compiling), that is tried, too.
    So a short run is not planned at all, and planning takes about half of any other at most. A way
    that does not agree with double backward on the first chunk is dropped with a warning.

    A plan that is to be reproducible has one step, to trace, and no clock decides when to take it.

    Args:
        plain: the engine of the first product.
        first_seconds: what that took, or for a reproducible plan would take.
        engine: one way for all products, "auto" or "reproducible".
        memory_budget: bytes for what is kept from product to product; None for a quarter of what is
            free when it is first asked for.
    """

    def __init__(
        self,
        plain: DoubleBackward,
        first_seconds: float,
        engine: str,
        memory_budget: int | None,
    ) -> None:
        self.plain = plain
        self._point, self._matrix = plain.point, plain.matrix
        self.widest = _MOST_VECTORS
        self._courses: dict[int, Course] = {}
        self._first_seconds = first_seconds
        self._wish, self._budget = engine, memory_budget
        self._cut = False

    @property
    def plans(self) -> tuple[Plan, ...]:
        """How products are made by now, for each width of block that was asked for."""
        return tuple(
            Plan(c.engine.name, width, c.num_examples, c.keep, dict(c.seconds), tuple(c.notes))
            for width, c in sorted(self._courses.items())
        )

    def took(self, course: Course, seconds: float) -> None:
        """Note what a product has taken."""
        if self._wish != "reproducible":
            course.expected = seconds
        course.spent += course.expected

    def course(self, V: Tensor) -> Course | None:
        """Tell how to multiply a block, shape (width, n); None if it has proved to be too wide."""
        width = len(V)
        course = self._courses.get(width)
        if course is None:
            course = Course(self.plain, self._steps(), expected=self._first_seconds * width)
            self._courses[width] = course
        # What is to come for certain is this block, at the present speed.
        while course.steps:
            price, step = min((self._price(step, width), step) for step in course.steps)
            if course.spent + course.expected < price:
                break
            course.steps.remove(step)
            self._take(step, course, V)
            give_back_freed()
        if width > self.widest:
            del self._courses[width]
            return None
        return course

    def forget(self) -> None:
        """Start anew, on other chunks."""
        self._courses = {}

    def _steps(self) -> list[str]:
        """What is to be tried."""
        steps = {"auto": list(_STEPS), "reproducible": ["trace"]}
        return steps.get(self._wish, [self._wish])

    def _price(self, step: str, width: int) -> float:
        """The seconds that a step of planning is expected to take; 0 for a way asked for."""
        least, per_node, blocks = _PRICES.get(step, (0.0, 0.0, 0.0))
        one_chunk = self._first_seconds * width / self._point.num_chunks
        return max(least, per_node * self.plain.num_nodes) + blocks * one_chunk

    def _take(self, step: str, course: Course, V: Tensor) -> None:
        """Take a step of planning: time some ways on the first chunk, and go the fastest."""
        course.spent = 0.0
        batching = len(V) > 1 and self._first_seconds / self._point.num_chunks < _LONG
        names = [
            name
            for name in _STEPS.get(step, (step,))
            if batching or not name.startswith("batched") or name == self._wish
        ]
        while names:
            large, names = self._time(names, course, V)
            if large is not None:
                self._cut_chunks(large, course, V)
        course.expected = min(course.seconds.values(), default=course.expected)

    def _time(
        self, names: list[str], course: Course, V: Tensor
    ) -> tuple[ForwardOverReverse | None, list[str]]:
        """Time some ways on the first chunk, and note the fastest.

        Returns:
            A way that may go better on smaller chunks, and those behind it, which were not timed.
        """
        with self._point.chunks() as chunks:
            test = self._test(chunks, V)
            if test is None:
                return None, []
            for number, name in enumerate(names, start=1):
                # One after the other takes no less where all at once is fast, but as long to trace.
                if name == "forward over reverse" and isinstance(course.engine, ForwardOverReverse):
                    continue
                engine = self._try(name, course, test)
                if isinstance(engine, ForwardOverReverse) and self._is_large(engine):
                    return engine, names[number:]
        return None, []

    def _test(self, chunks: Iterator[tuple[int, Batch]], V: Tensor) -> _Test | None:
        """Find what to try ways on; None where nothing can be gained, or the block is too wide."""
        counting = ((k, batch) for k, batch in chunks if self._point.share(k))
        k, batch = next(counting, (0, None))
        graph = self.plain.prepare(k, batch) if batch is not None else None
        if batch is None or graph is None:  # a constant gradient is as fast as can be
            return None
        # A block's intermediate results take about as much as so many graphs.
        free = available_memory(self._point.device)
        if self._wish != "auto":
            free = min(free, _ENOUGH)
        self.widest = min(self.widest, max(1, free // (4 * max(1, self.plain.size(graph)))))
        if len(V) > self.widest:
            return None
        # Not the block itself: it may lie where the matrix is zero, and all ways agree.
        generator = torch.Generator().manual_seed(0)
        V = torch.randn(V.shape, generator=generator).to(V)
        mix = torch.randn(min(2, len(V)), len(V), generator=generator).to(V)
        expected = self.plain.multiply(graph, mix @ V)
        scale = self._point.scale * float(torch.linalg.vector_norm(mix @ V))
        return _Test(k, batch, V, mix, expected, scale)

    def _try(self, name: str, course: Course, test: _Test) -> Engine | None:
        """Time one way, and take it if it is the fastest so far; None where it cannot be used."""
        try:
            engine = self._engine(name, test.batch, len(test.V))
            trial = Trial.of(engine, test.k, test.batch, test.V, test.mix)
        except Exception as error:  # an operation may be beyond a tracer in any way
            if isinstance(error, HvpspecError) or is_out_of_memory(error):
                raise
            course.notes.append(f"{name}: not possible here ({first_line(error)})")
            return None
        if not agree(trial.product, test.expected, test.scale, 2 * self._point.unit_roundoff):
            warnings.warn(
                f"{name} differs from double backward on the first chunk of the data and "
                "is not used; please report this network",
                UserWarning,
                stacklevel=2,
            )
            course.notes.append(f"{name}: differs from double backward")
            return None
        keep = trial.num_bytes * self._point.num_chunks <= self._room()
        seconds = trial.multiply_seconds + (0.0 if keep else trial.prepare_seconds)
        seconds *= self._point.num_chunks
        if seconds < min(course.seconds.values(), default=math.inf):
            course.engine, course.keep, course.num_examples = engine, keep, test.batch.num_examples
        course.seconds[name] = seconds
        return engine

    def _is_large(self, engine: ForwardOverReverse) -> bool:
        """Whether a block's intermediate results on a chunk are, and smaller chunks are untried."""
        # Where a way was asked for by its name, results must not depend on the clock.
        open_to_it = self._wish == "auto" and self._point.device.type == "cpu" and not self._cut
        return open_to_it and engine.largest > _LARGEST

    def _cut_chunks(self, engine: ForwardOverReverse, course: Course, V: Tensor) -> None:
        """Cut chunks so that a way's intermediate results are smaller, unless that is slower."""
        self._cut = True  # tried once: a size that does not go down with the chunk would go on
        pieces = math.ceil(engine.largest / _LARGEST)
        smaller = math.ceil(course.num_examples / pieces)  # of about equal length
        if smaller >= course.num_examples:
            return
        before, cut = self._point.data.chunk_size, Course(engine, [], math.inf)
        try:
            self._point.rechunk(smaller)
            self._time([engine.name], cut, V)
        except Exception as error:  # examples that belong together, or tensors that are for all
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            course.notes.append(f"chunks of {smaller} examples: not possible here ({reason})")
        # They also take less memory, and win what is within a trial's accuracy.
        least = min(cut.seconds.values(), default=math.inf)
        if least >= 1.1 * min(course.seconds.values()):
            self._point.rechunk(before)
            return
        note = f"chunks of {smaller} examples in place of {course.num_examples}"
        course.engine, course.keep, course.num_examples = cut.engine, cut.keep, cut.num_examples
        course.seconds |= cut.seconds
        course.notes += [*cut.notes, note]
        self._courses = {len(V): course}  # what was found out for other widths held for others

    def _engine(self, name: str, batch: Batch, width: int) -> Engine:
        """Make the engine of a name, for a first chunk and a width."""
        if name == "double backward":
            return self.plain
        if name == "batched double backward":
            return DoubleBackward(self._point, self._matrix, batched=True)
        if name == "forward over reverse":
            return ForwardOverReverse(self._point, self._matrix, batch)
        compiled = name.startswith("compiled")
        return ForwardOverReverse(self._point, self._matrix, batch, width, compiled=compiled)

    def _room(self) -> float:
        """The bytes that what is kept may take."""
        if self._budget is None:
            self._budget = available_memory(self._point.device) // 4
        return self._budget
