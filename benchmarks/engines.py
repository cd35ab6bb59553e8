"""What the rule that chooses an engine gains and costs, against double backward alone.

A density with a new operator each time, by the engine that is chosen and by double backward, taken
in turns; then with operators that have multiplied before. CPU seconds, the checks before the first
answer among those of new operators.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import write
from benchmarks.networks import NAMES, Problem, problem
from hvpspec import HessianOperator, spectral_measure

ENGINES = ("double-backward", "auto")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/engines"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        task = problem(name)
        for steps in options.steps:
            # Fused attention has no second derivative, and double backward is asked for by name.
            with sdpa_kernel(SDPBackend.MATH):
                rows.append(measure(task, options.probes, steps, options.repeats))
            rows[-1] = {"network": name, "density": f"{options.probes} x {steps}", **rows[-1]}
            print(line(rows[-1]), flush=True)
            write(options.out, "engines", "float32", rows, markdown(rows))


def measure(task: Problem, probes: int, steps: int, repeats: int) -> dict[str, Any]:
    """The CPU seconds of a density, cold and warm, by each engine in turn."""

    def run(H: HessianOperator) -> None:
        spectral_measure(H, probes, steps, generator=torch.Generator().manual_seed(0))

    def operator(engine: Any) -> HessianOperator:
        return HessianOperator(task.model, nn.CrossEntropyLoss(), task.batches, engine=engine)

    warm = {engine: operator(engine) for engine in ENGINES}
    cold: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    again: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for H in warm.values():
        run(H)
    for _ in range(repeats):
        for engine in ENGINES:
            cold[engine].append(cpu_seconds(lambda engine=engine: run(operator(engine))))
        for engine, H in warm.items():
            again[engine].append(cpu_seconds(lambda H=H: run(H)))
    plan = next(p for p in warm["auto"].plan if p.num_vectors == probes)
    return {
        "engine": f"{plan.engine}, {plan.at_once} at once",
        **{f"cold, {engine}": min(seconds) for engine, seconds in cold.items()},
        "cold ratio": ratio(cold),
        "warm ratio": ratio(again),
    }


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio(seconds: dict[str, list[float]]) -> float:
    """The chosen engine's time over double backward's, the median of pairs."""
    pairs = zip(seconds["auto"], seconds["double-backward"], strict=True)
    return statistics.median(ours / plain for ours, plain in pairs)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{value:.3g}" if isinstance(value, float) else value for value in row.values()]
    return "| " + " | ".join(cells) + " |"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one line per network and density."""
    head = "| " + " | ".join(rows[0]) + " |"
    return "\n".join([head, "|---" * len(rows[0]) + "|", *map(line, rows)]) + "\n"


if __name__ == "__main__":
    main()
