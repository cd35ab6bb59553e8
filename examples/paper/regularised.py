"""The index of f = L + λ‖θ‖², whose Hessian is H + 2λI: by λ, at fixed weights and retrained.

At fixed weights one spectrum answers for all λ. The Hessian is degenerate where −2λ is an
eigenvalue of H: for finitely many λ, which at a resolution become finitely many intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from examples.paper.figures import colours_of, interval, new_figure
from examples.paper.points import (
    Point,
    Protocol,
    Spectrum,
    hessian_at,
    images_of,
    index_record,
    network_at,
    runs_at_points,
    spectrum_at,
)
from examples.paper.results import Record
from examples.paper.tables import Table, with_labels
from hvpspec import index, zoo

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
    """List the runs, see `runs_at_points`: those at fixed weights first, then for each λ."""
    points = nets, data, activations, seeds
    fixed = protocol, protocol.for_epochs(0)
    runs = runs_at_points(RegularisedRun, *points, fixed, images=images, l2=None)
    for l2 in retrained:
        runs += runs_at_points(RegularisedRun, *points, [protocol], images=images, l2=l2)
    return runs


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


def regularised_tables(lines: pd.DataFrame) -> list[Table]:
    """Show what λ does, at fixed weights and retrained.

    Args:
        lines: as `measure_regularised` makes them, one for each run.
    """
    lines = lines.sort_values(["net", "activation", "data", "state", "images", "seed", "l2"])
    fixed, retrained = lines[lines["l2"].isna()], lines[lines["l2"].notna()]
    tables = []
    if len(fixed):
        shown = fixed.assign(
            **{
                f"index, λ = {l2:g}": [f"{r[f'{l2:g}']['index']:,}" for r in fixed["shown"]]
                for l2 in SHOWN
            }
        )
        columns = {
            **{"norm": ("‖H‖", ".3g"), "tau": ("τ", ".1e"), "index": ("index", ",")},
            **{"nullity": ("nullity", ",")},
            "nondegenerate_from": ("non-degenerate from λ", ".1e"),
            "degenerate_part": ("degenerate part", ".1e"),
            "positive_from": ("positive from λ", ".3g"),
            **{name: (name, "") for name in shown.columns if name.startswith("index, λ")},
        }
        tables.append(
            Table(
                "L + λ‖θ‖² at fixed weights",
                _labelled(shown, columns),
                3,
                "The Hessian is H + 2λI, counted from the eigenvalues of H. index, nullity: without"
                " λ. non-degenerate from λ: the smallest λ at which no eigenvalue of H lies within"
                " τ of −2λ. positive from λ: above it, H + 2λI is positive definite beyond τ."
                " degenerate part: of the λ below that, the part at which an eigenvalue of H lies"
                " within τ of −2λ.",
            )
        )
    if len(retrained):
        verdict = retrained["nondegenerate"].map({True: "yes", False: "no"})
        columns = {
            **{"l2": ("λ", "g"), "loss": ("f", ".4g"), "data_loss": ("loss L", ".4g")},
            **{"accuracy": ("accuracy", ".4f"), "squared_norm": ("‖θ‖²", ".4g")},
            **{"grad_norm": ("‖∇f‖", ".2g"), "index": ("index", ",")},
            **{"index_of_loss": ("index of L", ",.0f"), "nullity": ("nullity", ",")},
            **{"distance": ("distance", ".1e"), "tau": ("τ", ".1e")},
            "nondegenerate": ("non-degenerate", ""),
        }
        tables.append(
            Table(
                "L + λ‖θ‖² minimised anew",
                _labelled(retrained.assign(nondegenerate=verdict), columns),
                3,
                "Trained with λ from the same initial weights. index: eigenvalues of H + 2λI below"
                " −τ; index of L: of H there. distance: of −2λ from the spectrum of H;"
                " non-degenerate: it is larger than τ.",
            )
        )
    return tables


def _labelled(lines: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """Some fields as text under headings, behind what names the points."""
    names = ["net", "activation", "data", "state", "images"]
    text = {
        heading: lines[field].map(lambda x, form=form: f"{x:{form}}")
        for field, (heading, form) in columns.items()
    }
    seeds = lines["seed"].map(str)
    frame = pd.DataFrame({name: lines[name] for name in names} | {"seed": seeds} | text)
    return with_labels(frame, ["state", "images", "seed"])


def draw_regularised(lines: pd.DataFrame) -> dict[str, Figure]:
    """Draw index and nullity against λ: curves at fixed weights, marks for those retrained.

    Args:
        lines: as `measure_regularised` makes them.

    Returns:
        The figure ``regularised``, with a row for each network and data set.
    """
    lines = lines.sort_values(["net", "activation", "data", "state", "images"], kind="stable")
    fixed = lines["l2"].isna()
    lines = lines.assign(
        label=lines["activation"] + ", " + lines["state"].where(fixed, "retrained with λ")
    ).sort_values("l2", na_position="first", kind="stable")
    colours = colours_of(lines["label"])
    # Hollow and of several sizes: where counts agree, one mark is seen inside the other.
    marked = lines.loc[lines["l2"].notna(), "label"].unique()
    marks: dict[str, dict[str, Any]] = {
        label: {"marker": "s", "ms": 10 - 4 * (i % 2), "mfc": "none", "mew": 1.8, "ls": "none"}
        for i, label in enumerate(marked)
    }
    positive = [x for r in lines.to_dict("records") for x in _counted(r)[0] if x > 0]
    left = min(positive, default=1e-8) / 3  # where λ = 0 is drawn
    rows = list(lines.groupby(["net", "data", "images"]))
    figure = new_figure(len(rows), 2)
    panels = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    for i, ((net, data, images), own) in enumerate(rows):
        for line in own.to_dict("records"):
            lambdas, *counts = _counted(line)
            for ax, values in zip(panels[i], counts, strict=True):
                style = marks.get(line["label"], {"lw": 1.6})
                ax.plot(
                    [max(x, left) for x in lambdas], values, color=colours[line["label"]], **style
                )
        for ax, what in zip(panels[i], ("index", "nullity"), strict=True):
            ax.set_xscale("log")
            # ReLU networks have tens of negative eigenvalues where smooth ones have thousands.
            ax.set_yscale("symlog", linthresh=1)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
            ax.set_ylim(bottom=0)
            ax.set_ylabel(what)
            ax.grid(alpha=0.25)
            ax.set_title(f"{net} on {data}, Hessian of {images:,} images", fontsize=10)
    handles = [
        Line2D([], [], color=colour, label=label, **marks.get(label, {}))
        for label, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    seeds = ", ".join(map(str, sorted(lines["seed"].unique())))
    figure.supxlabel(
        "λ of L + λ‖θ‖² (logarithmic; λ = 0 at the left end); counts logarithmic from 1 on\n"
        "index: eigenvalues of H + 2λI below −τ; nullity: within ±τ;"
        f" τ = {interval(lines['tau'])} (noise floors); seed {seeds}",
        fontsize=10,
    )
    return {"regularised": figure}


def _counted(line: Any) -> tuple[list[float], list[int], list[int]]:
    """The λ of a line, ascending, with the index and the nullity at each."""
    if pd.isna(line["l2"]):
        return line["lambdas"], line["indices"], line["nullities"]
    return [line["l2"]], [line["index"]], [line["nullity"]]
