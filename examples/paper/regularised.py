"""The index of f = L + λ‖θ‖², whose Hessian is H + 2λI: by λ, at fixed weights and retrained.

At fixed weights one spectrum answers for all λ. The Hessian is degenerate where −2λ is an
eigenvalue of H: for finitely many λ, which at a resolution become finitely many intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from examples.paper.points import Point, Protocol, hessian_at, images_of, network_at
from examples.paper.results import Record
from examples.paper.spectra_kept import Spectrum, spectrum_at
from examples.paper.table import index_record
from hvpspec import zoo
from hvpspec.report import Grid
from hvpspec.spectrum import index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: λ at which networks are trained anew.
RETRAINED = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)

#: λ that the table shows.
SHOWN = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

#: Fields of a run that decide how long it takes.
COST = ("net", "images", "epochs")

_PER_DECADE = 8


@dataclass(frozen=True, kw_only=True)
class RegularisedRun(Point):
    """All λ at fixed weights, or one λ with which the network is trained.

    Attributes:
        images: the Hessian is that of the mean loss over so many first training images.
        l2: λ of the training; None for fixed weights, trained without it or not at all.
    """

    images: int
    l2: float | None


def regularised_runs(
    nets: Sequence[str],
    data: Sequence[str],
    activations: Sequence[str],
    seeds: int,
    images: int,
    protocol: Protocol,
    retrained: Sequence[float],
) -> list[RegularisedRun]:
    """List the runs: those at fixed weights first.

    Args:
        nets: names of networks.
        data: names of data sets.
        activations: of the networks.
        seeds: how many, from 0.
        images: in the Hessian.
        protocol: of the training.
        retrained: λ to train with.
    """
    fixed: list[tuple[Protocol, float | None]] = [
        (protocol, None),
        (protocol.for_epochs(0), None),
    ]
    return [
        RegularisedRun(
            net=net,
            data=source,
            activation=activation,
            seed=seed,
            images=images,
            l2=l2,
            **state.training(net),
        )
        for kind in (fixed, [(protocol, l2) for l2 in retrained])
        for seed in range(seeds)
        for net in nets
        for source in data
        for activation in activations
        for state, l2 in kind
    ]


def measure_regularised(run: RegularisedRun, *, out: Path, data_dir: Path | None) -> Record:
    """Count at all λ from one spectrum, or train with one λ and count there.

    Args:
        run: what to measure.
        out: folder of the results.
        data_dir: folder of the full data sets.

    Raises:
        HvpspecError: the data are not found, do not suffice or do not fit into memory, or training
            diverged.
    """
    if run.l2 is None:
        found = spectrum_at(run, run.images, out=out, data_dir=data_dir)
        return {"state": run.state, **by_lambda(found)}
    model = network_at(run, out=out, data_dir=data_dir, l2=run.l2)
    data = images_of(run.data, data_dir).subset(run.images)
    result = index(hessian_at(model, data, torch.float64, l2=run.l2), method="exact")
    assert result.eigenvalues is not None  # the exact method has them
    loss, accuracy = zoo.evaluate(model, data)
    distance = float(result.eigenvalues.abs().min())
    return {
        "state": run.state,
        **index_record(result),
        "index_of_loss": int((result.eigenvalues - 2 * run.l2 < -result.tau).sum()),
        "distance": distance,
        "nondegenerate": distance > result.tau,
        "data_loss": loss,
        "squared_norm": sum(float(p.detach().double().square().sum()) for p in model.parameters()),
        "accuracy": accuracy,
    }


def by_lambda(found: Spectrum) -> Record:
    """What the eigenvalues μ of H say of H + 2λI, for all λ.

    The eigenvalues of H + 2λI are μ + 2λ, off by up to τ(λ), the noise floor of H plus the
    round-off n u 2λ of what is added to the norm.

    Args:
        found: the spectrum of H, which is not 0.

    Returns:
        ``lambdas`` with ``indices`` and ``nullities`` at each, ``distances`` of −2λ from the
        spectrum; ``shown``, the same at round λ; ``positive_from``, above which every λ makes the
        Hessian positive definite beyond τ; ``nondegenerate_from``, the infimum of the λ that make
        it non-degenerate; and ``degenerate_part``, the part of the λ below ``positive_from`` that
        do not.
    """
    eigenvalues, n = found.eigenvalues, len(found.eigenvalues)
    round_off = n * torch.finfo(torch.float64).eps / 2

    def count(l2: float) -> dict[str, float]:
        """The counts at one λ."""
        tau = found.noise_floor + round_off * 2 * l2
        shifted = eigenvalues + 2 * l2
        return {
            "tau": tau,
            "index": int((shifted < -tau).sum()),
            "nullity": int((shifted.abs() <= tau).sum()),
            "distance": float(shifted.abs().min()),
        }

    # No eigenvalue is below −‖H‖, so that 2λ is at most this where anything can be degenerate.
    tau = found.noise_floor + round_off * found.norm
    positive_from = max(0.0, (tau - float(eigenvalues[0])) / 2)
    first, covered = _cover((-eigenvalues - tau) / 2, (-eigenvalues + tau) / 2)
    low, high = tau / 10, 10 * max(positive_from, tau)
    steps = max(2, round(_PER_DECADE * math.log10(high / low)))
    lambdas = [0.0, *np.geomspace(low, high, steps).tolist()]
    counts = [count(l2) for l2 in lambdas]
    start = counts[0]
    return {
        "dtype": "float64",
        "dim": n,
        "tau": start["tau"],
        "index": start["index"],
        "nullity": start["nullity"],
        "norm": found.norm,
        "positive_from": positive_from,
        "nondegenerate_from": first,
        "degenerate_part": covered / positive_from if positive_from else 0.0,
        "shown": {f"{l2:g}": count(l2) for l2 in SHOWN},
        "lambdas": lambdas,
        "indices": [c["index"] for c in counts],
        "nullities": [c["nullity"] for c in counts],
        "distances": [c["distance"] for c in counts],
    }


def _cover(starts: Tensor, ends: Tensor) -> tuple[float, float]:
    """Where the first gap of a union of intervals begins on [0, ∞), and the union's length there.

    The intervals are of equal length, and given in descending order.
    """
    first, covered, reached = 0.0, 0.0, 0.0
    for start, end in zip(starts.flip(0).tolist(), ends.flip(0).tolist(), strict=True):
        if end <= reached:
            continue
        if start <= first:
            first = end
        covered += end - max(start, reached)
        reached = end
    return first, covered


def regularised_grids(records: Iterable[Record]) -> list[Grid]:
    """Show what λ does, at fixed weights and retrained.

    Args:
        records: as `measure_regularised` makes them, one for each run.
    """
    lines = sorted(records, key=lambda r: (*_label(r), r["seed"], r["l2"] or 0.0))
    return [
        _fixed([r for r in lines if r["l2"] is None]),
        _retrained([r for r in lines if r["l2"] is not None]),
    ]


def draw_regularised(records: Sequence[Record]) -> dict[str, Figure]:
    """Draw index and nullity against λ: curves at fixed weights, marks for those retrained.

    Args:
        records: as `measure_regularised` makes them.

    Returns:
        The figure ``regularised``.
    """
    from examples.paper.plot_regularised import LambdaCurve, plot_regularised

    drawn = [
        LambdaCurve(
            row=f"{r['net']} on {r['data']}, Hessian of {r['images']:,} images",
            label=f"{r['activation']}, {r['state'] if r['l2'] is None else 'retrained with λ'}",
            lambdas=r["lambdas"] if r["l2"] is None else [r["l2"]],
            indices=r["indices"] if r["l2"] is None else [r["index"]],
            nullities=r["nullities"] if r["l2"] is None else [r["nullity"]],
        )
        for r in sorted(records, key=lambda r: (_label(r), r["l2"] is not None))
    ]
    taus, seeds = [r["tau"] for r in records], [r["seed"] for r in records]
    return {"regularised": plot_regularised(drawn, taus=taus, seeds=seeds)}


def _label(record: Record) -> tuple[str, ...]:
    """Name a point but for its seed."""
    network = f"{record['net']} {record['activation']}"
    return network, record["data"], record["state"], f"{record['images']:,}"


def _fixed(records: Sequence[Record]) -> Grid:
    """What λ does at fixed weights."""
    rows = [
        (
            *_label(r),
            str(r["seed"]),
            f"{r['norm']:.3g}",
            f"{r['tau']:.1e}",
            f"{r['index']:,}",
            f"{r['nullity']:,}",
            f"{r['nondegenerate_from']:.1e}",
            f"{r['degenerate_part']:.1e}",
            f"{r['positive_from']:.3g}",
            *(f"{r['shown'][f'{l2:g}']['index']:,}" for l2 in SHOWN),
        )
        for r in records
    ]
    return Grid(
        "L + λ‖θ‖² at fixed weights",
        (
            *("network", "data", "state", "images", "seed", "‖H‖", "τ", "index", "nullity"),
            *("non-degenerate from λ", "degenerate part", "positive from λ"),
            *(f"index, λ = {l2:g}" for l2 in SHOWN),
        ),
        tuple(rows),
        3,
        "The Hessian is H + 2λI, counted from the eigenvalues of H. index, nullity: without λ."
        " non-degenerate from λ: the smallest λ at which no eigenvalue of H lies within τ of −2λ."
        " positive from λ: above it, H + 2λI is positive definite beyond τ. degenerate part: of the"
        " λ below that, the part at which an eigenvalue of H lies within τ of −2λ.",
    )


def _retrained(records: Sequence[Record]) -> Grid:
    """Where training with λ ends."""
    rows = [
        (
            *_label(r),
            str(r["seed"]),
            f"{r['l2']:g}",
            f"{r['loss']:.4g}",
            f"{r['data_loss']:.4g}",
            f"{r['accuracy']:.4f}",
            f"{r['squared_norm']:.4g}",
            f"{r['grad_norm']:.2g}",
            f"{r['index']:,}",
            f"{r['index_of_loss']:,}",
            f"{r['nullity']:,}",
            f"{r['distance']:.1e}",
            f"{r['tau']:.1e}",
            "yes" if r["nondegenerate"] else "no",
        )
        for r in records
    ]
    return Grid(
        "L + λ‖θ‖² minimised anew",
        (
            *("network", "data", "state", "images", "seed", "λ", "f", "loss L", "accuracy"),
            *("‖θ‖²", "‖∇f‖", "index", "index of L", "nullity", "distance", "τ", "non-degenerate"),
        ),
        tuple(rows),
        3,
        "Trained with λ from the same initial weights. index: eigenvalues of H + 2λI below −τ;"
        " index of L: of H there. distance: of −2λ from the spectrum of H; non-degenerate: it is"
        " larger than τ.",
    )
