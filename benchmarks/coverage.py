"""How often the matrix-free intervals of the index miss the true count.

Each spectrum is counted with many generators. At confidence 0.95 at most one interval in twenty
may miss, and at most one certificate in twenty may be wrong; how many misses of a correct method
chance explains is said by the binomial law. Operators are diagonal: Gaussian probes look the same
in every orthonormal basis, and products are cheap. Budgets are small, so that many runs end in an
interval.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from hvpspec import FunctionOperator, index
from hvpspec.spectrum import Rung

#: Ways to ask: arguments of :func:`hvpspec.index`.
RUNS: dict[str, dict[str, Any]] = {
    "certified, 1 probe": {"method": "certified", "max_matvecs": 40},
    "certified, 2 probes, ladder": {
        "method": "certified",
        "num_probes": 2,
        "max_matvecs": 64,
        "ladder": (4.0,),
    },
    "quadrature": {"method": "quadrature", "num_probes": 4, "num_steps": 15},
}
#: The chance that one run or another of a correct method is called wrong here.
FALSE_ALARM = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, shape (n,), and the resolution to count at."""

    values: Tensor
    tau: float


@dataclass(frozen=True)
class Row:
    """What came of one spectrum and one way to ask."""

    spectrum: str
    run: str
    n: int
    truth: int
    repeats: int
    missed: int
    wrong_certificates: int
    certified: int
    median_width: float
    median_products: float
    p_value: float


def spectra() -> dict[str, Spectrum]:
    """Every shape that could make a count go wrong."""
    one = torch.ones(1, dtype=torch.float64)
    top = torch.logspace(-1, 1, 12, dtype=torch.float64)

    def bulk(n: int, width: float) -> Tensor:
        """A dense, symmetric bulk at 0: quantiles of a semicircle, roughly."""
        u = torch.linspace(-1, 1, n, dtype=torch.float64)
        return width * u * (1 - 0.4 * (1 - u.abs()))

    few = -torch.tensor([0.9, 0.5, 0.31, 0.2, 0.11], dtype=torch.float64)
    edge = bulk(990, 0.1)
    found = {
        "n = 1, negative": Spectrum(-one, 0.1),
        "n = 1, zero": Spectrum(0 * one, 0.1),
        "n = 2, one of each sign": Spectrum(torch.cat([-one, one]), 0.1),
        "n = 5, one at twice tau": Spectrum(torch.cat([-0.02 * one, torch.arange(4) + one]), 0.01),
        "tau inside a dense bulk": Spectrum(torch.cat([few, bulk(1000, 0.1), top]), 0.03),
        "tau at the edge of the bulk, just inside": Spectrum(
            torch.cat([few, edge, top]), float(-(edge[0] + edge[1]) / 2)
        ),
        "tau at the edge of the bulk, just outside": Spectrum(
            torch.cat([few, edge, top]), 0.1 * (1 + 1e-6)
        ),
        "tau outside the bulk": Spectrum(torch.cat([few, bulk(1000, 0.01), top]), 0.05),
        "one hidden at twice tau": Spectrum(torch.cat([-0.02 * one, bulk(1000, 0.005), top]), 0.01),
        "cluster below tau": Spectrum(
            torch.cat([-0.2 - torch.linspace(0, 1e-6, 20).double(), bulk(500, 0.05), top]), 0.1
        ),
        "cluster across tau": Spectrum(
            torch.cat([-0.1 + torch.linspace(-1e-4, 1e-4, 20).double(), bulk(500, 0.05), top]), 0.1
        ),
        "multiple eigenvalues": Spectrum(torch.tensor([-0.5, 0.0, 1.0]).repeat(100).double(), 0.1),
        "all negative": Spectrum(-torch.linspace(0.1, 1, 300).double(), 0.05),
        "all negative, identity": Spectrum(-torch.ones(500).double(), 0.5),
        "none negative": Spectrum(torch.linspace(0.0, 1, 300).double(), 0.05),
        "zero matrix": Spectrum(torch.zeros(200).double(), 0.1),
        "log-uniform, both signs": Spectrum(
            torch.cat([-torch.logspace(-8, -1, 700).double(), torch.logspace(-8, 1, 700).double()]),
            1e-4,
        ),
        "n = 5000, tau inside": Spectrum(torch.cat([few, bulk(4983, 0.1), top]), 0.03),
        "n = 5000, tau outside": Spectrum(torch.cat([few, bulk(4983, 0.01), top]), 0.05),
        "n = 5000, one hidden at twice tau": Spectrum(
            torch.cat([-0.02 * one, bulk(4987, 0.005), top]), 0.01
        ),
    }
    return {name: Spectrum(s.values.double(), s.tau) for name, s in found.items()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--only", default="", help="spectra with this in their names")
    parser.add_argument("--out", type=Path, default=Path("out/coverage"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    start = time.perf_counter()
    for name, spectrum in spectra().items():
        if options.only not in name:
            continue
        for run in RUNS:
            rows.append(measure(name, spectrum, run, options.repeats, options.confidence))
        print(f"{time.perf_counter() - start:6.0f} s  {name}", flush=True)
        text = json.dumps([asdict(row) for row in rows], indent=1)
        (options.out / "coverage.json").write_text(text + "\n")
        (options.out / "coverage.md").write_text(markdown(rows))
    print(markdown(rows))
    beyond = [row for row in rows if row.p_value < FALSE_ALARM / len(rows)]
    if beyond:
        raise SystemExit(f"more misses than chance explains: {beyond}")


def measure(name: str, spectrum: Spectrum, run: str, repeats: int, confidence: float) -> Row:
    """Count one spectrum with many generators."""
    values, tau = spectrum.values, spectrum.tau
    arguments = dict(RUNS[run])
    factors = arguments.pop("ladder", ())
    results = []
    for seed in range(repeats):
        A = FunctionOperator(len(values), lambda v: values * v)
        result = index(
            A,
            tau,
            tau_ladder=[factor * tau for factor in factors],
            confidence=confidence,
            generator=torch.Generator().manual_seed(seed),
            **arguments,
        )
        results.append(result)

    def judge(rungs: Sequence[Rung]) -> tuple[int, int]:
        """Number of intervals without the true count, and of those that were a single number.

        An eigenvalue within the noise floor of -tau, as -0.2 in the ladder of one spectrum, may
        lie on either side in the products that were seen.
        """
        floor = results[0].noise_floor
        missed = [
            r
            for r in rungs
            if r.upper < int((values < -r.tau - floor).sum())
            or r.lower > int((values < -r.tau + floor).sum())
        ]
        return len(missed), sum(r.lower == r.upper for r in missed)

    # The confidence is each resolution's own: the worst of a ladder stands for all.
    missed, wrong = max(
        judge([result.ladder[i] for result in results]) for i in range(1 + len(factors))
    )
    return Row(
        name,
        run,
        len(values),
        int((values < -tau).sum()),
        repeats,
        missed,
        wrong,
        sum(result.lower == result.upper for result in results),
        median(result.upper - result.lower for result in results),
        median(result.num_matvecs for result in results),
        float(binom.sf(missed - 1, repeats, 1 - confidence)),
    )


def markdown(rows: Sequence[Row]) -> str:
    """A table with one line per spectrum and run."""
    lines = [
        "| spectrum | n | true count | asked by | missed | wrong certificates | certified "
        "| median width | median products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.spectrum} | {row.n} | {row.truth} | {row.run} | {row.missed} of {row.repeats} "
        f"| {row.wrong_certificates} | {row.certified / row.repeats:.0%} | {row.median_width:g} "
        f"| {row.median_products:g} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
