"""How many products a certified index takes, against its resolution.

Trains the 784-10-10 perceptron on the bundled sample of MNIST with ReLU and with tanh, assembles
the Hessian once, and then asks for the index at one resolution after the other through products
alone. Beside each answer stand the true count and the interval of plain stochastic Lanczos
quadrature for the same number of products.

By default the products are those of the diagonal matrix of the exact eigenvalues: Gaussian probes
look the same in every orthonormal basis, so the number of products has the same distribution, and
each product is a thousand times cheaper. ``--dense`` multiplies by the matrix itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvpspec import DenseOperator, FunctionOperator, HessianOperator, eigvalsh, index
from hvpspec.linalg import SymmetricOperator
from hvpspec.zoo import TrainingSettings, build_loss, load_data, mlp2, train

RATIOS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
#: Probes of plain quadrature; its steps are what the products then allow.
SLQ_PROBES = 10


@dataclass(frozen=True)
class Row:
    """One resolution of one network; ``tau`` is ``ratio`` times the largest eigenvalue."""

    activation: str
    ratio: float
    truth: int
    lower: int
    upper: int
    num_matvecs: int
    slq_lower: int
    slq_upper: int
    seconds: float

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
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--dense", action="store_true", help="multiply by the matrix itself")
    parser.add_argument("--out", type=Path, default=Path("out/index_products"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for activation in options.activations:
        A, values = problem(activation, options.epochs, options.out, dense=options.dense)
        for ratio in options.ratios:
            rows.append(measure(A, values, activation, ratio, options))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
            write(rows, options.out)


def problem(
    activation: str, epochs: int, folder: Path, *, dense: bool
) -> tuple[SymmetricOperator, Tensor]:
    """Train a network; return its Hessian as an operator, and all its eigenvalues, which are kept.

    Args:
        activation: of the hidden layer.
        epochs: of training.
        folder: where eigenvalues of an earlier call are looked for, and these are written.
        dense: whether the operator is the matrix itself, not one of the same eigenvalues.
    """
    kept = folder / f"eigenvalues-{activation}-{epochs}.pt"
    if dense or not kept.exists():
        model, data = mlp2(activation), load_data("mnist-sample")
        history = train(model, data, TrainingSettings(epochs=epochs))
        print(f"{activation}: trained to loss {history.loss:.4f}", flush=True)
        H = HessianOperator(model, build_loss("cross_entropy"), data.tensors, dtype=torch.float64)
        matrix = H.to_dense()
        if not kept.exists():
            torch.save(eigvalsh(matrix), kept)
    values = torch.load(kept, weights_only=True)
    if dense:
        return DenseOperator(matrix), values
    return FunctionOperator(len(values), lambda v: values * v), values


def measure(
    A: SymmetricOperator,
    values: Tensor,
    activation: str,
    ratio: float,
    options: argparse.Namespace,
) -> Row:
    """Certify at one resolution, and give plain quadrature as many products."""
    tau = ratio * float(values[-1])
    start = time.perf_counter()
    certified = index(
        A,
        tau,
        method="certified",
        confidence=options.confidence,
        max_matvecs=options.max_matvecs,
        generator=torch.Generator().manual_seed(options.seed),
    )
    seconds = time.perf_counter() - start
    plain = index(
        A,
        tau,
        method="slq",
        confidence=options.confidence,
        num_probes=SLQ_PROBES,
        num_steps=max(1, certified.num_matvecs // SLQ_PROBES),
        max_matvecs=certified.num_matvecs,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return Row(
        activation,
        ratio,
        int((values < -tau).sum()),
        certified.lower,
        certified.upper,
        certified.num_matvecs,
        plain.lower,
        plain.upper,
        round(seconds, 1),
    )


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write the results as JSON, as a table and as a figure."""
    text = json.dumps([asdict(row) for row in rows], indent=1)
    (folder / "index_products.json").write_text(text + "\n")
    (folder / "index_products.md").write_text(markdown(rows))
    figure(rows, folder / "index_products.png")


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line per resolution."""
    lines = [
        "| activation | tau / largest | true count | certified | products | plain quadrature |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        answer = str(row.lower) if row.certified else f"[{row.lower}, {row.upper}]"
        plain = f"[{row.slq_lower}, {row.slq_upper}]"
        lines.append(
            f"| {row.activation} | {row.ratio:.0e} | {row.truth} | {answer} | {row.num_matvecs:,} "
            f"| {plain} |"
        )
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw products against tau, with the true counts written to them."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = canvas.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="resolution τ / largest eigenvalue",
        ylabel="Hessian-vector products",
        title="Products for a certified index of a 784-10-10 network",
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
