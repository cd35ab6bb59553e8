"""How many products and how much time a certified index takes, against its resolution.

Trains the 784-10-10 perceptron on the bundled sample of MNIST with ReLU and with tanh, assembles
the Hessian once, and then asks for the index at one resolution after the other through products
alone. Beside each answer stand the true count, and the interval of plain stochastic Lanczos
quadrature for the same number of products, with its seconds.

By default the products are those of the diagonal matrix of the exact eigenvalues: Gaussian probes
look the same in every orthonormal basis, so the number of products has the same distribution, and
each product is a thousand times cheaper. ``--multiply-by network`` takes those of the network, as a
user would, whose seconds mean something; ``--multiply-by matrix`` those of the assembled matrix.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measuring import Times, interleaved, warm_up, write
from benchmarks.networks import trained
from hvpspec import DenseOperator, FunctionOperator, HessianOperator, eigvalsh, index
from hvpspec.linalg import SymmetricOperator
from hvpspec.spectrum import IndexResult
from hvpspec.zoo import load_data

#: Where the products come from: the eigenvalues, the assembled matrix, or the network.
KINDS = ("eigenvalues", "matrix", "network")
RATIOS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
#: Probes of plain quadrature; its steps are what the products then allow.
SLQ_PROBES = 10


@dataclass(frozen=True)
class Row:
    """One resolution of one network; ``tau`` is ``ratio`` times the largest eigenvalue."""

    activation: str
    multiply_by: str
    ratio: float
    truth: int
    lower: int
    upper: int
    num_matvecs: int
    slq_lower: int
    slq_upper: int
    times: Times
    slq_times: Times

    @property
    def certified(self) -> bool:
        """Whether the bracket closed within the budget."""
        return self.lower == self.upper


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--activations", nargs="+", default=["relu", "tanh"])
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--max-matvecs", type=int, default=6000)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--side", type=int, choices=(28, 14, 7), default=28, help="of images")
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--multiply-by", choices=KINDS, default=KINDS[0])
    parser.add_argument("--repeats", type=int, default=1, help="of the times")
    parser.add_argument("--out", type=Path, default=Path("out/index_products"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for activation in options.activations:
        A, values = problem(activation, options)
        for ratio in options.ratios:
            rows.append(measure(A, values, activation, ratio, options))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
            results = [asdict(row) for row in rows]
            write(options.out, "index_products", "float64", results, markdown(rows))
            figure(rows, options.side, options.out / "index_products.png")


def problem(activation: str, options: argparse.Namespace) -> tuple[SymmetricOperator, Tensor]:
    """Train a network; return its Hessian as an operator, and all its eigenvalues.

    These are kept in the folder of the results, for another call that multiplies by them.
    """
    kept = options.out / f"eigenvalues-{activation}-{options.epochs}-{options.side}.pt"
    kind = options.multiply_by
    if kind == "eigenvalues" and kept.exists():
        values = torch.load(kept, weights_only=True)
        return FunctionOperator(len(values), lambda v: values * v), values
    images = load_data("mnist-sample")
    task = trained("mlp2", activation, images, epochs=options.epochs, side=options.side)
    data = (task.inputs, task.targets)
    H = HessianOperator(task.model, nn.CrossEntropyLoss(), data, dtype=torch.float64)
    matrix = H.to_dense()
    values = eigvalsh(matrix)
    torch.save(values, kept)
    if kind == "eigenvalues":
        return FunctionOperator(len(values), lambda v: values * v), values
    if kind == "matrix":
        return DenseOperator(matrix), values
    for width in (1, SLQ_PROBES):
        warm_up(H, torch.randn(len(values), width, dtype=torch.float64))
    return H, values


def measure(
    A: SymmetricOperator,
    values: Tensor,
    activation: str,
    ratio: float,
    options: argparse.Namespace,
) -> Row:
    """Certify at one resolution, and give plain quadrature as many products."""
    tau = ratio * float(values[-1])
    results: dict[str, IndexResult] = {}

    def ask(method: str, **effort: int) -> None:
        results[method] = index(
            A,
            tau,
            method=method,
            confidence=options.confidence,
            generator=torch.Generator().manual_seed(options.seed),
            **effort,
        )

    def estimate() -> None:
        steps = max(1, results["certified"].num_matvecs // SLQ_PROBES)
        ask("quadrature", num_probes=SLQ_PROBES, num_steps=steps)

    def certify() -> None:
        ask("certified", max_matvecs=options.max_matvecs)

    ways = {"certified": certify, "quadrature": estimate}
    times = interleaved(ways, options.repeats)
    certified, plain = results["certified"], results["quadrature"]
    return Row(
        activation,
        options.multiply_by,
        ratio,
        int((values < -tau).sum()),
        certified.lower,
        certified.upper,
        certified.num_matvecs,
        plain.lower,
        plain.upper,
        times["certified"],
        times["quadrature"],
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line per resolution."""
    lines = [
        "| activation | tau / largest | true count | certified | products | seconds "
        "| plain quadrature | seconds | widths |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        answer = str(row.lower) if row.certified else f"[{row.lower}, {row.upper}]"
        plain = f"[{row.slq_lower}, {row.slq_upper}]"
        widths = f"{row.upper - row.lower}, {row.slq_upper - row.slq_lower}"
        lines.append(
            f"| {row.activation} | {row.ratio:.0e} | {row.truth} | {answer} | {row.num_matvecs:,} "
            f"| {row.times} | {plain} | {row.slq_times} | {widths} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], side: int, path: Path) -> None:
    """Draw products against tau, with the true counts written to them."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = canvas.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="resolution τ / largest eigenvalue",
        ylabel="Hessian-vector products",
        title=f"Products for a certified index of a {side**2}-10-10 network",
    )
    for number, activation in enumerate(dict.fromkeys(row.activation for row in rows)):
        mine = [row for row in rows if row.activation == activation]
        x, y = [row.ratio for row in mine], [row.num_matvecs for row in mine]
        axes.plot(x, y, color=f"C{number}", label=activation, zorder=1)
        for row in mine:
            above = row.num_matvecs == max(r.num_matvecs for r in rows if r.ratio == row.ratio)
            axes.plot(
                row.ratio,
                row.num_matvecs,
                "o",
                color=f"C{number}",
                markerfacecolor=f"C{number}" if row.certified else "white",
            )
            answer = str(row.lower) if row.certified else f"[{row.lower}, {row.upper}]"
            axes.annotate(
                answer,
                (row.ratio, row.num_matvecs),
                xytext=(0, 7 if above else -15),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=f"C{number}",
            )
    axes.plot([], [], "o", color="0.4", label="certified, with the index")
    axes.plot([], [], "o", color="0.4", markerfacecolor="white", label="budget spent, interval")
    axes.invert_xaxis()
    axes.margins(0.08, 0.12)
    axes.legend(frameon=False, fontsize=8)
    canvas.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
