"""Where training ends from many initialisations: in the plane, by distance, and at which index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from examples.paper.ensemble import (
    Ensemble,
    EnsembleSettings,
    network_with,
    trained_ensemble,
)
from examples.paper.points import hessian_at, images_of
from examples.paper.results import Record
from examples.paper.statistics import over, rank_correlation, spread
from examples.paper.table import index_record
from hvpspec.report import Grid
from hvpspec.spectrum import index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Fields of a run that decide how long it takes.
COST = ("images", "indexed")

_CELL = tuple(field.name for field in fields(EnsembleSettings))


@dataclass(frozen=True, kw_only=True)
class SolutionRun(EnsembleSettings):
    """One network of an ensemble.

    Attributes:
        seed: of its initial weights.
        indexed: whether its index is computed, on the images it is trained on.
    """

    seed: int
    indexed: bool

    @property
    def ensemble(self) -> EnsembleSettings:
        """The ensemble it belongs to."""
        return EnsembleSettings(**{name: getattr(self, name) for name in _CELL})


def solution_runs(ensembles: Sequence[EnsembleSettings], indexed: int) -> list[SolutionRun]:
    """List the networks of some ensembles.

    Args:
        ensembles: how they are trained.
        indexed: of how many networks of each the index is computed: the first.
    """
    return [
        SolutionRun(**vars(settings), seed=seed, indexed=seed < indexed)
        for settings in ensembles
        for seed in range(settings.count)
    ]


def measure_solution(run: SolutionRun, *, out: Path, data_dir: Path | None) -> Record:
    """Place one network among all of its ensemble, and perhaps count its negative eigenvalues.

    Args:
        run: which.
        out: folder of the results.
        data_dir: folder of the full data sets.

    Returns:
        ``loss`` and ``accuracy`` on the training images; ``pc1`` and ``pc2``, its coordinates by
        the first two principal components of the final weights, of which ``explained`` lists the
        parts of the variance; Euclidean distances: ``moved`` from its initial weights,
        ``mean_distance`` to the others, ``nearest`` to the nearest of them, ``from_mean`` to their
        mean; and what `index_record` tells if it is indexed.

    Raises:
        HvpspecError: the data are not found or do not suffice, or training diverged.
    """
    ensemble, placed = _placed(run.ensemble, out, data_dir)
    told: Record = {}
    if run.indexed:
        data = images_of(run.data, data_dir).subset(run.images)
        model = network_with(run.activation, ensemble.final[run.seed])
        told = index_record(index(hessian_at(model, data, torch.float64), method="exact"))
    i = run.seed
    others = np.delete(placed.distances[i], i)
    return {
        **told,
        "net": "cnn",
        "optimizer": "adam",
        "loss": float(ensemble.losses[i]),
        "accuracy": float(ensemble.accuracies[i]),
        "pc1": float(placed.coordinates[i, 0]),
        "pc2": float(placed.coordinates[i, 1]),
        "explained": placed.explained[:10].tolist(),
        "moved": float((ensemble.final[i].double() - ensemble.initial[i].double()).norm()),
        "mean_distance": float(others.mean()),
        "nearest": float(others.min()),
        "from_mean": float(placed.from_mean[i]),
    }


@dataclass(frozen=True, eq=False)
class Placed:
    """Points of a space in the plane of their first two principal components.

    Attributes:
        coordinates: in all components, from the first, shape (count, min(count, n)).
        explained: the part of the variance in each component.
        distances: between the points, shape (count, count).
        from_mean: distances from their mean, shape (count,).
    """

    coordinates: NDArray[np.float64]
    explained: NDArray[np.float64]
    distances: NDArray[np.float64]
    from_mean: NDArray[np.float64]


def principal_components(points: NDArray[np.float64]) -> Placed:
    """Place points by principal components, from the singular values of what is left of the mean.

    Each component's sign is such that its largest weight is positive.

    Args:
        points: a point in a row, at least two that differ, shape (count, n).
    """
    centred = points - points.mean(axis=0)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    largest = np.abs(right).argmax(axis=1)
    signs = np.sign(right[np.arange(len(right)), largest])
    return Placed(
        coordinates=left * singular * signs,
        explained=singular**2 / (singular**2).sum(),
        distances=squareform(pdist(points)),
        from_mean=np.linalg.norm(centred, axis=1),
    )


def solution_grids(records: Iterable[Record]) -> list[Grid]:
    """Summarise the ensembles.

    Args:
        records: as `measure_solution` makes them.
    """
    rows, sampled = [], []
    for group in _ensembles(records):
        first = group[0]
        label = (f"cnn {first['activation']}", first["data"])
        trained = (f"{len(group):,}", f"{first['images']:,}", str(first["epochs"]))
        losses = [r["loss"] for r in group]
        one, two = first["explained"][:2]
        rows.append(
            (
                *label,
                *trained,
                spread(losses).text(".4f"),
                f"{min(losses):.4f}–{max(losses):.4f}",
                over(group, "accuracy", ".4f"),
                f"{one:.1%}",
                f"{two:.1%}",
                over(group, "mean_distance", ".3f"),
                f"{min(r['nearest'] for r in group):.3f}",
                over(group, "moved", ".3f"),
            )
        )
        indexed = [r for r in group if r["indexed"]]
        if indexed:
            correlation = rank_correlation(
                [r["loss"] for r in indexed], [r["index"] for r in indexed]
            )
            sampled.append(
                (
                    *label,
                    *(f"{len(indexed):,}", f"{first['images']:,}"),
                    over(indexed, "index"),
                    over(indexed, "raw_count"),
                    over(indexed, "nullity"),
                    str(indexed[0]["bound"]),
                    over(indexed, "grad_norm", ".2g"),
                    over(indexed, "tau", ".1e"),
                    "–" if correlation is None else f"{correlation:.2f}",
                )
            )
    return [
        Grid(
            "Solutions",
            (
                *("network", "data", "networks", "images", "epochs", "loss", "from–to"),
                *("accuracy", "PC 1", "PC 2", "distance", "smallest", "moved"),
            ),
            tuple(rows),
            2,
            "Mean ± standard deviation over networks that Adam trained on the same batches from"
            " different initial weights. PC: part of the variance of the final weights in their"
            " first two principal components. distance: Euclidean, between two of them; moved: from"
            " a network's own initial weights.",
        ),
        Grid(
            "Index of a sample",
            (
                *("network", "data", "networks", "images", "index", "raw", "nullity", "bound"),
                *("‖∇f‖", "τ", "rank correlation with loss"),
            ),
            tuple(sampled),
            2,
            "Of the float64 Hessian over the images trained on: eigenvalues below −τ, τ the noise"
            " floor of each; raw: computed eigenvalues below 0; Spearman's correlation.",
        ),
    ]


def draw_solutions(records: Sequence[Record]) -> dict[str, Figure]:
    """Draw the networks of each ensemble in the plane, coloured by loss.

    Args:
        records: as `measure_solution` makes them.

    Returns:
        The figure ``solutions``.
    """
    from examples.paper.plot_solutions import SolutionMap, plot_solutions

    maps = [
        SolutionMap(
            title=f"cnn {group[0]['activation']} on {group[0]['data']}:"
            f" {len(group):,} networks, {group[0]['images']:,} images",
            first=[r["pc1"] for r in group],
            second=[r["pc2"] for r in group],
            explained=(group[0]["explained"][0], group[0]["explained"][1]),
            losses=[r["loss"] for r in group],
            indices=[r["index"] if r["indexed"] else None for r in group],
        )
        for group in _ensembles(records)
    ]
    taus = [r["tau"] for r in records if r["indexed"]]
    return {"solutions": plot_solutions(maps, taus=(min(taus), max(taus)) if taus else None)}


def _ensembles(records: Iterable[Record]) -> list[list[Record]]:
    """The networks of each ensemble, each once: where there are two lines, that with the index."""
    groups: dict[tuple[object, ...], dict[int, Record]] = {}
    for record in sorted(records, key=lambda r: (r["seed"], r["indexed"])):
        cell = tuple(record[name] for name in _CELL)
        groups.setdefault(cell, {})[record["seed"]] = record
    return [list(groups[cell].values()) for cell in sorted(groups)]


@lru_cache(maxsize=1)
def _placed(
    settings: EnsembleSettings, out: Path, data_dir: Path | None
) -> tuple[Ensemble, Placed]:
    """An ensemble and where its networks are, worked out once for all of them."""
    ensemble = trained_ensemble(settings, out=out, data_dir=data_dir)
    return ensemble, principal_components(ensemble.final.double().numpy())
