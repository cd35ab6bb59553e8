"""How the time and the memory of a density grow with parameters, with data and with steps.

Perceptrons with random weights on random examples, float32. Each point is measured in a process of
its own: the seconds of a density with its plan warm, the share of them that went into anything but
Hessian-vector products, and by how much the process grew at most, from the first product on and
with all planning. Beside it stands what has to be there: the Lanczos basis, and the graph of one
product on one chunk, which is the growth of another process that makes one in plain PyTorch.

Memory is the resident set, whose peak Linux can reset. Other systems know the peak of the whole
process, which is too large where an earlier step took more.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Times, seconds_of, warm_up, write
from hvpspec import HessianOperator, spectral_measure

#: What every point needs.
LOADED = ["benchmarks.growth", "torch.fx.experimental.proxy_tensor", "hvpspec.curvature"]

NUM_CLASSES = 10
#: Square layers, which hold nearly all of the parameters.
NUM_SQUARE = 3
#: The field of a point that a ladder climbs; the last has no order to fit.
LADDERS = {"parameters": "parameters", "data": "examples", "steps": "steps", "densities": None}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Point:
    """What is measured: a network of about so many parameters, its data, and a density."""

    parameters: int
    examples: int
    probes: int
    steps: int
    chunk_size: int
    memory_budget: int | None


TINY = Point(1000, 8, 2, 3, 8, None)


@dataclass(frozen=True)
class Cost:
    """What the density of a point took once.

    Attributes:
        n: the number of parameters, exactly.
        seconds: of the density.
        product_seconds: of these, inside of products.
        peak: bytes by which the process grew at most.
        basis: bytes of the Lanczos vectors.
        engine: how products were made.
    """

    n: int
    seconds: float
    product_seconds: float
    peak: int
    basis: int
    engine: str


@dataclass(frozen=True)
class Row:
    """A point of a ladder, with what it cost each time, and the bytes of one chunk's graph."""

    ladder: str
    point: Point
    costs: list[Cost]
    graph: int

    @property
    def seconds(self) -> Times:
        """Of the density."""
        return Times(tuple(cost.seconds for cost in self.costs))

    @property
    def rest_seconds(self) -> Times:
        """Of all that is not a product."""
        return Times(tuple(cost.seconds - cost.product_seconds for cost in self.costs))

    @property
    def overhead(self) -> Times:
        """The share of all that is not a product, in per cent."""
        return Times(tuple(100 * (1 - c.product_seconds / c.seconds) for c in self.costs))

    @property
    def peak(self) -> int:
        """Bytes by which the process grew, at most in any repeat."""
        return max(cost.peak for cost in self.costs)


def main() -> None:
    """Run from the command line."""

    def whole(text: str) -> int:
        return int(float(text))

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--ladders", nargs="+", choices=LADDERS, default=list(LADDERS))
    sizes = [10**k for k in range(4, 9)]
    add("--parameters", nargs="+", type=whole, default=sizes, help="64 examples, 1 probe x 10")
    examples = [1000, 2000, 4000, 8000, 16000]
    add("--examples", nargs="+", type=whole, default=examples, help="1 probe x 20 steps")
    add("--steps", nargs="+", type=whole, default=[10, 20, 50, 100, 200], help="1 probe")
    add("--densities", nargs="+", default=["8x20", "8x100"], help="probes x steps")
    add("--size", type=whole, default=10**6, help="parameters, where they do not vary")
    add("--data", type=whole, default=1000, help="examples, where they do not vary")
    add("--chunk-size", type=whole, default=1000, help="examples in one graph")
    add("--budgets", nargs="+", default=["default", "0"], help="bytes kept between products")
    add("--repeats", type=int, default=3)
    add("--out", type=Path, default=Path("out/growth"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    graphs: dict[tuple[int, int], int] = {}
    for ladder in options.ladders:
        points = [
            replace(point, memory_budget=None if budget == "default" else int(budget))
            for budget in options.budgets
            for point in climb(ladder, options)
        ]
        for point in points:
            if one_chunk(point) not in graphs:
                graphs[one_chunk(point)] = in_new_process(graph_bytes, point)
        mine = [Row(ladder, point, [], graphs[one_chunk(point)]) for point in points]
        for _ in range(options.repeats):
            for row in mine:
                row.costs.append(in_new_process(density, row.point))
                print(line(row), flush=True)
                done = [*rows, *(r for r in mine if r.costs)]
                results = [asdict(r) for r in done]
                write(options.out, "growth", "float32", results, markdown(done))
        rows += mine


def climb(ladder: str, options: argparse.Namespace) -> list[Point]:
    """The points of a ladder, from the lowest to the highest."""
    base = Point(options.size, options.data, 1, 20, options.chunk_size, None)
    if ladder == "parameters":
        few = replace(base, examples=64, steps=10)
        return [replace(few, parameters=p) for p in sorted(options.parameters)]
    if ladder == "data":
        return [replace(base, examples=e) for e in sorted(options.examples)]
    if ladder == "steps":
        return [replace(base, steps=s) for s in sorted(options.steps)]
    pairs = [map(int, text.split("x")) for text in options.densities]
    return [replace(base, probes=probes, steps=steps) for probes, steps in pairs]


def one_chunk(point: Point) -> tuple[int, int]:
    """What the graph of one chunk depends on."""
    return point.parameters, min(point.examples, point.chunk_size)


def in_new_process(measure: Callable[[Point], Result], point: Point) -> Result:
    """Measure a point where nothing has been allocated before."""
    # A copy of a process that has loaded the code, which takes longer than small points do.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LOADED)
    with ProcessPoolExecutor(1, server) as pool:
        return pool.submit(measure, point).result()


class TimedHessian(HessianOperator):
    """A Hessian that adds up the seconds of its products."""

    product_seconds = 0.0

    def _matmat(self, V: Tensor) -> Tensor:
        start = time.perf_counter()
        product = super()._matmat(V)
        self.product_seconds += time.perf_counter() - start
        return product


def density(point: Point) -> Cost:
    """Run a density cold, and again when the fastest engine is ready."""
    warnings.simplefilter("ignore")
    for engine in ("batched", "linearised"):
        run_density(operator(TINY, engine=engine), TINY)  # to load all code that takes part
    H = operator(point)
    before = reset_peak()
    run_density(H, point)
    warm_up(H, torch.randn(H.shape[0], point.probes))
    H.product_seconds = 0.0
    seconds = seconds_of(lambda: run_density(H, point))
    peak = peak_bytes() - before
    # Of a probe all m vectors are kept, and the next, which follows from the last.
    kept = min(point.steps, H.shape[0]) + 1
    basis = point.probes * kept * H.shape[0] * H.dtype.itemsize
    plan = next(p for p in H.plan if p.num_vectors == point.probes)
    engine = plan.engine + (", kept" if plan.kept else "")
    return Cost(H.shape[0], seconds, H.product_seconds, peak, basis, engine)


def run_density(H: HessianOperator, point: Point) -> None:
    """The density that is measured."""
    spectral_measure(H, point.probes, point.steps, generator=torch.Generator().manual_seed(0))


def operator(point: Point, **options: Any) -> TimedHessian:
    """The Hessian of a point's problem."""
    if point.memory_budget is not None:
        options["memory_budget"] = point.memory_budget
    model, data = problem(point)
    return TimedHessian(model, nn.CrossEntropyLoss(), data, chunk_size=point.chunk_size, **options)


def graph_bytes(point: Point) -> int:
    """By how much a process grows that multiplies by the Hessian on one chunk, in plain PyTorch."""
    for each in (TINY, point):  # the first loads all code that takes part
        model, (inputs, targets) = problem(each)
        parameters = list(model.parameters())
        vector = [torch.randn_like(p) for p in parameters]
        chunk = slice(each.chunk_size)
        before = reset_peak()
        loss = F.cross_entropy(model(inputs[chunk]), targets[chunk])
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        product = torch.autograd.grad(gradient, parameters, vector)
        grown = peak_bytes() - before
        del loss, gradient, product
    return grown


def problem(point: Point) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A perceptron of that size, always the same, and examples."""
    torch.manual_seed(0)
    width = max(1, round(math.sqrt(point.parameters / NUM_SQUARE)))
    layers: list[nn.Module] = []
    for _ in range(NUM_SQUARE):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))
    inputs = torch.randn(point.examples, width)
    return model, (inputs, torch.randint(NUM_CLASSES, (point.examples,)))


def reset_peak() -> int:
    """Measure peaks from now on, where the system can; return the present bytes."""
    gc.collect()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most that has been resident."""
    if sys.platform == "linux":
        # Not the resource usage, in which a process starts with its parent's peak.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def line(row: Row) -> str:
    """One row of the table."""
    point, cost = row.point, row.costs[-1]
    cells = [
        row.ladder,
        f"{cost.n:,}",
        f"{point.examples:,}",
        f"{point.probes} x {point.steps}",
        "as fits" if point.memory_budget is None else f"{point.memory_budget:,}",
        cost.engine,
        str(row.seconds),
        f"{row.overhead}%",
        *(f"{num_bytes / 1e6:.1f}" for num_bytes in (row.peak, cost.basis, row.graph)),
        f"{row.peak / (cost.basis + row.graph):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line per point, and one of the fitted exponents."""
    head = "| ladder | n | examples | probes x steps | kept, at most | way | seconds "
    head += "| not products | peak, MB | basis, MB | graph, MB | peak / (basis + graph) |"
    lines = [head, "|---" * 12 + "|", *map(line, rows), ""]
    lines += [
        "| ladder | kept, at most | points | seconds | not products | peak |",
        "|---" * 6 + "|",
    ]
    for ladder in dict.fromkeys(row.ladder for row in rows if LADDERS[row.ladder]):
        for budget in dict.fromkeys(r.point.memory_budget for r in rows if r.ladder == ladder):
            mine = [r for r in rows if r.ladder == ladder and r.point.memory_budget == budget]
            lines += exponents(ladder, mine)
    return "\n".join(lines) + "\n"


def exponents(ladder: str, rows: Sequence[Row]) -> list[str]:
    """Lines with the exponents of a ladder: of all its points, and of the largest three."""
    lines = []
    for what, chosen in {f"all {len(rows)}": rows, "largest 3": rows[-3:]}.items():
        if len(chosen) < (2 if chosen is rows else 3):
            continue
        field = LADDERS[ladder]
        x = [r.costs[0].n if field == "parameters" else getattr(r.point, field) for r in chosen]
        values = (
            [r.seconds.median for r in chosen],
            [r.rest_seconds.median for r in chosen],
            [float(r.peak) for r in chosen],
        )
        budget = rows[0].point.memory_budget
        kept = "as fits" if budget is None else f"{budget:,}"
        lines.append(" | ".join(["|", ladder, kept, what, *(exponent(x, y) for y in values), "|"]))
    return lines


def exponent(x: Sequence[float], y: Sequence[float]) -> str:
    """The k of ``y = c x^k``, by least squares in the logarithms."""
    return f"{np.polyfit(np.log(x), np.log(y), 1)[0]:.2f}"


if __name__ == "__main__":
    main()
