"""How well each way of counting agrees with the published numbers: all, not only the best."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.paper.points import STANDARD
from examples.paper.protocols import CUTOFFS, ProtocolRun
from examples.paper.published import PUBLISHED, SOURCE
from examples.paper.results import Record
from examples.paper.statistics import Spread, spread
from hvpspec.report import Grid

#: Network, data set and state: a number that was published.
Cell = tuple[str, str, str]

_WAY = ("activation", "head", "images", "dtype", "assembly", "solver", "sample")
_NETS = tuple(dict.fromkeys(net for net, _, _ in PUBLISHED))
_HEADINGS = (
    *("activation", "head", "dtype", "assembly", "solver", "sample"),
    *("images", "epochs", "cutoff", "seeds"),
)
_SCORES = ("within 1 std", "within 2 std", *_NETS, "median distance")
_NUM_WORDS = 6
_NUM_SHOWN = 10


@dataclass(frozen=True)
class Score:
    """One way of counting, held against what was published.

    Attributes:
        activation: of the networks.
        head: what they return.
        images: in the Hessian.
        dtype: of matrix and solver.
        assembly: of the matrix.
        solver: of its eigenvalues.
        sample: which images.
        cutoff: one of `CUTOFFS`.
        epochs: of the trained networks.
        spreads: for each published number that was computed, the counts of the seeds.
        seeds: the least number of seeds in one of these means.
    """

    activation: str
    head: str
    images: int
    dtype: str
    assembly: str
    solver: str
    sample: str
    cutoff: str
    epochs: int
    spreads: dict[Cell, Spread]
    seeds: int

    @property
    def counts(self) -> dict[Cell, float]:
        """The mean counts."""
        return {cell: spread.mean for cell, spread in self.spreads.items()}

    @property
    def distances(self) -> dict[Cell, float]:
        """The distance of each count from the published mean, in published deviations."""
        return {
            cell: abs(count - PUBLISHED[cell].mean) / PUBLISHED[cell].std
            for cell, count in self.counts.items()
        }

    def within(self, deviations: float, net: str | None = None) -> int:
        """How many counts lie within so many published deviations of the published mean.

        Args:
            deviations: 1 for within the published spread.
            net: of this network alone; None for all.
        """
        found = self.distances.items()
        return sum(distance <= deviations for (name, *_), distance in found if net in (None, name))

    @property
    def median_distance(self) -> float:
        """Half of the counts are nearer than this, in published deviations."""
        return statistics.median(self.distances.values())


def scores(records: Iterable[Record]) -> list[Score]:
    """Score every way of counting, best first.

    A way is an activation, head, images, dtype, assembly, solver, length of training and cutoff,
    the same for all networks. Its random states are shared by all lengths of training.

    Args:
        records: as `measure_protocol` makes them, one for each run; those on data without a
            published number are left out.

    Returns:
        Ordered by how many counts lie within one published deviation, then within two, then by the
        median distance.
    """
    by_way: dict[tuple[Any, ...], dict[int, dict[Cell, list[Record]]]] = {}
    for record in records:
        cell = cell_of(record)
        if cell in PUBLISHED:
            lengths = by_way.setdefault(_way_of(record), {})
            lengths.setdefault(record["epochs"], {}).setdefault(cell, []).append(record)
    found = []
    for way, lengths in by_way.items():
        random = lengths.pop(0, {})
        # A search without training still has its random states.
        for epochs, trained in lengths.items() or [(0, {})]:
            cells = random | trained
            for cutoff in CUTOFFS:
                spreads = {
                    cell: spread([record["counts"][cutoff] for record in group])
                    for cell, group in cells.items()
                }
                seeds = min(map(len, cells.values()))
                settings: dict[str, Any] = dict(zip(_WAY, way, strict=True))
                found.append(
                    Score(**settings, cutoff=cutoff, epochs=epochs, spreads=spreads, seeds=seeds)
                )
    return sorted(
        found, key=lambda score: (-score.within(1), -score.within(2), score.median_distance)
    )


def most_complete(found: Sequence[Score]) -> Score:
    """Of the ways that count most of the published numbers, the one that agrees with most of them.

    One seed agrees by chance where several do not, so that ways with several come first; of those
    that agree with as many, the one with most seeds is taken.

    Args:
        found: at least one, as :func:`scores` orders them.
    """
    return max(found, key=lambda s: (len(s.counts), s.seeds > 1, s.within(1), s.seeds))


def with_table(records: Iterable[Record], table: Iterable[Record]) -> list[Record]:
    """Add the table's runs to those of a search: its counts are those of one more way.

    They are of the whole matrix, by ``eigvalsh`` in float64; "floor" is their noise floor, which is
    n u and the error of assembly. Runs of the search come first where both have one.

    Args:
        records: as `measure_protocol` makes them.
        table: as `measure_index` makes them; those of short training are left out.
    """
    way = {"assembly": "blocks", "solver": "eigvalsh", "sample": "first"}
    found = [
        {
            **record,
            **way,
            "counts": {"0": record["raw_count"], "floor": record["index"], **record["ladder"]},
        }
        for record in table
        if record["protocol"] == STANDARD.name
    ]
    return list({_point_of(record): record for record in [*found, *records]}.values())


def _side_by_side(records: Sequence[Record], score: Score) -> Grid:
    """The published numbers beside those of one way, and what these consist of."""
    rows = []
    for cell in score.counts:
        group = [r for r in records if cell_of(r) == cell and belongs(r, score)]
        # Lines from before rows of zeros were counted do not tell.
        told = all("zero_rows" in r for r in group)
        rows.append(
            (
                *cell,
                str(len(group)),
                _published(cell),
                _count(score, cell),
                spread([r["counts"]["floor"] for r in group]).text(),
                *(
                    spread([r[name] - r["zero_rows"] for r in group]).text(",.0f") if told else "–"
                    for name in ("dim", "nullity")
                ),
            )
        )
    way = f"{score.activation}, {score.head}, {score.images:,} {score.sample} images, {score.dtype}"
    return Grid(
        "Published and counted",
        (
            *("network", "data", "state", "seeds", "published", "counted", "below −n u ‖H‖"),
            *("rows not zero", "eigenvalues zero in these"),
        ),
        tuple(rows),
        3,
        f"Mean ± standard deviation over the seeds: {way}, {score.epochs} epochs, {score.assembly},"
        f" {score.solver}, below {score.cutoff}; a star marks means within the published spread."
        " rows not zero: of the matrix. eigenvalues zero in these: within"
        " ±n u ‖H‖, but for those of rows of zeros.",
    )


def score_grids(records: Iterable[Record]) -> list[Grid]:
    """Show the best ways, what they count, then the scores of all ways, and all counts.

    Args:
        records: as for :func:`scores`.
    """
    records = list(records)
    found = scores(records)
    published = tuple(PUBLISHED)
    rows = tuple(_row(score) for score in found)
    means = map(_published, published)
    counts = [(*_way(score), *(_count(score, cell) for cell in published)) for score in found]
    best = [_best(found, net) for net in _NETS if any(_of(score, net) for score in found)]
    return [
        Grid(
            "Best ways of counting",
            (*_HEADINGS, *_SCORES),
            rows[:_NUM_SHOWN],
            _NUM_WORDS,
            f"The first of {len(found):,} ways, held against {len(published)} published means"
            f" ({SOURCE}). within 1 std: of the counts that were computed, those no farther from"
            " the published mean than the published standard deviation; then the same by network."
            " median distance: in published standard deviations. cutoff: relative to the largest"
            " absolute eigenvalue; floor is n u. With so many ways, some numbers agree by chance.",
        ),
        Grid(
            "Best way for each network alone",
            ("network", *_HEADINGS, *_SCORES[:2]),
            tuple(best),
            _NUM_WORDS + 1,
            "The way with the most of the network's own numbers within the published spread.",
        ),
        *([_side_by_side(records, most_complete(found))] if found else []),
        Grid("All ways", (*_HEADINGS, *_SCORES), rows, _NUM_WORDS),
        Grid(
            "All counts",
            (*_HEADINGS, *(" ".join(cell) for cell in published)),
            (("published", *[""] * (len(_HEADINGS) - 1), *means), *counts),
            _NUM_WORDS,
            "Mean ± standard deviation over the seeds; a star marks means within the published"
            " spread.",
        ),
    ]


def _way_of(record: Record) -> tuple[Any, ...]:
    """What tells the way of a line."""
    # Lines that are older than these fields.
    older = {"sample": ProtocolRun.sample, "head": ProtocolRun.head}
    return tuple({**older, **record}[name] for name in _WAY)


def _point_of(record: Record) -> tuple[Any, ...]:
    """What tells a run: its way, and where it was."""
    return (*_way_of(record), *(record[name] for name in ("net", "data", "seed", "epochs")))


def cell_of(record: Record) -> Cell:
    """The number that a line could have been published as.

    Args:
        record: of a run.
    """
    return record["net"], record["data"], record["state"]


def belongs(record: Record, score: Score) -> bool:
    """Whether a line is one of those that a score counts.

    Args:
        record: of a run.
        score: a way of counting.
    """
    way = tuple(getattr(score, name) for name in _WAY)
    return _way_of(record) == way and record["epochs"] in (0, score.epochs)


def _way(score: Score) -> tuple[str, ...]:
    """Name a way of counting."""
    return (
        *(score.activation, score.head, score.dtype, score.assembly, score.solver, score.sample),
        *(f"{score.images:,}", str(score.epochs), score.cutoff, str(score.seeds)),
    )


def _of(score: Score, net: str) -> int:
    """How many of a network's numbers were computed."""
    return sum(name == net for name, *_ in score.counts)


def _row(score: Score) -> tuple[str, ...]:
    """One way of counting and how well it does."""
    total = len(score.counts)
    by_net = [f"{score.within(1, net)}/{_of(score, net)}" for net in _NETS]
    ends = f"{score.within(1)}/{total}", f"{score.within(2)}/{total}"
    return (*_way(score), *ends, *by_net, f"{score.median_distance:.2f}")


def _best(found: Sequence[Score], net: str) -> tuple[str, ...]:
    """The way that does best for one network."""
    with_net = [score for score in found if _of(score, net)]
    best = max(with_net, key=lambda score: (score.within(1, net), score.within(2, net)))
    total = _of(best, net)
    return (
        net,
        *_way(best),
        f"{best.within(1, net)}/{total}",
        f"{best.within(2, net)}/{total}",
    )


def _published(cell: Cell) -> str:
    """A published number."""
    return f"{PUBLISHED[cell].mean:,.1f} ± {PUBLISHED[cell].std:,.1f}"


def _count(score: Score, cell: Cell) -> str:
    """A count, marked if it agrees."""
    if cell not in score.counts:
        return "–"
    return score.spreads[cell].text() + ("*" if score.distances[cell] <= 1 else "")
