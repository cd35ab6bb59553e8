"""The table of indices, put together from its lines: mean and spread over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from examples.paper.published import PUBLISHED, SOURCE
from examples.paper.results import Record
from examples.paper.statistics import cells, over, spread
from hvpspec.report import Grid

# What a cell is: runs that differ in nothing but the seed.
_CELL = (
    *("net", "activation", "data", "state", "images"),
    *("dtype", "protocol", "epochs", "optimizer", "lr", "batch_size"),
)

#: Columns that name a cell, and those of them that hold words.
_LABELS = ("network", "data", "state", "images", "runs")
_NUM_WORDS = 3


def table_grids(records: Iterable[Record]) -> list[Grid]:
    """Summarise the lines of the table, beside the published numbers.

    Args:
        records: as `measure_index` makes them, one for each run.

    Returns:
        The counts, the points they were counted at, and the index at further resolutions.
    """
    found = cells(records, _CELL)
    # By network, data, activation and state; the others may be None.
    groups = [found[cell] for cell in sorted(found, key=lambda cell: (cell[:5], str(cell)))]
    return [_counts(groups), _points(groups), _ladder(groups)]


def published_text(net: str, data: str, state: str) -> str:
    """The published mean and standard deviation, if there are any.

    Args:
        net: the network.
        data: the data set.
        state: ``trained`` or ``random``.

    >>> published_text("cnn", "mnist", "trained")
    '232.9 ± 2.88'
    """
    found = PUBLISHED.get((net, data, state))
    return f"{found.mean:,.6g} ± {found.std:.5g}" if found else "–"


def _counts(groups: Sequence[Sequence[Record]]) -> Grid:
    """The numbers of negative eigenvalues, computed and published."""
    rows = [
        (
            *_label(group),
            published_text(group[0]["net"], group[0]["data"], group[0]["state"]),
            over(group, "raw_count"),
            over(group, "index"),
            "–" if group[0]["bound"] is None else f"{group[0]['bound']:,}",
            over(group, "nullity"),
        )
        for group in groups
    ]
    return Grid(
        "Negative eigenvalues",
        (*_LABELS, "published", "raw", "index", "bound", "nullity"),
        tuple(rows),
        _NUM_WORDS,
        f"Mean ± standard deviation over the seeds. published: {SOURCE}. raw: computed eigenvalues"
        " below 0, of the whole matrix. index: those below −τ, τ the noise floor of each run."
        " bound: no index can be higher, by the network's structure. nullity: eigenvalues within"
        " ±τ.",
    )


def _points(groups: Sequence[Sequence[Record]]) -> Grid:
    """What the points are like."""
    rows = [
        (
            *_label(group),
            _training(group[0]),
            over(group, "grad_norm", ".3g"),
            over(group, "loss", ".4g"),
            over(group, "accuracy", ".4f"),
            over(group, "norm", ".3g"),
            over(group, "tau", ".2g"),
        )
        for group in groups
    ]
    return Grid(
        "Points",
        (*_LABELS, "training", "‖∇f‖", "loss f", "accuracy", "‖H‖", "τ"),
        tuple(rows),
        _NUM_WORDS,
        "Loss, accuracy and gradient are of the images whose Hessian it is.",
    )


def _ladder(groups: Sequence[Sequence[Record]]) -> Grid:
    """The index at resolutions relative to the norm."""
    ratios = sorted({ratio for group in groups for ratio in group[0]["ladder"]}, key=float)[::-1]
    rows = [
        (
            *_label(group),
            *(spread([record["ladder"][ratio] for record in group]).text() for ratio in ratios),
        )
        for group in groups
    ]
    return Grid(
        "Index by resolution",
        (*_LABELS, *(f"{float(ratio):.0e} ‖H‖" for ratio in ratios)),
        tuple(rows),
        _NUM_WORDS,
        "Eigenvalues below −τ for τ relative to the norm.",
    )


def _label(group: Sequence[Record]) -> tuple[str, ...]:
    """Name a cell."""
    first = group[0]
    network = f"{first['net']} {first['activation']}"
    return network, first["data"], first["state"], f"{first['images']:,}", str(len(group))


def _training(record: Record) -> str:
    """Say how a point was come by."""
    if record["state"] == "random":
        return "none"
    return (
        f"{record['optimizer']} {record['lr']:g}, batch {record['batch_size']},"
        f" {record['epochs']} epochs"
    )
