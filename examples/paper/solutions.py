"""Where training ends from many initialisations: in the plane, by distance, and at which index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from examples.paper.curves import rank_correlation
from examples.paper.ensemble import (
    Ensemble,
    EnsembleSettings,
    network_with,
    trained_ensemble,
)
from examples.paper.figures import interval, new_figure
from examples.paper.points import hessian_at, images_of, index_record
from examples.paper.results import Record
from examples.paper.tables import Table, summary, texts, with_labels
from hvpspec import index

#: Fields of a run that decide how long it takes.
COST = ("images", "indexed")

_CELL = [field.name for field in fields(EnsembleSettings)]


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


def solution_tables(lines: pd.DataFrame) -> list[Table]:
    """Summarise the ensembles.

    Args:
        lines: as `measure_solution` makes them.
    """
    lines = once(lines)
    forms = {"loss": ".4f", "accuracy": ".4f", "mean_distance": ".3f", "moved": ".3f"}
    frame = summary(lines, ["net", *_CELL], forms)
    groups = lines.groupby(_CELL)
    lowest, highest = groups["loss"].min(), groups["loss"].max()
    first = groups["explained"].first()
    shown = {
        "networks": frame["runs"],
        "images": frame["images"],
        "epochs": frame["epochs"].map(str),
        "loss": frame["loss"],
        "from–to": [f"{a:.4f}–{b:.4f}" for a, b in zip(lowest, highest, strict=True)],
        "accuracy": frame["accuracy"],
        **{f"PC {i + 1}": [f"{parts[i]:.1%}" for parts in first] for i in range(2)},
        "distance": frame["mean_distance"],
        "smallest": groups["nearest"].min().map("{:.3f}".format).tolist(),
        "moved": frame["moved"],
    }
    solutions = frame[["net", "activation", "data"]].assign(**shown)
    tables = [
        Table(
            "Solutions",
            with_labels(solutions, ["networks", "images"]),
            2,
            "Mean ± standard deviation over networks that Adam trained on the same batches from"
            " different initial weights. PC: part of the variance of the final weights in their"
            " first two principal components. distance: Euclidean, between two of them; moved: from"
            " a network's own initial weights.",
        )
    ]
    indexed = lines[lines["indexed"]]
    if len(indexed):
        forms = {
            **{"index": ",.1f", "raw_count": ",.1f", "nullity": ",.1f"},
            **{"grad_norm": ".2g", "tau": ".1e"},
        }
        by = ["net", "data", "activation", "images"]
        frame = summary(indexed, by, forms)
        found = [rank_correlation(own) for _, own in indexed.groupby(by)]
        frame["correlation"] = texts(pd.Series(found), ".2f")
        frame.insert(8, "bound", f"{indexed['bound'].iloc[0]:.0f}")
        headings = {
            **{"runs": "networks", "raw_count": "raw", "grad_norm": "‖∇f‖", "tau": "τ"},
            "correlation": "rank correlation with loss",
        }
        tables.append(
            Table(
                "Index of a sample",
                with_labels(frame.rename(columns=headings), ["networks", "images"]),
                2,
                "On the images they were trained on; τ is the noise floor of each, and no index"
                " can exceed the bound.",
            )
        )
    return tables


def draw_solutions(lines: pd.DataFrame) -> dict[str, Figure]:
    """Draw the networks of each ensemble in the plane, coloured by loss.

    Args:
        lines: as `measure_solution` makes them.

    Returns:
        The figure ``solutions``.
    """
    lines = once(lines)
    ensembles = [own for _, own in lines.groupby(_CELL)]
    columns = min(2, len(ensembles))
    rows = math.ceil(len(ensembles) / columns)
    figure = new_figure(rows, columns)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, own in zip(panels, ensembles, strict=False):
        points = ax.scatter(
            own["pc1"],
            own["pc2"],
            c=own["loss"],
            cmap="viridis",
            # Networks that learned nothing would else leave one colour to all others.
            norm=LogNorm(),
            s=np.where(own["indexed"], 34, 16),
            linewidths=np.where(own["indexed"], 0.9, 0),
            edgecolors="black",
        )
        for line in own[own["indexed"]].to_dict("records"):
            at, text = (line["pc1"], line["pc2"]), f"{line['index']:.0f}"
            ax.annotate(text, at, xytext=(4, 3), textcoords="offset points", fontsize=7)
        bar = figure.colorbar(points, ax=ax, label="train loss (logarithmic)")
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        bar.ax.yaxis.set_major_formatter(ScalarFormatter())
        bar.ax.yaxis.set_minor_locator(NullLocator())
        first = own.iloc[0]
        one, two = first["explained"][:2]
        ax.set_xlabel(f"first principal component ({one:.1%} of the variance)")
        ax.set_ylabel(f"second ({two:.1%})")
        ax.set_aspect("equal", adjustable="datalim")
        ax.grid(alpha=0.25)
        what = f"{first['net']} {first['activation']} on {first['data']}"
        ax.set_title(f"{what}: {len(own):,} networks, {first['images']:,} images", fontsize=10)
    for ax in panels[len(ensembles) :]:
        ax.remove()
    note = "one point per initialisation (seeds from 0)"
    if lines["indexed"].any():
        note += (
            "; numbers at ringed points: their index at τ, the noise floor,"
            f" {interval(lines['tau'].dropna())}"
        )
    figure.supxlabel(note, fontsize=10 if columns == 2 else 9)
    return {"solutions": figure}


def once(lines: pd.DataFrame) -> pd.DataFrame:
    """Each network once, by seed: where there are two lines, that with the index."""
    ordered = lines.sort_values([*_CELL, "seed", "indexed"])
    return ordered.drop_duplicates([*_CELL, "seed"], keep="last")


@lru_cache(maxsize=1)
def _placed(
    settings: EnsembleSettings, out: Path, data_dir: Path | None
) -> tuple[Ensemble, Placed]:
    """An ensemble and where its networks are, worked out once for all of them."""
    ensemble = trained_ensemble(settings, out=out, data_dir=data_dir)
    return ensemble, principal_components(ensemble.final.double().numpy())
