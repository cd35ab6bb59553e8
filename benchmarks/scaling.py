"""How a density goes faster, and takes less memory, in several processes.

Strong scaling shares out the same examples among more processes; weak scaling gives each as many.
Each process has one thread. Beside the time of a density, its plan warm, stands what of it each
process spent in talking to the others (which includes waiting for them), and what it keeps of the
Lanczos basis. Processes on cores that share caches and memory slow each other down by more than
that: what one density takes while the other cores do the same on their own shows by how much.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.measuring import Times, write
from hvpspec import HessianOperator, spectral_measure
from hvpspec.linalg.ranks import Ranks
from hvpspec.zoo import mlp2

SCALINGS = ("strong", "weak")

#: What processes have to do with each other.
TOGETHER, APART = "together", "each its own"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--scalings", nargs="+", choices=SCALINGS, default=SCALINGS)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/scaling"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for size in options.processes:
        for scaling in options.scalings:
            examples = options.examples // size if scaling == "strong" else options.examples
            for how in (TOGETHER, APART) if size > 1 else (TOGETHER,):
                row = {"scaling": scaling, "processes": size, "how": how, "examples": examples}
                row |= in_processes(size, how, examples, options)
                rows.append(row)
                print(line(row, rows[0]), flush=True)
                write(options.out, "scaling", "float32", rows, markdown(rows))


def in_processes(size: int, how: str, examples: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in so many processes, and take the slowest."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.scaling", "torch._inductor"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, server) as pool:
        jobs = [
            pool.submit(measure, rank, size, how, examples, folder, options) for rank in range(size)
        ]
        found = [job.result() for job in jobs]
    return max(found, key=lambda each: Times(tuple(each["seconds"])).median)


def measure(
    rank: int, size: int, how: str, examples: int, folder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Be one process of several."""
    torch.set_num_threads(1)
    store = f"file://{folder}/meeting"
    dist.init_process_group("gloo", store, timedelta(minutes=10), size, rank)
    talking = timed(Ranks, ("sum_", "gather"))  # by which all else is said
    generator = torch.Generator().manual_seed(rank)
    data = (
        torch.randn(examples, 1, 28, 28, generator=generator),
        torch.randint(10, (examples,), generator=generator),
    )
    group = dist.group.WORLD if how == TOGETHER and size > 1 else None
    # The same way in all processes and runs, so that the ratio is that of the processes alone.
    H = HessianOperator(
        mlp2("tanh"),
        nn.CrossEntropyLoss(),
        data,
        engine="linearised",
        group=group,
    )

    def density() -> None:
        """The whole of it."""
        probes = torch.Generator().manual_seed(0)
        spectral_measure(H, options.probes, options.steps, generator=probes)

    density()
    seconds, talked = [], []
    for _ in range(options.repeats):
        dist.barrier()
        talking[0], start = 0.0, time.perf_counter()
        density()
        seconds.append(time.perf_counter() - start)
        talked.append(talking[0])
    share = Ranks(group).share_size(H.shape[0])
    basis = options.probes * (options.steps + 1) * share * H.dtype.itemsize
    dist.destroy_process_group()
    return {"seconds": seconds, "talking": talked, "basis": basis}


def timed(kind: type, names: Sequence[str]) -> list[float]:
    """Add up the seconds that some methods take, in the list that is returned."""
    total = [0.0]

    def measured(method: Callable[..., Any]) -> Callable[..., Any]:
        """The method with a clock."""

        @wraps(method)
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result: Tensor | list[Any] = method(*args)
            total[0] += time.perf_counter() - start
            return result

        return run

    for name in names:
        setattr(kind, name, measured(getattr(kind, name)))
    return total


def line(row: dict[str, Any], alone: dict[str, Any]) -> str:
    """One row of the table."""
    seconds, one = Times(tuple(row["seconds"])), Times(tuple(alone["seconds"]))
    done, by_one = (r["processes"] * r["examples"] for r in (row, alone))
    cells = [
        row["scaling"],
        str(row["processes"]),
        row["how"],
        f"{row['examples']:,}",
        str(seconds),
        f"{one.median / seconds.median * done / by_one:.2f} x",
        f"{Times(tuple(row['talking'])).median / seconds.median:.1%}",
        f"{row['basis'] / 2**20:.1f} MiB",
    ]
    return "| " + " | ".join(cells) + " |"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of all rows; what the first does in a second is the measure of the others."""
    names = ["scaling", "processes", "data", "examples of each", "seconds"]
    names += ["work per second", "talking", "basis in each"]
    head = "| " + " | ".join(names) + " |"
    body = [line(row, rows[0]) for row in rows]
    return "\n".join([head, "|---" * len(names) + "|", *body]) + "\n"


if __name__ == "__main__":
    main()
