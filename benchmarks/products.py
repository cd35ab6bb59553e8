"""What a Hessian-vector product and a density cost, beside other libraries.

Every network is measured on one batch in memory and on the same data in a list of batches. Times
are medians over interleaved repeats, in units of one gradient of the same loss on the same data,
per vector. hvpspec's plan is warm; what a cold start costs is shown for the density. All libraries
are compared with hvpspec's first product, and those that differ are marked.
"""

from __future__ import annotations

import argparse
import gc
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import interleaved, seconds_of, warm_up, write
from benchmarks.networks import NAMES, Problem, problem
from benchmarks.peers import peers
from hvpspec import HessianOperator, spectral_measure
from hvpspec.curvature.choice import EngineName

WIDTHS = (1, 8, 32)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--steps", nargs="*", type=int, default=[20])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--compiled", action="store_true", help="also compile, which takes a minute or more each"
    )
    parser.add_argument("--out", type=Path, default=Path("out/products"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        for where in ("memory", "streamed"):
            # Fused attention has no second derivative; only hvpspec switches to this by itself.
            with sdpa_kernel(SDPBackend.MATH):
                measure(name, where, options, rows)
            write(options.out, "products", "float32", rows, markdown(rows))


def measure(name: str, where: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Time products and densities of one network, and append a row for each."""
    task = problem(name)
    one = [(task.inputs, task.targets)]
    batches = one if where == "memory" else task.batches
    size = {"chunk_size": len(task.inputs)} if where == "memory" else {}
    n = sum(p.numel() for p in task.model.parameters())
    rivals = [] if options.no_peers else peers(task, batches)

    def operator(engine: EngineName = "auto") -> HessianOperator:
        data = one[0] if where == "memory" else batches
        return HessianOperator(task.model, nn.CrossEntropyLoss(), data, engine=engine, **size)

    H = operator()
    differing = check(H, rivals, n)
    for width in options.widths:
        V = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
        warm_up(H, V)
        ways: dict[str, Callable[[], object]] = {"gradient": lambda: gradient(task, batches)}
        ways["hvpspec"] = lambda V=V: H @ V
        if options.compiled:
            C = operator("compiled")
            warm_up(C, V)
            ways["hvpspec, compiled"] = lambda V=V, C=C: C @ V
        ways.update({peer.name: (lambda p=peer, V=V: p.matmat(V)) for peer in rivals})
        seconds = interleaved(ways, options.repeats)
        unit = seconds["gradient"].median
        cost = {way: t.median / unit / width for way, t in seconds.items() if way != "gradient"}
        plan = next(p for p in H.plan if p.num_vectors == width)
        row = {"network": name, "data": where, "n": n, "what": f"block of {width}"}
        row |= {"unit_seconds": unit, "engine": plan.engine, "kept": plan.kept, "cost": cost}
        row["seconds"] = {way: t.seconds for way, t in seconds.items()}
        row["differing"] = differing
        rows.append(row)
        print(line(row), flush=True)
    for steps in options.steps if where == "streamed" else ():
        density(task, name, operator, rivals, differing, options, steps, rows)


def density(
    task: Problem,
    name: str,
    operator: Callable[..., HessianOperator],
    rivals: Sequence[Any],
    differing: dict[str, float],
    options: argparse.Namespace,
    steps: int,
    rows: list[dict[str, Any]],
) -> None:
    """Time a whole density, cold and warm, once each, beside the rivals'."""
    probes = options.probes
    H = operator()

    def run(A: HessianOperator = H) -> object:
        return spectral_measure(A, probes, steps, generator=torch.Generator().manual_seed(0))

    cost = {"hvpspec, cold": seconds_of(run), "hvpspec": min(seconds_of(run), seconds_of(run))}
    if options.compiled:
        C = operator("compiled")
        run(C)
        cost["hvpspec, compiled"] = min(seconds_of(lambda: run(C)), seconds_of(lambda: run(C)))
    for peer in rivals:
        cost[peer.name] = seconds_of(lambda p=peer: p.density(probes, steps))
        gc.collect()
        if peer.block_density is not None:
            blocks = seconds_of(lambda p=peer: p.block_density(probes, steps))
            cost[f"{peer.name}, our Lanczos"] = blocks
    unit = seconds_of(lambda: gradient(task, task.batches))
    row = {"network": name, "data": "streamed", "n": H.shape[0], "unit_seconds": unit}
    row |= {"what": f"density, {probes} x {steps}, seconds", "cost": cost}
    plan = next(p for p in H.plan if p.num_vectors == probes)
    row |= {"engine": plan.engine, "kept": plan.kept, "differing": differing}
    rows.append(row)
    print(line(row), flush=True)


def check(H: HessianOperator, rivals: Sequence[Any], n: int) -> dict[str, float]:
    """By how much other libraries' products differ from ours, where it is more than round-off."""
    V = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    expected = H @ V
    differences = {p.name: float((p.matmat(V) - expected).norm() / expected.norm()) for p in rivals}
    differing = {name: size for name, size in differences.items() if size > 1e-4}
    for name, size in differing.items():
        print(f"{name} differs by {size:.1e}", flush=True)
    if differing and len(differing) == len(rivals):
        raise SystemExit("all other libraries differ, so that it is ours that is wrong")
    return differing


def gradient(task: Problem, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One gradient of the mean loss over all of the data."""
    parameters = list(task.model.parameters())
    for x, y in batches:
        loss = F.cross_entropy(task.model(x), y) * (len(x) / len(task.inputs))
        torch.autograd.grad(loss, parameters)


COLUMNS = (
    "hvpspec, cold",
    "hvpspec",
    "hvpspec, compiled",
    "PyHessian",
    "curvlinops",
    "hessian-eigenthings",
    "curvlinops, our Lanczos",
    "torch.func",
)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cost = row["cost"]
    differing = row.get("differing", {})
    cells = [
        f"{cost[x]:.2f}" + ("*" if x in differing else "") if x in cost else "" for x in COLUMNS
    ]
    rivals = [cost[x] for x in COLUMNS[3:6] if x in cost]
    factor = ""
    if rivals:
        warm = min(cost["hvpspec"], cost.get("hvpspec, compiled", math.inf))
        factor = f"{min(rivals) / warm:.1f} x"
        if "hvpspec, cold" in cost:
            factor += f" (cold {min(rivals) / cost['hvpspec, cold']:.1f} x)"
    engine = row["engine"] + (", kept" if row["kept"] else "")
    head = (row["network"], row["data"], row["what"], engine)
    return "| " + " | ".join([*head, *cells, factor]) + " |"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one line per network and width; a star marks products that are not ours."""
    names = ("network", "data", "what", "way", *COLUMNS, "against the fastest of three")
    head = "| " + " | ".join(names) + " |"
    return "\n".join([head, "|---" * len(names) + "|", *map(line, rows)]) + "\n"


if __name__ == "__main__":
    main()
