"""How well each way of counting agrees with the published numbers: all, not only the best."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from examples.paper.points import STANDARD
from examples.paper.protocols import CUTOFFS, ProtocolRun
from examples.paper.published import PUBLISHED, SOURCE
from examples.paper.tables import Table, summary, texts

#: Network, data set and state: what a published number is of.
CELL = ["net", "data", "state"]
#: What tells a way of counting, the same for all networks.
WAY = ["activation", "head", "dtype", "assembly", "solver", "sample", "images"]
#: A way of counting after so many epochs, with a cutoff.
SCORE = [*WAY, "epochs", "cutoff"]

_NETS = tuple(dict.fromkeys(net for net, _, _ in PUBLISHED))
_NUM_WORDS = 6
_NUM_SHOWN = 10
# Lines that are older than these fields lack them.
_OLDER = {"sample": ProtocolRun.sample, "head": ProtocolRun.head}


@dataclass(frozen=True, eq=False)
class Scores:
    """Every way of counting, held against what was published.

    Attributes:
        counts: for each of `SCORE` and `CELL` the mean count over so many ``seeds``, its ``text``,
            and its ``distance`` from the published mean in published standard deviations.
        ways: for each of `SCORE`, best first: the least number of ``seeds`` of a mean; how many of
            the means there are (``total``); how many of them are ``within_1`` and ``within_2``
            published standard deviations, and the ``median`` distance.
    """

    counts: pd.DataFrame
    ways: pd.DataFrame

    def counts_of(self, way: pd.Series) -> pd.DataFrame:
        """The counts of one of the ``ways``, in the order of the published numbers."""
        own = self.counts[(self.counts[SCORE] == way[SCORE]).all(axis=1)].set_index(CELL)
        return own.loc[[cell for cell in PUBLISHED if cell in own.index]].reset_index()

    def most_complete(self) -> pd.Series:
        """Of the ways that count most of the published numbers, that which agrees with most.

        One seed agrees by chance where several do not, so that ways with several come first; of
        those that agree with as many, the one with most seeds is taken.
        """
        order = self.ways.assign(several=self.ways["seeds"] > 1)
        order = order[["total", "several", "within_1", "seeds"]]
        best = order.sort_values(list(order.columns), ascending=False, kind="stable").index[0]
        return self.ways.loc[best]


def scores(lines: pd.DataFrame) -> Scores:
    """Score every way of counting.

    Args:
        lines: as `measure_protocol` makes them, one for each run; those on data without a published
            number are left out.

    Returns:
        Ways ordered by how many counts lie within one published deviation, then within two, then by
        the median distance.
    """
    published = pd.DataFrame(
        [(*cell, number.mean, number.std) for cell, number in PUBLISHED.items()],
        columns=[*CELL, "published", "deviation"],
    )
    lines = with_defaults(lines).merge(published, on=CELL)
    # The initial weights belong to every length of training.
    trained, random = lines[lines["epochs"] > 0], lines[lines["epochs"] == 0]
    lengths = trained[[*WAY, "epochs"]].drop_duplicates()
    begun = random.drop(columns="epochs").merge(lengths, on=WAY, how="left")
    lines = pd.concat([begun.fillna({"epochs": 0}).astype({"epochs": int}), trained])
    cutoffs = pd.DataFrame(lines["counts"].tolist(), columns=list(CUTOFFS), index=lines.index)
    long = pd.concat([lines, cutoffs], axis=1).melt(
        [*WAY, "epochs", *CELL, "published", "deviation"],
        list(CUTOFFS),
        var_name="cutoff",
        value_name="count",
    )
    groups = long.groupby([*SCORE, *CELL, "published", "deviation"], sort=False)["count"]
    counts = groups.agg(mean="mean", std="std", seeds="size").reset_index()
    spread = counts["std"].map(" ± {:,.1f}".format).where(counts["seeds"] > 1, "")
    counts["text"] = counts["mean"].map("{:,.1f}".format) + spread
    counts["distance"] = (counts["mean"] - counts["published"]).abs() / counts["deviation"]
    counts["within_1"], counts["within_2"] = counts["distance"] <= 1, counts["distance"] <= 2
    ways = counts.groupby(SCORE, sort=False).agg(
        seeds=("seeds", "min"),
        total=("distance", "size"),
        within_1=("within_1", "sum"),
        within_2=("within_2", "sum"),
        median=("distance", "median"),
    )
    ways = ways.reset_index().sort_values(
        ["within_1", "within_2", "median"], ascending=[False, False, True], kind="stable"
    )
    return Scores(counts, ways.reset_index(drop=True))


def with_table(lines: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Add the table's runs to those of a search: its counts are those of one more way.

    They are of the whole matrix, by ``eigvalsh`` in float64; "floor" is their noise floor, which is
    n u and the error of assembly. Runs of the search count where both have one.

    Args:
        lines: as `measure_protocol` makes them.
        table: as `measure_index` makes them; those of short training are left out.
    """
    if table.empty:
        return with_defaults(lines)
    table = table[table["protocol"] == STANDARD.name]
    counts = [
        {"0": raw, "floor": index, **ladder}
        for raw, index, ladder in zip(
            table["raw_count"], table["index"], table["ladder"], strict=True
        )
    ]
    way = {"assembly": "blocks", "solver": "eigvalsh", "sample": "first"}
    counted = table.assign(**way, counts=counts)
    found = pd.concat([with_defaults(counted), with_defaults(lines)])
    run = [*WAY, "net", "data", "seed", "epochs"]
    return found.drop_duplicates(run, keep="last", ignore_index=True)


def with_defaults(lines: pd.DataFrame) -> pd.DataFrame:
    """Give lines the fields that they are too old for."""
    missing = {name: value for name, value in _OLDER.items() if name not in lines}
    return lines.assign(**missing).fillna(_OLDER)


def belonging(lines: pd.DataFrame, way: pd.Series) -> pd.DataFrame:
    """Those lines that a way counts."""
    lines = with_defaults(lines)
    same = (lines[WAY] == way[WAY]).all(axis=1)
    return lines[same & lines["epochs"].isin([0, way["epochs"]])]


def score_tables(lines: pd.DataFrame) -> list[Table]:
    """Show the best ways, what the most complete one counts, then all scores, and all counts.

    Args:
        lines: as for :func:`scores`.
    """
    found = scores(lines)
    if found.ways.empty:
        return []
    headings = _headings(found.ways)
    scored = pd.concat([headings, _agreement(found.ways)], axis=1)
    by_net = found.counts.groupby([*SCORE, "net"], sort=False).agg(
        total=("within_1", "size"), within_1=("within_1", "sum"), within_2=("within_2", "sum")
    )
    alone = []
    for net in _NETS:
        of_net = by_net[by_net.index.get_level_values("net") == net].droplevel("net")
        own = found.ways[SCORE].join(of_net, on=SCORE).fillna(dict.fromkeys(of_net.columns, 0))
        scored[net] = _part(own, "within_1")
        if own["total"].any():
            best = own.sort_values(["within_1", "within_2"], ascending=False, kind="stable").iloc[
                :1
            ]
            best = pd.concat([headings.loc[best.index], _agreement(best)], axis=1)
            alone.append(best.assign(network=net))
    scored["median distance"] = texts(found.ways["median"], ".2f")
    alone_frame = pd.concat(alone)
    return [
        Table(
            "Best ways of counting",
            scored[:_NUM_SHOWN],
            _NUM_WORDS,
            f"The first of {len(scored):,} ways, held against {len(PUBLISHED)} published means"
            f" ({SOURCE}). within 1 std: of the counts that were computed, those no farther from"
            " the published mean than the published standard deviation; then the same by network."
            " median distance: in published standard deviations. cutoff: relative to the largest"
            " absolute eigenvalue; floor is n u. With so many ways, some numbers agree by chance.",
        ),
        Table(
            "Best way for each network alone",
            alone_frame[["network", *alone_frame.columns.drop("network")]],
            _NUM_WORDS + 1,
            "The way with the most of the network's own numbers within the published spread.",
        ),
        _side_by_side(lines, found),
        Table("All ways", scored, _NUM_WORDS),
        _all_counts(found, headings),
    ]


def _headings(ways: pd.DataFrame) -> pd.DataFrame:
    """Name ways of counting."""
    named = ways[[*SCORE, "seeds"]].copy()
    named["images"] = named["images"].map("{:,}".format)
    return named.astype(str)


def _part(found: pd.DataFrame, within: str) -> pd.Series:
    """So many of how many."""
    return found[within].astype(int).map(str) + "/" + found["total"].astype(int).map(str)


def _agreement(found: pd.DataFrame) -> pd.DataFrame:
    """How many counts agree."""
    columns = {f"within {i} std": _part(found, f"within_{i}") for i in (1, 2)}
    return pd.DataFrame(columns)


def _side_by_side(lines: pd.DataFrame, found: Scores) -> Table:
    """The published numbers beside those of one way, and what these consist of."""
    way = found.most_complete()
    own = belonging(lines, way)
    own = own.assign(
        floor=own["counts"].map(lambda counts: counts["floor"]),
        rows=own["dim"] - own["zero_rows"],
        zeros=own["nullity"] - own["zero_rows"],
    )
    told = summary(own, CELL, {"floor": ",.1f", "rows": ",.0f", "zeros": ",.0f"})
    frame = found.counts_of(way).merge(told, on=CELL)
    shown = {
        **{"network": frame["net"], "data": frame["data"], "state": frame["state"]},
        **{"seeds": frame["runs"], "published": _published(frame), "counted": _marked(frame)},
        **{"below −n u ‖H‖": frame["floor"], "rows not zero": frame["rows"]},
        "eigenvalues zero in these": frame["zeros"],
    }
    return Table(
        "Published and counted",
        pd.DataFrame(shown),
        3,
        f"Mean ± standard deviation over the seeds: {way['activation']}, {way['head']},"
        f" {way['images']:,} {way['sample']} images, {way['dtype']}, {way['epochs']} epochs,"
        f" {way['assembly']}, {way['solver']}, below {way['cutoff']}; a star marks means within the"
        " published spread. rows not zero: of the matrix. eigenvalues zero in these: within"
        " ±n u ‖H‖, but for those of rows of zeros.",
    )


def _all_counts(found: Scores, headings: pd.DataFrame) -> Table:
    """Every count of every way, the published numbers above them."""
    published = {" ".join(cell): f"{p.mean:,.1f} ± {p.std:,.1f}" for cell, p in PUBLISHED.items()}
    net, data, state = (found.counts[name] for name in CELL)
    counts = found.counts.assign(cell=net + " " + data + " " + state, text=_marked(found.counts))
    wide = counts.pivot(index=SCORE, columns="cell", values="text")
    wide = found.ways[SCORE].join(wide.reindex(columns=list(published)), on=SCORE)
    first = pd.DataFrame([dict.fromkeys(headings, "") | {"activation": "published"} | published])
    frame = pd.concat([headings, wide[list(published)].astype(object).fillna("–")], axis=1)
    return Table(
        "All counts",
        pd.concat([first, frame]),
        _NUM_WORDS,
        "Mean ± standard deviation over the seeds; a star marks means within the published spread.",
    )


def _published(counts: pd.DataFrame) -> pd.Series:
    """Published numbers."""
    return counts["published"].map("{:,.1f}".format) + counts["deviation"].map(" ± {:,.1f}".format)


def _marked(counts: pd.DataFrame) -> pd.Series:
    """Counts, marked if they agree."""
    return counts["text"] + counts["within_1"].map({True: "*", False: ""})
