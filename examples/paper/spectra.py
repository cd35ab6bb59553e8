"""The spectra of trained networks: bulk, outliers and gaps, layers, and the Gauss-Newton part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from examples.paper.points import (
    Assembled,
    Point,
    Protocol,
    gauss_newton_at,
    hessian_at,
    images_of,
    network_at,
)
from examples.paper.results import Record
from examples.paper.spectra_kept import (
    Spectrum,
    read_spectrum,
    save_spectrum,
    spectrum_at,
    spectrum_path,
)
from hvpspec.linalg import SymmetricOperator
from hvpspec.report import Grid
from hvpspec.spectrum import index
from hvpspec.spectrum.bulk import split_eigenvalues

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """List the runs, all of seed 0.

    Args:
        nets: names of networks.
        data: names of data sets.
        activations: of the networks.
        images: in the matrices.
        protocol: of the training.
    """
    return [
        SpectraRun(
            net=net,
            data=source,
            activation=activation,
            seed=0,
            images=images,
            part=part,
            **protocol.training(net),
        )
        for part in PARTS
        for net in nets
        for source in data
        for activation in activations
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
        blocks = {"gauss-newton": Assembled(G, matrix)}
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
        as `hvpspec.spectrum.bulk.split_eigenvalues` finds them; and ``around_zero``, the resolved
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


def spectra_grids(records: Iterable[Record]) -> list[Grid]:
    """Show the spectra, and how the Hessians differ from their Gauss-Newton parts.

    Args:
        records: as `measure_spectra` makes them.
    """
    lines = sorted(records, key=lambda r: (*_label(r), PARTS.index(r["part"])))
    spectra = [
        (*_label(r), name, *_numbers(told)) for r in lines for name, told in r["spectra"].items()
    ]
    differences = [
        (
            *_label(r),
            f"{r['relative_difference']:.3f}",
            f"{r['trace']:.4g}",
            f"{r['trace_hessian']:.4g}",
        )
        for r in lines
        if r["part"] == "gauss-newton"
    ]
    return [
        Grid(
            "Spectra",
            (
                *("network", "data", "images", "matrix", "n", "τ", "index", "nullity"),
                *("smallest", "largest", "bulk", "outliers below", "above", "gap below", "above"),
                *("next below 0", "above"),
            ),
            tuple(spectra),
            4,
            "Of trained networks, seed 0: the Hessian, its Gauss–Newton part, and the Hessian's"
            " diagonal blocks by layer. The bulk holds the central half of the eigenvalues and all"
            " that no gap divides from it; a gap is at least a tenth as wide as the bulk and a"
            " hundredth of the range, and outliers are what lies beyond. Eigenvalues nearer to each"
            " other than 2τ count as one outlier. next below 0, above: the eigenvalues beyond ±τ"
            " nearest to 0.",
        ),
        Grid(
            "Hessian and Gauss–Newton part",
            ("network", "data", "images", "‖H − G‖ / ‖H‖", "tr G", "tr H"),
            tuple(differences),
            2,
            "In the Frobenius norm.",
        ),
    ]


def draw_spectra(records: Sequence[Record], *, out: Path) -> dict[str, Figure]:
    """Draw the spectra as histograms, and matrix by matrix by rank.

    Args:
        records: as `measure_spectra` makes them.
        out: folder of the results, with the eigenvalues.

    Returns:
        By activation the figures ``spectra-…-linear``, ``spectra-…-symlog`` and
        ``spectra-…-parts``, for those matrices that there are.
    """
    from examples.paper.plot_spectra import SpectrumPanel, plot_ranks, plot_spectra

    figures = {}
    lines = sorted(records, key=lambda r: (_label(r), PARTS.index(r["part"])))
    for activation in dict.fromkeys(r["activation"] for r in lines):
        panels: dict[str, dict[str, SpectrumPanel]] = {}
        for r in (r for r in lines if r["activation"] == activation):
            run = SpectraRun(**{name: r[name] for name in SpectraRun.__dataclass_fields__})
            title = f"{run.net} {activation} on {run.data}, {run.images:,} images, seed {run.seed}"
            for name, told in r["spectra"].items():
                matrix = None if name == "hessian" else name
                found = read_spectrum(spectrum_path(run, run.images, out, matrix))
                panels.setdefault(title, {})[name] = SpectrumPanel(
                    found.eigenvalues.numpy(), found.noise_floor, *told["bulk"]
                )
        hessians = {
            title: found["hessian"] for title, found in panels.items() if "hessian" in found
        }
        if hessians:
            for scale, symlog in (("linear", False), ("symlog", True)):
                figures[f"spectra-{activation}-{scale}"] = plot_spectra(hessians, symlog=symlog)
        figures[f"spectra-{activation}-parts"] = plot_ranks(panels)
    return figures


def _label(record: Record) -> tuple[str, ...]:
    """Name a point."""
    return f"{record['net']} {record['activation']}", record["data"], f"{record['images']:,}"


def _numbers(told: Record) -> tuple[str, ...]:
    """A spectrum in a row of the table."""

    def number(x: float | None) -> str:
        """Three digits, or that there is none."""
        return "–" if x is None else f"{x:.3g}"

    low, high = told["bulk"]
    return (
        f"{told['dim']:,}",
        f"{told['tau']:.1e}",
        f"{told['index']:,}",
        f"{told['nullity']:,}",
        number(told["lambda_min"]),
        number(told["lambda_max"]),
        f"[{low:.3g}, {high:.3g}]",
        f"{len(told['below']):,}",
        f"{len(told['above']):,}",
        number(told["gap_below"]),
        number(told["gap_above"]),
        *(number(x) for x in told["around_zero"]),
    )
