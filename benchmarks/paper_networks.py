"""The certified index of the paper's networks against the inertia of their exact Hessians.

The three networks are trained on the bundled sample of MNIST by SGD and by Adam. At three
resolutions the certificate, from products in float64 and in float32, is held against LDL^T of the
dense float64 Hessian on the same 2,000 images. An eigenvalue within the noise floor of -tau may
lie on either side in the products that were seen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from hvpspec import HessianOperator, eigsh, index, inertia
from hvpspec.zoo import TrainingSettings, build_network, load_data, train

RATIOS = (1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Row:
    """One network at one resolution; ``least`` and ``most`` are what the noise floor allows."""

    network: str
    optimizer: str
    dtype: str
    ratio: float
    truth: int
    least: int
    most: int
    lower: int
    upper: int
    num_matvecs: int
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the interval holds what inertia says."""
        return self.lower <= self.most and self.least <= self.upper


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["mlp2", "mlp3", "cnn"])
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max-matvecs", type=int, default=2500)
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--out", type=Path, default=Path("out/paper_networks"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for network in options.networks:
        for optimizer in ("sgd", "adam"):
            rows += measure(network, optimizer, options)
            text = json.dumps([asdict(row) for row in rows], indent=1)
            (options.out / "paper_networks.json").write_text(text + "\n")
            (options.out / "paper_networks.md").write_text(markdown(rows))
    if not all(row.right for row in rows):
        raise SystemExit("an interval misses the inertia")


def measure(network: str, optimizer: str, options: argparse.Namespace) -> list[Row]:
    """Train, count exactly, and certify in two precisions."""
    model, data = (
        build_network(network, {"activation": options.activation}),
        load_data("mnist-sample"),
    )
    train(model, data, TrainingSettings(optimizer=optimizer, epochs=options.epochs))
    narrow = HessianOperator(model, nn.CrossEntropyLoss(), data.tensors)
    exact = narrow.in_float64().to_dense()
    norm = float(eigsh(exact, 1, "LM").values.abs())
    taus = [ratio * norm for ratio in RATIOS]
    rows = []
    for operator in (narrow.in_float64(), narrow):
        start = time.perf_counter()
        result = index(
            operator,
            tau_ladder=taus,
            method="certified",
            confidence=options.confidence,
            max_matvecs=options.max_matvecs,
            generator=torch.Generator().manual_seed(0),
        )
        seconds = time.perf_counter() - start
        for ratio, tau in zip(RATIOS, taus, strict=True):
            rung = next(rung for rung in result.ladder if rung.tau == tau)
            floor = result.noise_floor
            row = Row(
                network,
                optimizer,
                str(operator.dtype).removeprefix("torch."),
                ratio,
                inertia(exact, tau).negative,
                inertia(exact, tau + floor).negative,
                inertia(exact, max(tau - floor, 0.0)).negative,
                rung.lower,
                rung.upper,
                result.num_matvecs,
                round(seconds, 1),
            )
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: Row) -> str:
    """One row of the table."""
    answer = str(row.lower) if row.lower == row.upper else f"[{row.lower}, {row.upper}]"
    truth = str(row.truth) if row.least == row.most else f"{row.truth} ({row.least}–{row.most})"
    return (
        f"| {row.network} | {row.optimizer} | {row.dtype} | {row.ratio:.0e} | {truth} | {answer} "
        f"| {row.num_matvecs:,} | {row.seconds:.0f} |"
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line per network, precision and resolution."""
    head = (
        "| network | trained by | products in | tau / norm | inertia | certified | products, all "
    )
    return "\n".join([head + "three | seconds |", "|---" * 8 + "|", *map(line, rows)]) + "\n"


if __name__ == "__main__":
    main()
