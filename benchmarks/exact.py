"""The exact Hessian and the exact index of the paper's networks, beside other libraries.

Assembly of the perceptron's Hessian over all of the images in float64 is held against the floor of
55 Gram matrices ``X^T X`` (one for each pair of the hidden layer's outputs), timed in the same run,
and against the products with all unit vectors that curvlinops and torch.func take. These would run
for an hour: some of their columns over all of the images are checked, timed and scaled up, as the
table says. Assembly for the convolutional network is held against as many single products as it
has columns, and an LDL^T inertia against all eigenvalues by NumPy and by torch.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring import Times, interleaved, seconds_of, warm_up, write
from benchmarks.networks import Problem, trained
from benchmarks.peers import BLOCKS, block_products
from hvpspec import HessianOperator, inertia
from hvpspec.linalg.dense import live_block, pivot_signs
from hvpspec.zoo import load_data

#: Outputs of the hidden layer: all pairs of them have a block, of which half is the other's mirror.
NUM_OUTPUTS = 10
NUM_GRAMS = NUM_OUTPUTS * (NUM_OUTPUTS + 1) // 2


@dataclass(frozen=True)
class Case:
    """Of which Hessian a row speaks."""

    network: str
    activation: str
    data: str
    images: int
    n: int


@dataclass(frozen=True)
class Row:
    """One way to the answer, and its median time over that of the first way of the case."""

    case: Case
    way: str
    times: Times
    over_first: float
    remark: str = ""


@dataclass(frozen=True)
class Setting:
    """How a peer is used: examples in a batch, and columns in a block."""

    batch_size: int
    width: int


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    kinds = ("mlp2", "inertia", "cnn")
    add("--what", nargs="+", choices=kinds, default=list(kinds))
    add("--activations", nargs="+", default=["relu", "tanh"])
    add("--data", default="mnist", help="or mnist-sample, which is bundled (default: mnist)")
    add("--data-dir", type=Path, help="folder that holds MNIST/raw")
    add("--images", type=int, help="how many of the images (default: all)")
    add("--side", type=int, choices=(28, 14, 7), default=28, help="of mlp2's images, in pixels")
    add("--epochs", type=int, default=1, help="of training before")
    add("--repeats", type=int, default=3)
    add("--batch-sizes", nargs="+", type=int, default=[1000, 10_000], help="peers take the best")
    add("--widths", nargs="+", type=int, default=[16, 64, 256], help="blocks; peers take the best")
    add("--columns", type=int, default=128, help="of peers' Hessians that are timed")
    add("--tau", type=float, default=1e-5, help="of the index, in units of the norm")
    add("--out", type=Path, default=Path("out/exact"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for row in measure(options):
        rows.append(row)
        print(line(row), flush=True)
        results = [asdict(row) for row in rows]
        write(options.out, "exact", "float64", results, markdown(rows))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Measure all that was asked for."""
    images = load_data(options.data, data_dir=options.data_dir, subset=options.images)
    epochs, side = options.epochs, options.side
    for activation in options.activations:
        if not {"mlp2", "inertia"}.isdisjoint(options.what):
            problem = in_float64(trained("mlp2", activation, images, epochs=epochs, side=side))
            matrix = hessian(problem).to_dense()
            case = Case("mlp2", activation, images.name, len(images), len(matrix))
            if "mlp2" in options.what:
                yield from assembly(case, problem, matrix, options)
            if "inertia" in options.what:
                yield from counting(case, matrix, options)
            del matrix
        if "cnn" in options.what:
            problem = in_float64(trained("cnn", activation, images, epochs=epochs))
            case = Case("cnn", activation, images.name, len(images), size(problem))
            yield from products(case, problem, options)


def in_float64(problem: Problem) -> Problem:
    """The same with parameters and inputs in float64."""
    return replace(problem, model=problem.model.double(), inputs=problem.inputs.double())


def size(problem: Problem) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in problem.model.parameters())


def hessian(problem: Problem) -> HessianOperator:
    """A new operator, which has not multiplied yet."""
    return HessianOperator(problem.model, nn.CrossEntropyLoss(), (problem.inputs, problem.targets))


def assembly(
    case: Case, problem: Problem, matrix: Tensor, options: argparse.Namespace
) -> Iterator[Row]:
    """The perceptron's Hessian: ours, the floor, and the peers'."""
    n, X = case.n, problem.inputs.flatten(1)
    ways: dict[str, Callable[[], object]] = {
        "Gram": lambda: X.T @ X,
        "hvpspec": lambda: hessian(problem).to_dense(),
        "Gram again": lambda: X.T @ X,
    }
    remarks, shares = {}, {}
    for name in BLOCKS:
        setting = best_setting(name, problem, options)
        peer = block_products(problem, cut(problem, setting.batch_size))[name]
        blocks = sample(n, setting.width, options.columns)
        check(name, peer(unit(n, blocks[0])), matrix[:, blocks[0]])
        ways[name] = lambda peer=peer, blocks=blocks: [peer(unit(n, block)) for block in blocks]
        num_columns = sum(map(len, blocks))
        shares[name] = num_columns / n
        remarks[name] = (
            f"estimated from {num_columns} of {n:,} columns, in blocks of {len(blocks[0])}, "
            f"batches of {min(setting.batch_size, len(X)):,}"
        )
    times = interleaved(ways, options.repeats)
    ours = times["hvpspec"]
    yield Row(case, "hvpspec", ours, 1.0)
    floor = Times((*times["Gram"].seconds, *times["Gram again"].seconds)) * NUM_GRAMS
    remark = f"{NUM_GRAMS} times one X^T X, X of {len(X):,} x {X.shape[1]}"
    yield Row(case, "Gram matrices", floor, floor.median / ours.median, remark)
    for name in BLOCKS:
        whole = times[name] * (1 / shares[name])
        yield Row(case, name, whole, whole.median / ours.median, remarks[name])


def best_setting(name: str, problem: Problem, options: argparse.Namespace) -> Setting:
    """The setting at which a column is fastest, on as many images as the largest batch holds."""
    few = slice(max(options.batch_sizes))
    part = replace(problem, inputs=problem.inputs[few], targets=problem.targets[few])
    seconds = {}
    for setting in (Setting(b, w) for b in options.batch_sizes for w in options.widths):
        multiply = block_products(part, cut(part, setting.batch_size))[name]
        V = unit(size(part), sample(size(part), setting.width, 1)[0])
        multiply(V)
        seconds[setting] = seconds_of(lambda multiply=multiply, V=V: multiply(V)) / V.shape[1]
        print(f"{name}: {setting}: {seconds[setting]:.2e} seconds a column", flush=True)
    return min(seconds, key=seconds.__getitem__)


def sample(n: int, width: int, num_columns: int) -> list[Tensor]:
    """Blocks of column indices, about so many in all, spread evenly over the matrix."""
    width = min(width, n)
    num_blocks = max(1, min(num_columns, n) // width)
    columns = torch.linspace(0, n - 1, num_blocks * width, dtype=torch.float64).long()
    return list(columns.split(width))


def unit(n: int, columns: Tensor) -> Tensor:
    """Unit vectors as columns."""
    V = torch.zeros(n, len(columns), dtype=torch.float64)
    V[columns, torch.arange(len(columns))] = 1
    return V


def cut(problem: Problem, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """The data in batches."""
    return replace(problem, batch_size=batch_size).batches


def check(name: str, columns: Tensor, expected: Tensor) -> None:
    """Stop if columns of the Hessian are others."""
    difference = float((columns - expected).norm() / expected.norm())
    if not difference < 1e-9:
        raise SystemExit(f"{name} differs by {difference:.1e}")


def counting(case: Case, matrix: Tensor, options: argparse.Namespace) -> Iterator[Row]:
    """The index of the perceptron's Hessian: by LDL^T, and by all eigenvalues."""
    values = np.linalg.eigvalsh(matrix.numpy())
    tau = options.tau * float(abs(values).max())
    truth = int((values < -tau).sum())

    def below() -> int:
        """As `hvpspec.index` counts: without rows that are zero, and for one sign."""
        live, _ = live_block(matrix)
        return pivot_signs(live, tau)[0]

    for name, count in {"one LDL^T": below(), "inertia": inertia(matrix, tau).negative}.items():
        if count != truth:
            raise SystemExit(f"{name} counts {count}, but {truth} eigenvalues are below -tau")
    times = interleaved(
        {
            "one LDL^T": below,
            "inertia: two LDL^T, both signs": lambda: inertia(matrix, tau),
            "numpy.linalg.eigvalsh": lambda: np.linalg.eigvalsh(matrix.numpy()),
            "torch.linalg.eigvalsh": lambda: torch.linalg.eigvalsh(matrix),
        },
        options.repeats,
    )
    first = times["one LDL^T"].median
    for way, t in times.items():
        yield Row(case, way, t, t.median / first, f"{truth} below {-options.tau:.0e} norms")


def products(case: Case, problem: Problem, options: argparse.Namespace) -> Iterator[Row]:
    """The convolutional network's Hessian: assembled, and by single products."""
    H, matrix = hessian(problem), hessian(problem).to_dense()
    columns = torch.tensor([0, case.n // 2])
    check("a product", H @ unit(case.n, columns), matrix[:, columns])
    v = unit(case.n, columns[:1])
    warm_up(H, v)
    ways = {"hvpspec": lambda: hessian(problem).to_dense(), "single": lambda: H @ v}
    times = interleaved(ways, options.repeats)
    ours, singles = times["hvpspec"], times["single"] * case.n
    yield Row(case, "hvpspec", ours, 1.0)
    plan = next(p for p in H.plan if p.num_vectors == 1)
    remark = f"{case.n} times one: {plan.engine}" + (", kept" if plan.kept else "")
    yield Row(case, "single products", singles, singles.median / ours.median, remark)


def line(row: Row) -> str:
    """One row of the table."""
    case = row.case
    head = [case.network, case.activation, f"{case.images:,} of {case.data}", f"{case.n:,}"]
    cells = [*head, row.way, str(row.times), f"{row.over_first:.2f}", row.remark]
    return "| " + " | ".join(cells) + " |"


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line per way."""
    head = "| network | activation | images | n | way | seconds | over the first | remark |"
    return "\n".join([head, "|---" * 8 + "|", *map(line, rows)]) + "\n"


if __name__ == "__main__":
    main()
