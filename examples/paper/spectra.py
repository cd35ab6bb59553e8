"""The spectra of trained networks: bulk, outliers and gaps, layers, and the Gauss-Newton part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from examples.paper.figures import SERIES, interval, new_figure, short
from examples.paper.points import (
    Point,
    Protocol,
    Spectrum,
    gauss_newton_at,
    hessian_at,
    images_of,
    network_at,
    read_spectrum,
    runs_at_points,
    save_spectrum,
    spectrum_at,
    spectrum_path,
)
from examples.paper.results import Record
from examples.paper.tables import Table, with_labels
from hvpspec import SymmetricOperator, index
from hvpspec.plotting import draw_spectrum, spectrum_histogram
from hvpspec.spectrum import split_eigenvalues

#: Fields of a run that decide how long it takes.
COST = ("net", "images", "part")

PARTS = ("hessian", "gauss-newton", "layers")


@dataclass(frozen=True, kw_only=True)
class SpectraRun(Point):
    """The spectra of one kind of matrix at one point.

    Attributes:
        images: the mean loss is over so many first training images.
        part: ``hessian``, ``gauss-newton``, or ``layers`` for the diagonal blocks of the Hessian.
    """

    images: int
    part: str


def spectra_runs(
    nets: Sequence[str],
    data: Sequence[str],
    activations: Sequence[str],
    images: int,
    protocol: Protocol,
) -> list[SpectraRun]:
    """List the runs, all of seed 0, by matrix; see `runs_at_points`."""
    points = nets, data, activations, 1, [protocol]
    return [
        run
        for part in PARTS
        for run in runs_at_points(SpectraRun, *points, images=images, part=part)
    ]


def measure_spectra(run: SpectraRun, *, out: Path, data_dir: Path | None) -> Record:
    """Compute spectra and keep their eigenvalues; that of the Hessian is read if it is kept.

    Args:
        run: what to measure.
        out: folder of the results; eigenvalues are kept in ``spectra`` below it.
        data_dir: folder of the full data sets.

    Returns:
        ``state``, and in ``spectra``, by matrix, what `spectrum_record` tells. For the Gauss-Newton
        part also its difference from the Hessian.

    Raises:
        HvpspecError: the data are not found, do not suffice or do not fit into memory, or training
            diverged.
    """
    if run.part == "hessian":
        found = spectrum_at(run, run.images, out=out, data_dir=data_dir)
        return {"state": run.state, "spectra": {"hessian": spectrum_record(found)}}
    model = network_at(run, out=out, data_dir=data_dir)
    data = images_of(run.data, data_dir).subset(run.images)
    hessian = hessian_at(model, data, torch.float64)
    told: Record = {"state": run.state}
    if run.part == "layers":
        layers = dict.fromkeys(name.rpartition(".")[0] for name in hessian.space.names)
        blocks: dict[str, SymmetricOperator] = {
            layer: hessian.block(f"{layer}.*") for layer in layers
        }
    else:
        G = gauss_newton_at(model, data, torch.float64)
        matrix, whole = G.to_dense(), hessian.to_dense()
        told["relative_difference"] = float(
            torch.linalg.matrix_norm(whole - matrix) / torch.linalg.matrix_norm(whole)
        )
        told["trace_hessian"], told["trace"] = float(whole.trace()), float(matrix.trace())
        del whole
        blocks = {"gauss-newton": G}
    spectra = {}
    for name, operator in blocks.items():
        path = spectrum_path(run, run.images, out, name)
        save_spectrum(path, index(operator, method="exact"))
        spectra[name] = spectrum_record(read_spectrum(path))
    return {**told, "spectra": spectra}


def spectrum_record(found: Spectrum) -> Record:
    """What a line tells of a spectrum.

    Args:
        found: all eigenvalues.

    Returns:
        Counts at the noise floor; ``bulk``, the outliers ``below`` and ``above`` it and the gaps,
        as `hvpspec.spectrum.split_eigenvalues` finds them; and ``around_zero``, the resolved
        eigenvalues nearest to 0 on each side, None where there is none.
    """
    eigenvalues, tau = found.eigenvalues, found.noise_floor
    split = split_eigenvalues(eigenvalues, noise_floor=tau)
    negative, positive = eigenvalues[eigenvalues < -tau], eigenvalues[eigenvalues > tau]
    return {
        "dim": len(eigenvalues),
        "tau": tau,
        "index": len(negative),
        "nullity": len(eigenvalues) - len(negative) - len(positive),
        "norm": found.norm,
        "lambda_min": float(eigenvalues[0]),
        "lambda_max": float(eigenvalues[-1]),
        "bulk": list(split.bulk),
        "below": [outlier.value for outlier in split.bottom],
        "above": [outlier.value for outlier in split.top],
        "gap_below": split.gap_below,
        "gap_above": split.gap_above,
        "around_zero": [
            float(negative[-1]) if len(negative) else None,
            float(positive[0]) if len(positive) else None,
        ],
    }


def spectra_tables(lines: pd.DataFrame) -> list[Table]:
    """Show the spectra, and how the Hessians differ from their Gauss-Newton parts.

    Args:
        lines: as `measure_spectra` makes them.
    """
    names = ["net", "activation", "data", "images"]
    lines = in_order(lines)
    spectra = pd.DataFrame(
        [
            {name: line[name] for name in names} | {"matrix": matrix} | _numbers(told)
            for line in lines.to_dict("records")
            for matrix, told in line["spectra"].items()
        ]
    )
    tables = [
        Table(
            "Spectra",
            with_labels(spectra, ["images", "matrix"]),
            4,
            "Of trained networks, seed 0: the Hessian, its Gauss–Newton part, and the Hessian's"
            " diagonal blocks by layer. The bulk holds the central half of the eigenvalues and all"
            " that no gap divides from it; a gap is at least a tenth as wide as the bulk and a"
            " hundredth of the range, and outliers are what lies beyond. Eigenvalues nearer to each"
            " other than 2τ count as one outlier. next below 0, next above 0: the eigenvalues"
            " beyond ±τ nearest to 0.",
        )
    ]
    parts = lines[lines["part"] == "gauss-newton"]
    if len(parts):
        told = {
            "‖H − G‖ / ‖H‖": parts["relative_difference"].map("{:.3f}".format),
            "tr G": parts["trace"].map("{:.4g}".format),
            "tr H": parts["trace_hessian"].map("{:.4g}".format),
        }
        frame = with_labels(parts[names].assign(**told), ["images"])
        note = "In the Frobenius norm."
        tables.append(Table("Hessian and Gauss–Newton part", frame, 2, note))
    return tables


def draw_spectra(lines: pd.DataFrame, *, out: Path) -> dict[str, Figure]:
    """Draw the spectra as histograms, and matrix by matrix by rank.

    Args:
        lines: as `measure_spectra` makes them.
        out: folder of the results, with the eigenvalues.

    Returns:
        By activation the figures ``spectra-…-linear``, ``spectra-…-symlog`` and
        ``spectra-…-parts``, for those matrices that there are.
    """
    figures = {}
    for activation, own in in_order(lines).groupby("activation"):
        panels: dict[str, dict[str, Panel]] = {}
        for line in own.to_dict("records"):
            run = SpectraRun(**{f.name: line[f.name] for f in fields(SpectraRun) if f.name in line})
            title = f"{run.net} {activation} on {run.data}, {run.images:,} images, seed {run.seed}"
            for name, told in line["spectra"].items():
                found = read_spectrum(spectrum_path(run, run.images, out, name))
                panels.setdefault(title, {})[name] = found, *told["bulk"]
        hessians = {title: own["hessian"] for title, own in panels.items() if "hessian" in own}
        if hessians:
            for scale, symlog in (("linear", False), ("symlog", True)):
                figures[f"spectra-{activation}-{scale}"] = plot_histograms(hessians, symlog=symlog)
        figures[f"spectra-{activation}-parts"] = plot_ranks(panels)
    return figures


def in_order(lines: pd.DataFrame) -> pd.DataFrame:
    """The lines by network, and by matrix as in `PARTS`."""
    rank = lines["part"].map(PARTS.index)
    by = ["net", "activation", "data", "images", "rank"]
    return lines.assign(rank=rank).sort_values(by).drop(columns="rank")


def _numbers(told: Record) -> dict[str, str]:
    """A spectrum in a row of the table."""

    def number(x: float | None) -> str:
        """Three digits, or that there is none."""
        return "–" if x is None else f"{x:.3g}"

    low, high = told["bulk"]
    return {
        "n": f"{told['dim']:,}",
        "τ": f"{told['tau']:.1e}",
        "index": f"{told['index']:,}",
        "nullity": f"{told['nullity']:,}",
        "smallest": number(told["lambda_min"]),
        "largest": number(told["lambda_max"]),
        "bulk": f"[{low:.3g}, {high:.3g}]",
        "outliers below": f"{len(told['below']):,}",
        "outliers above": f"{len(told['above']):,}",
        "gap below": number(told["gap_below"]),
        "gap above": number(told["gap_above"]),
        "next below 0": number(told["around_zero"][0]),
        "next above 0": number(told["around_zero"][1]),
    }


#: A spectrum, where its bulk begins, and where that ends.
Panel = tuple[Spectrum, float, float]


def plot_histograms(spectra: Mapping[str, Panel], *, symlog: bool) -> Figure:
    """Draw histograms in two columns, with the bulk marked below each.

    Args:
        spectra: by the titles of their panels, at least one.
        symlog: whether axes are logarithmic outside the noise floor.
    """
    figure, panels = _panels(len(spectra))
    for ax, (title, (found, low, high)) in zip(panels, spectra.items(), strict=True):
        values = found.eigenvalues.numpy()
        inside = ((low <= values) & (values <= high)).sum()
        ax.plot(
            [low, high],
            [0.015, 0.015],
            transform=ax.get_xaxis_transform(),
            label=f"bulk [{short(low)}, {short(high)}]: {inside:,}",
            color="black",
            marker="|",
            lw=3,
        )
        histogram = spectrum_histogram(
            values, noise_floor=found.noise_floor, symlog=symlog, bins=80
        )
        draw_spectrum(ax, histogram)
        ax.set_xlabel(f"eigenvalue λ ({'symlog' if symlog else 'linear'} axis)")
        if symlog:
            _thin_ticks(ax, found.noise_floor)
        _head(ax, title, "upper center")
    note = "; the axis is linear within ± the noise floor, logarithmic outside" if symlog else ""
    figure.supxlabel(f"counts at τ, the noise floor of each matrix{note}", fontsize=10)
    return figure


def plot_ranks(spectra: Mapping[str, Mapping[str, Panel]]) -> Figure:
    """Draw the eigenvalues of several matrices by rank, both axes logarithmic.

    Args:
        spectra: by the titles of their panels and by the names of the matrices, at least one.
    """
    figure, panels = _panels(len(spectra))
    for ax, (title, matrices) in zip(panels, spectra.items(), strict=True):
        for i, (name, (found, *_)) in enumerate(matrices.items()):
            style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "lw": 1.5}
            values, floor = found.eigenvalues.numpy(), found.noise_floor
            above, below = values[values > floor][::-1], -values[values < -floor]
            label = f"{name}: {len(above):,} > τ, {len(below):,} < −τ"
            ax.plot(range(1, len(above) + 1), above, label=label, **style)
            ax.plot(range(1, len(below) + 1), below, ls="--", **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("rank")
        ax.set_ylabel("|eigenvalue λ|")
        ax.grid(alpha=0.25)
        _head(ax, title, "upper right")
    floors = pd.Series([own[0].noise_floor for panel in spectra.values() for own in panel.values()])
    figure.supxlabel(
        "solid: positive eigenvalues, from the largest; dashed: negative ones, from the most"
        f" negative; those beyond τ,\nthe noise floor of each matrix, {interval(floors)}; layers:"
        " diagonal blocks of the Hessian",
        fontsize=10,
    )
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in two columns."""
    rows = math.ceil(count / 2)
    figure = new_figure(rows, 2)
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for ax in panels[count:]:
        ax.remove()
    return figure, panels[:count]


def _thin_ticks(ax: Axes, noise_floor: float) -> None:
    """Leave out the ticks of a symlog axis whose numbers would run into that at 0."""
    left, right = ax.get_xlim()
    ticks = [t for t in ax.xaxis.get_majorticklocs() if t == 0 or abs(t) > 1e3 * noise_floor]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.set_xlim(left, right)


def _head(ax: Axes, title: str, place: Literal["upper center", "upper right"]) -> None:
    """Name a panel, and explain its lines in room made above them."""
    ax.set_title(title, fontsize=10)
    bottom, top = ax.get_ylim()
    lines = len(ax.get_legend_handles_labels()[1])
    ax.set_ylim(bottom, top * (top / bottom) ** (0.1 * lines))
    ax.legend(loc=place, fontsize=8)
