"""The paper's table of indices, and its three claims: before and after training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from examples.paper.points import (
    Point,
    Protocol,
    hessian_at,
    images_of,
    index_record,
    network_at,
    runs_at_points,
    save_spectrum,
    spectrum_path,
)
from examples.paper.published import NAMES, SOURCE, published_text
from examples.paper.results import Record
from examples.paper.tables import Table, mean_std, summary, texts, with_labels
from hvpspec import index, zoo
from hvpspec.spectrum import Exact

#: Fields of a run that decide how long it takes.
COST = ("net", "images", "epochs")

#: A resolution at which the last claim is looked at, too, in units of the norm.
COARSE = "1e-04"

# Runs that differ in nothing but the seed.
_CELL = (
    *("net", "activation", "data", "state", "images"),
    *("dtype", "protocol", "epochs", "optimizer", "lr", "batch_size"),
)
_LABELS = ("state", "images", "runs")
_NUM_WORDS = 3


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
    """List the runs of the table, trained and at random weights; see `runs_at_points`."""
    protocols = (protocol, protocol.for_epochs(0))
    return runs_at_points(TableRun, nets, data, activations, seeds, protocols, images=images)


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
    result = index(hessian_at(model, data, torch.float64), method=Exact(keep_zero_rows=True))
    counted = time.perf_counter()
    if run.seed == 0:
        save_spectrum(spectrum_path(run, run.images, out), result)
    _, accuracy = zoo.evaluate(model, data)
    return {
        "state": run.state,
        **index_record(result),
        "accuracy": accuracy,
        "stages": {"training": round(trained - start, 3), "index": round(counted - trained, 3)},
    }


def table_tables(lines: pd.DataFrame) -> list[Table]:
    """The counts beside the published numbers, the points, further resolutions, and the claims.

    Args:
        lines: as `measure_index` makes them, one for each run.
    """
    ratios = sorted(lines["ladder"].iloc[0], key=float, reverse=True)
    lines = with_ladder(lines)
    claims = claims_table(lines)
    return [*_counts_and_points(lines, ratios), *([claims] if len(claims.frame) else [])]


def with_ladder(lines: pd.DataFrame) -> pd.DataFrame:
    """Give each resolution of the ladder a field of its own."""
    return lines.join(pd.DataFrame(lines["ladder"].tolist(), index=lines.index))


def before_and_after(lines: pd.DataFrame) -> pd.DataFrame:
    """Each trained run, with the fields of the same run at random weights as ``…_before``.

    Args:
        lines: of runs before and after training.
    """
    same = ["net", "data", "activation", "seed", "images", "dtype"]
    trained, random = (lines[lines["state"] == state] for state in ("trained", "random"))
    return trained.merge(random, on=same, suffixes=("", "_before"))


def claims_table(lines: pd.DataFrame) -> Table:
    """What the paper claims of the index: that it is high, similar over runs, and has risen.

    Args:
        lines: of the table, with a field for each resolution.
    """
    rows = []
    for (images, activation, net, data), pairs in before_and_after(lines).groupby(
        ["images", "activation", "net", "data"]
    ):
        after, before, first = pairs["index"], pairs["index_before"], pairs.iloc[0]
        higher = {"": after > before, COARSE: pairs[COARSE] > pairs[f"{COARSE}_before"]}
        rows.append(
            {
                "network": f"{NAMES[net]}, {activation}",
                "data": data,
                "images": f"{images:,}",
                "runs": str(len(pairs)),
                "index, trained": mean_std(after),
                "random": mean_std(before),
                "bound": "–" if pd.isna(first["bound"]) else f"{first['bound']:,.0f}",
                "of n": f"{after.mean() / first['dim']:.1%}",
                "std / mean": "–" if len(pairs) == 1 else f"{after.std() / after.mean():.1%}",
                "higher": f"{higher[''].sum()} of {len(pairs)}",
                f"higher at {COARSE} ‖H‖": f"{higher[COARSE].sum()} of {len(pairs)}",
            }
        )
    return Table(
        "The three claims",
        pd.DataFrame(rows),
        2,
        "Mean ± standard deviation over the seeds, at the noise floor. bound: of the index, from"
        " the network's structure. of n: the trained index as part of the parameters. std / mean:"
        " of the trained index. higher: runs that end at a higher index than they start from, at"
        f" the noise floor, and of eigenvalues below −{COARSE} ‖H‖.",
    )


def _counts_and_points(lines: pd.DataFrame, ratios: Sequence[str]) -> list[Table]:
    """The tables with a row for each cell."""
    forms = {
        **{"raw_count": ",.1f", "index": ",.1f", "nullity": ",.1f", "grad_norm": ".3g"},
        **{"loss": ".4g", "accuracy": ".4f", "norm": ".3g", "tau": ".2g"},
        **dict.fromkeys(ratios, ",.1f"),
    }
    cells = summary(lines.assign(bound=lines["bound"].astype(float)), [*_CELL, "bound"], forms)
    cells["published"] = [
        published_text(*cell) for cell in cells[["net", "data", "state"]].itertuples(index=False)
    ]
    cells["bound"] = texts(cells["bound"], ",.0f")
    cells["training"] = cells.apply(_training, axis=1)
    cells = with_labels(cells, _LABELS)
    headings = {"raw_count": "raw", "grad_norm": "‖∇f‖", "loss": "loss f", "norm": "‖H‖"}
    cells = cells.rename(columns={**headings, "tau": "τ", **{r: f"{r} ‖H‖" for r in ratios}})

    def table(title: str, shown: Sequence[str], note: str) -> Table:
        """Some of the columns."""
        return Table(title, cells[["network", "data", *_LABELS, *shown]], _NUM_WORDS, note)

    return [
        table(
            "Negative eigenvalues",
            ("published", "raw", "index", "bound", "nullity"),
            f"Mean ± standard deviation over the seeds. published: {SOURCE}. raw: computed"
            " eigenvalues below 0, of the whole matrix. index: those below −τ, τ the noise floor of"
            " each run. bound: no index can be higher, by the network's structure. nullity:"
            " eigenvalues within ±τ.",
        ),
        table(
            "Points",
            ("training", "‖∇f‖", "loss f", "accuracy", "‖H‖", "τ"),
            "Loss, accuracy and gradient are of the images whose Hessian it is.",
        ),
        table(
            "Index by resolution",
            [f"{ratio} ‖H‖" for ratio in ratios],
            "Eigenvalues below −τ for τ relative to the norm.",
        ),
    ]


def _training(cell: pd.Series) -> str:
    """Say how a point was come by."""
    if cell["state"] == "random":
        return "none"
    return (
        f"{cell['optimizer']} {cell['lr']:g}, batch {cell['batch_size']:.0f},"
        f" {cell['epochs']} epochs"
    )
