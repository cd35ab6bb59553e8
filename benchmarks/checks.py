"""What the checks before the first answer cost, in gradients of the same loss on the same data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.measuring import Times, table, write
from benchmarks.networks import NAMES, Problem, problem
from hvpspec import HessianOperator


def enlarged(p: Problem, factor: int) -> Problem:
    """The problem with its data, and so its batches, so many times."""
    inputs, targets = torch.cat([p.inputs] * factor), torch.cat([p.targets] * factor)
    return Problem(p.model, inputs, targets, factor * p.batch_size)


def seconds(network: str, factor: int, *, streamed: bool) -> tuple[float, float, float]:
    """CPU seconds of a first pass without checks, of one with them, and of a gradient, all warm.

    The first pass over the data, by which changes are known, is no part of the checks: a second
    operator of the same kind takes it as a loss.
    """
    p = enlarged(problem(network), factor)
    data = p.batches if streamed else (p.inputs, p.targets)
    H = HessianOperator(p.model, nn.CrossEntropyLoss(), data)
    start = time.process_time()
    H.check_symmetry()
    checked = time.process_time() - start
    H.gradient()
    start = time.process_time()
    H.gradient()
    gradient = time.process_time() - start
    point = H.objective.at(H.space.flatten(H.objective.leaves()).detach())
    start = time.process_time()
    point.value()
    return time.process_time() - start, checked, gradient


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/checks"),
    network: Annotated[list[str] | None, typer.Option(help="Repeatable; all by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Time the checks of each network, in memory and in a list of batches."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    # The data of large networks are few in the other benchmarks, and more where these are used.
    cases = [(name, 1) for name in network or NAMES]
    cases += [(name, 4) for name, _ in cases if name in ("gpt", "resnet18")]
    for name, factor in cases:
        for streamed in (False, True):
            taken = [seconds(name, factor, streamed=streamed) for _ in range(repeats)]
            costs = Times(tuple((checked - first) / g for first, checked, g in taken))
            rows.append(
                {
                    "network": name,
                    "examples": str(len(problem(name).inputs) * factor),
                    "data": "streamed" if streamed else "memory",
                    "gradient, seconds": f"{Times(tuple(g for _, _, g in taken)).median:.3g}",
                    "checks, gradients": str(costs),
                }
            )
            print(rows[-1], flush=True)
            write(out, "checks", "float32", rows, table(rows))


if __name__ == "__main__":
    typer.run(main)
