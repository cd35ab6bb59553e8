"""What the scripts that take times and memory have in common."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvpspec import HessianOperator

PACKAGES = (
    "hvpspec",
    "numpy",
    "torch",
    "torchvision",
    "pyhessian",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
)


@dataclass(frozen=True)
class Times:
    """Seconds that the same work took, again and again."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def __mul__(self, factor: float) -> Times:
        return Times(tuple(factor * s for s in self.seconds))

    def __str__(self) -> str:
        if len(self.seconds) == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({min(self.seconds):.3g}–{max(self.seconds):.3g})"


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a table of Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(dtype: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package))},
    }


def _version(package: str) -> str | None:
    """Of a package, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """The seconds of each way, taken in turns so that all see the same machine."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            times[way].append(seconds_of(run))
            gc.collect()
    return {way: Times(tuple(t)) for way, t in times.items()}


def warm_up(H: HessianOperator, V: Tensor) -> None:
    """Multiply as if many more products were to come, so that the fastest engine is ready."""
    H.expect(10**12, V.shape[1])
    H @ V, H @ V


def write(folder: Path, name: str, dtype: str, rows: Sequence[Any], table: str) -> None:
    """Write rows as JSON, with the machine, and as a table."""
    result = {"machine": machine(dtype), "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
