"""The index along training: at which losses, and after how many epochs, for several optimizers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from examples.paper.figures import colours_of, interval, new_figure
from examples.paper.points import (
    Optimizer,
    Point,
    hessian_at,
    images_of,
    index_record,
    network_at,
)
from examples.paper.results import Record
from examples.paper.tables import Table, mean_std, summary, with_labels
from hvpspec import index, zoo

#: Rate and batch of each optimizer; L-BFGS takes all training images at once.
TRAININGS: Mapping[Optimizer, tuple[float, int | None]] = {
    "sgd": (0.1, 64),
    "adam": (1e-3, 64),
    "lbfgs": (1.0, None),
}

#: Fields of a run that decide how long it takes.
COST = ("net", "images")

# What tells initial weights, and a training from them.
_START = ["net", "data", "activation", "images", "seed"]
_TRAINING = ["optimizer", "lr", "batch_size"]


@dataclass(frozen=True, kw_only=True)
class CurveRun(Point):
    """The index at one moment of a training; at its start it has no optimizer.

    Attributes:
        images: the Hessian is that of the mean loss over so many first training images.
    """

    images: int


def curve_runs(
    nets: Sequence[str],
    data: Mapping[str, int],
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
    runs = []
    moments = sorted(epochs, reverse=True)
    for seed, epoch, net, (source, size), activation in product(
        range(seeds), moments, nets, data.items(), activations
    ):
        point: dict[str, Any] = {"net": net, "data": source, "activation": activation, "seed": seed}
        point |= {"epochs": epoch, "images": images, "protocol": "curves"}
        for optimizer in optimizers if epoch else optimizers[:1]:
            if epoch:
                lr, batch_size = TRAININGS[optimizer]
                point |= {"optimizer": optimizer, "lr": lr, "batch_size": batch_size or size}
            runs.append(CurveRun(**point))
    return runs


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


def trajectories(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines of each training in the order of epochs, from the initial weights.

    Args:
        lines: as `measure_curve` makes them.

    Returns:
        The lines, those of initial weights once for each training that began there.
    """
    trained, starts = lines[lines["epochs"] > 0], lines[lines["epochs"] == 0]
    trainings = trained[[*_START, *_TRAINING]].drop_duplicates()
    begun = starts.drop(columns=_TRAINING).merge(trainings, on=_START)
    return pd.concat([begun, trained]).sort_values([*_START, *_TRAINING, "epochs"])


def curve_tables(lines: pd.DataFrame) -> list[Table]:
    """The points along training, and how index and loss go together.

    Args:
        lines: as `measure_curve` makes them, one for each run.
    """
    forms = {
        **{"loss": ".4g", "accuracy": ".4f", "grad_norm": ".2g", "index": ",.1f"},
        **{"index_fraction": ".4f", "raw_count": ",.1f", "nullity": ",.1f", "tau": ".1e"},
    }
    cell = ["net", "data", "activation", "optimizer", "images", "epochs"]
    named = lines.assign(optimizer=lines["optimizer"].fillna("(initial)"))
    points = summary(named, cell, forms)
    points["epochs"] = points["epochs"].map(str)
    points = with_labels(points, ["optimizer", "images", "epochs", "runs"])
    headings = {
        **{"epochs": "epoch", "loss": "loss f", "grad_norm": "‖∇f‖", "tau": "τ"},
        **{"index_fraction": "index / n", "raw_count": "raw"},
    }
    return [
        Table(
            "Along training",
            points.rename(columns=headings),
            3,
            "Mean ± standard deviation over the seeds; epoch 0: initial weights. index: eigenvalues"
            " below −τ, τ the noise floor of each run; raw: computed eigenvalues below 0. Loss,"
            " accuracy, gradient and Hessian are those of the first training images, as many as"
            " stated. SGD and Adam take batches of 64; L-BFGS takes all training images at once,"
            " and up to 20 iterations an epoch.",
        ),
        Table(
            "Index against loss",
            correlations(lines),
            3,
            "Spearman's rank correlation of the index with the loss over the moments of one"
            " training: +1 if the index falls whenever the loss falls. Trainings in which one of"
            " them stays the same have none.",
        ),
    ]


def correlations(lines: pd.DataFrame) -> pd.DataFrame:
    """How loss and index go together along the trainings of each kind, as text."""
    kind = ["net", "data", "activation", "optimizer", "images"]
    rows = []
    for words, trainings in trajectories(lines).groupby(kind):
        found = pd.Series([rank_correlation(own) for _, own in trainings.groupby("seed")]).dropna()
        text = mean_std(found, ".2f") if len(found) else "–"
        told = {"runs": str(len(found)), "rank correlation": text}
        rows.append(dict(zip(kind, words, strict=True)) | told)
    found = pd.DataFrame(rows, columns=[*kind, "runs", "rank correlation"])
    return with_labels(found, ["optimizer", "images", "runs"])


def rank_correlation(lines: pd.DataFrame) -> float:
    """Spearman's rank correlation of the index with the loss; NaN where one is constant."""
    return float(lines[["loss", "index"]].corr(method="spearman").iloc[0, 1])


def draw_curves(lines: pd.DataFrame) -> dict[str, Figure]:
    """Draw the index against the loss, and below that against the epochs.

    Args:
        lines: as `measure_curve` makes them.

    Returns:
        The figure ``curves``; none if there are initial weights only.
    """
    drawn = trajectories(lines)
    if drawn.empty:
        return {}
    labels = [
        f"{optimizer}, lr {lr:g}, batch {size:,.0f}"
        for optimizer, lr, size in drawn[_TRAINING].itertuples(index=False)
    ]
    drawn = drawn.assign(label=labels)
    colours = colours_of(labels)
    rows = drawn[["net", "data", "images"]].drop_duplicates()
    activations = sorted(drawn["activation"].unique())
    figure = new_figure(2 * len(rows), len(activations))
    panels = figure.subplots(2 * len(rows), len(activations), squeeze=False)
    for i, (net, data, images) in enumerate(rows.itertuples(index=False)):
        own = drawn[(drawn[["net", "data", "images"]] == [net, data, images]).all(axis=1)]
        for j, activation in enumerate(activations):
            here = own[own["activation"] == activation]
            against_loss, against_epochs = panels[2 * i, j], panels[2 * i + 1, j]
            for (label, _), line in here.groupby(["label", "seed"]):
                style = {"color": colours[label], "lw": 1.1, "marker": "o", "ms": 3.5}
                against_loss.plot(line["loss"], line["index"], **style)
                # The end of a training, filled and larger.
                end = {"color": colours[label], "marker": "s", "ms": 7, "mec": "black"}
                against_loss.plot(line["loss"].iloc[-1:], line["index"].iloc[-1:], ls="none", **end)
                against_epochs.plot(line["epochs"], line["index"], **style)
            against_loss.set_title(
                f"{activation}: {net} on {data}, Hessian of {images:,} images", fontsize=10
            )
            _scale_losses(against_loss)
            _finish(against_loss, here, "train loss f of these images (logarithmic, falling)")
            _finish(against_epochs, here, "epoch")
            against_epochs.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        Line2D([], [], color=colour, marker="o", ms=3.5, label=label)
        for label, colour in colours.items()
    ]
    handles.append(Line2D([], [], color="white", marker="s", mec="black", ms=7, label="last epoch"))
    if drawn["bound"].notna().any():
        handles.append(Line2D([], [], color="black", ls="--", lw=1, label="structural upper bound"))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    seeds = ", ".join(map(str, sorted(lines["seed"].unique())))
    figure.supxlabel(
        f"index: eigenvalues λ < −τ, τ = {interval(lines['tau'])} (noise floors);"
        f" one line per seed ({seeds})",
        fontsize=10,
    )
    return {"curves": figure}


def _scale_losses(ax: Axes) -> None:
    """A logarithm that training goes along from left to right, with plain numbers at its ticks."""
    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _finish(ax: Axes, here: pd.DataFrame, x: str) -> None:
    """Name the axes, and draw what the structure allows where that is near."""
    ax.set_xlabel(x)
    ax.set_ylabel("index")
    ax.grid(alpha=0.25)
    top = here["index"].max()
    for bound in here["bound"].dropna().unique():
        if bound <= 1.5 * top:
            ax.axhline(bound, ls="--", color="black", lw=1)
            top = max(top, bound)
    ax.set_ylim(0, max(1.1 * top, 1))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
