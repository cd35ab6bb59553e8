"""The index along training: at which losses, and after how many epochs, for several optimizers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from examples.paper.points import Point, hessian_at, images_of, network_at
from examples.paper.results import Record
from examples.paper.statistics import cells, over, rank_correlation, spread
from examples.paper.table import index_record
from hvpspec import zoo
from hvpspec.report import Grid
from hvpspec.spectrum import index
from hvpspec.zoo.training import Optimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Rate and batch of each optimizer; L-BFGS takes all training images at once.
TRAININGS: dict[Optimizer, tuple[float, int | None]] = {
    "sgd": (0.1, 64),
    "adam": (1e-3, 64),
    "lbfgs": (1.0, None),
}

#: Fields of a run that decide how long it takes.
COST = ("net", "images")

# What a trajectory is: runs that differ in nothing but the epochs.
_TRAJECTORY = ("net", "data", "activation", "optimizer", "lr", "batch_size", "images", "seed")
_CELL = ("net", "data", "activation", "optimizer", "images", "epochs")


@dataclass(frozen=True, kw_only=True)
class CurveRun(Point):
    """The index at one moment of a training; at its start it has no optimizer.

    Attributes:
        images: the Hessian is that of the mean loss over so many first training images.
    """

    images: int


def curve_runs(
    nets: Sequence[str],
    data: dict[str, int],
    activations: Sequence[str],
    optimizers: Sequence[Optimizer],
    seeds: int,
    epochs: Collection[int],
    images: int,
) -> list[CurveRun]:
    """List the runs, the last epochs first: who has trained to them has passed by all others.

    Args:
        nets: names of networks.
        data: names of data sets, with how many training images each has.
        activations: of the networks.
        optimizers: names of optimizers.
        seeds: how many, from 0.
        epochs: when to look; 0 for the initial weights, which all optimizers share.
        images: in the Hessian.
    """
    return [
        CurveRun(
            net=net,
            data=source,
            activation=activation,
            seed=seed,
            epochs=moment,
            images=images,
            protocol="curves",
            **(_training(optimizer, size) if moment else {}),
        )
        for seed in range(seeds)
        for moment in sorted(epochs, reverse=True)
        for net in nets
        for source, size in data.items()
        for activation in activations
        for optimizer in (optimizers if moment else optimizers[:1])
    ]


def measure_curve(
    run: CurveRun, *, epochs: Collection[int], out: Path, data_dir: Path | None
) -> Record:
    """Train to a moment, and count negative eigenvalues of the float64 Hessian there.

    Args:
        run: what to measure.
        epochs: moments of the same training that other runs ask for: their weights are kept.
        out: folder of the results.
        data_dir: folder of the full data sets.

    Raises:
        HvpspecError: the data are not found, do not suffice or do not fit into memory, or training
            diverged.
    """
    model = network_at(run, out=out, data_dir=data_dir, milestones=epochs)
    data = images_of(run.data, data_dir).subset(run.images)
    result = index(hessian_at(model, data, torch.float64), method="exact")
    assert result.index is not None  # exact, at the noise floor
    _, accuracy = zoo.evaluate(model, data)
    return {
        "state": run.state,
        **index_record(result),
        "index_fraction": result.index / result.dim,
        "accuracy": accuracy,
    }


def curve_grids(records: Iterable[Record]) -> list[Grid]:
    """Summarise the lines: the points along training, and how index and loss go together.

    Args:
        records: as `measure_curve` makes them, one for each run.
    """
    lines = list(records)
    return [_points(lines), _correlations(lines)]


def trajectories(records: Iterable[Record]) -> dict[tuple[object, ...], list[Record]]:
    """The lines of each training in the order of epochs, from the initial weights.

    Args:
        records: as `measure_curve` makes them.

    Returns:
        For net, data, activation, optimizer, lr, batch size, images and seed, the lines.
    """
    lines = sorted(records, key=lambda r: (r["net"], r["data"], r["activation"], r["epochs"]))
    starts = {_start(r): r for r in lines if r["epochs"] == 0}
    found: dict[tuple[object, ...], list[Record]] = {}
    for r in lines:
        if r["epochs"]:
            first = [starts[_start(r)]] if _start(r) in starts else []
            found.setdefault(tuple(r[name] for name in _TRAJECTORY), first).append(r)
    return found


def draw_curves(records: Sequence[Record]) -> dict[str, Figure]:
    """Draw the index against the loss and against the epochs.

    Args:
        records: as `measure_curve` makes them.

    Returns:
        The figure ``curves``; none if there are initial weights only.
    """
    from examples.paper.plot_curves import Trajectory, plot_trajectories

    drawn = [
        Trajectory(
            row=f"{net} on {data}, Hessian of {images:,} images",
            column=str(activation),
            label=f"{optimizer}, lr {lr:g}, batch {batch_size:,}",
            epochs=[r["epochs"] for r in lines],
            losses=[r["loss"] for r in lines],
            indices=[r["index"] for r in lines],
            bound=lines[0]["bound"],
        )
        for (net, data, activation, optimizer, lr, batch_size, images, _), lines in trajectories(
            records
        ).items()
    ]
    if not drawn:
        return {}
    taus, seeds = [r["tau"] for r in records], [r["seed"] for r in records]
    return {"curves": plot_trajectories(drawn, taus=taus, seeds=seeds)}


def _training(optimizer: Optimizer, size: int) -> dict[str, Any]:
    """The fields of a `Point` that say how a network was trained."""
    lr, batch_size = TRAININGS[optimizer]
    return {"optimizer": optimizer, "lr": lr, "batch_size": batch_size or size}


def _start(record: Record) -> tuple[object, ...]:
    """What tells the initial weights of a training."""
    return tuple(record[name] for name in ("net", "data", "activation", "images", "seed"))


def _points(records: Sequence[Record]) -> Grid:
    """Every moment, over the seeds."""
    found = cells(records, _CELL)
    rows = []
    for cell in sorted(found, key=lambda cell: (*cell[:3], str(cell[3] or ""), *cell[4:])):
        net, data, activation, optimizer, images, epochs = cell
        forms = {
            **{"loss": ".4g", "accuracy": ".4f", "grad_norm": ".2g", "index": ",.1f"},
            **{"index_fraction": ".4f", "raw_count": ",.1f", "nullity": ",.1f", "tau": ".1e"},
        }
        numbers = [over(found[cell], name, form) for name, form in forms.items()]
        words = (f"{net} {activation}", str(data), str(optimizer or "initial weights"))
        rows.append((*words, f"{images:,}", f"{epochs}", str(len(found[cell])), *numbers))
    return Grid(
        "Along training",
        (
            *("network", "data", "optimizer", "images", "epoch", "runs"),
            *("loss f", "accuracy", "‖∇f‖", "index", "index / n", "raw", "nullity", "τ"),
        ),
        tuple(rows),
        3,
        "Mean ± standard deviation over the seeds. index: eigenvalues below −τ, τ the noise floor"
        " of each run; raw: computed eigenvalues below 0. Loss, accuracy, gradient and Hessian are"
        " those of the first training images, as many as stated. SGD and Adam take batches of 64;"
        " L-BFGS takes all training images at once, and up to 20 iterations an epoch.",
    )


def _correlations(records: Sequence[Record]) -> Grid:
    """Whether the index falls with the loss along single trainings."""
    groups: dict[tuple[str, ...], list[float | None]] = {}
    for (net, data, activation, optimizer, _, _, images, _), lines in trajectories(records).items():
        kind = (f"{net} {activation}", str(data), str(optimizer), f"{images:,}")
        correlation = rank_correlation([r["loss"] for r in lines], [r["index"] for r in lines])
        groups.setdefault(kind, []).append(correlation)
    rows = []
    for words, found in groups.items():
        told = [value for value in found if value is not None]
        text = spread(told).text(".2f") if told else "–"
        rows.append((*words, str(len(told)), text))
    return Grid(
        "Index against loss",
        ("network", "data", "optimizer", "images", "runs", "rank correlation"),
        tuple(rows),
        3,
        "Spearman's rank correlation of the index with the loss over the moments of one training:"
        " +1 if the index falls whenever the loss falls. Trainings in which one of them stays the"
        " same have none.",
    )
