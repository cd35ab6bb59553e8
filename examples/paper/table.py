"""The paper's table of indices: three networks, two data sets, trained and random."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.paper.points import (
    Assembled,
    Point,
    Protocol,
    hessian_at,
    images_of,
    network_at,
)
from examples.paper.results import Record
from examples.paper.spectra_kept import save_spectrum, spectrum_path
from hvpspec import zoo
from hvpspec.spectrum import IndexResult
from hvpspec.spectrum.exact import exact_index

#: Further resolutions, in units of the norm.
RATIOS = tuple(10.0**-k for k in range(3, 11))

#: Fields of a run that decide how long it takes.
COST = ("net", "images", "epochs")


@dataclass(frozen=True, kw_only=True)
class TableRun(Point):
    """One exact index.

    Attributes:
        images: the Hessian is that of the mean loss over so many first training images.
    """

    images: int


def table_runs(
    nets: Sequence[str],
    data: Sequence[str],
    activations: Sequence[str],
    seeds: int,
    images: int,
    protocol: Protocol,
) -> list[TableRun]:
    """List the runs of the table: all of the first seed, then all of the next.

    Args:
        nets: names of networks.
        data: names of data sets.
        activations: of the networks.
        seeds: how many, from 0.
        images: in the Hessian.
        protocol: of the training.
    """
    return [
        TableRun(
            net=net,
            data=source,
            activation=activation,
            seed=seed,
            images=images,
            **state.training(net),
        )
        for seed in range(seeds)
        for net in nets
        for source in data
        for activation in activations
        for state in (protocol, protocol.for_epochs(0))
    ]


def measure_index(run: TableRun, *, out: Path, data_dir: Path | None) -> Record:
    """Train, assemble the Hessian, compute all its eigenvalues and count.

    The eigenvalues are those of the whole matrix, and so is the raw count: what a plain script
    would print. The spectrum of seed 0 is kept in ``spectra`` below ``out``.

    Args:
        run: what to measure.
        out: folder of the results.
        data_dir: folder of the full data sets.

    Raises:
        HvpspecError: the data are not found, do not suffice or do not fit into memory, or training
            diverged.
    """
    start = time.perf_counter()
    model = network_at(run, out=out, data_dir=data_dir)
    trained = time.perf_counter()
    data = images_of(run.data, data_dir).subset(run.images)
    hessian = hessian_at(model, data, torch.float64)
    matrix = hessian.to_dense()
    assembled = time.perf_counter()
    result = exact_index(Assembled(hessian, matrix), None, "exact", None, whole=True)
    counted = time.perf_counter()
    if run.seed == 0:
        save_spectrum(spectrum_path(run, run.images, out), result)
    _, accuracy = zoo.evaluate(model, data)
    return {
        "state": run.state,
        **index_record(result),
        "accuracy": accuracy,
        "stages": {
            "training": round(trained - start, 3),
            "assembly": round(assembled - trained, 3),
            "eigenvalues": round(counted - assembled, 3),
        },
    }


def index_record(result: IndexResult) -> Record:
    """What a line tells of an index.

    Args:
        result: of the exact method, for a float64 Hessian.
    """
    assert result.eigenvalues is not None  # the exact method has them
    ladder = result.curve(torch.tensor(RATIOS, dtype=torch.float64) * result.norm)
    return {
        "dtype": "float64",
        "method": result.method,
        "dim": result.dim,
        "tau": result.tau,
        "index": result.index,
        "raw_count": result.raw_count,
        "nullity": result.nullity,
        "grad_norm": result.gradient_norm,
        "loss": result.loss,
        "noise_floor": result.noise_floor,
        "norm": result.norm,
        "lambda_min": float(result.eigenvalues[0]),
        "lambda_max": float(result.eigenvalues[-1]),
        "bound": result.bound.upper if result.bound else None,
        # The ladder ascends in tau.
        "ladder": {
            f"{ratio:.0e}": int(count)
            for ratio, count in zip(sorted(RATIOS), ladder.counts, strict=True)
        },
    }
