"""The paper's three claims, held against the table: in a grid of its cells, and in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from examples.paper.published import NAMES
from examples.paper.results import Record
from examples.paper.statistics import Spread, before_and_after, cells, listed, spread
from hvpspec.report import Grid

#: A resolution at which the last claim is looked at, too, in units of the norm.
COARSE = "1e-04"


@dataclass(frozen=True)
class Ends:
    """The index where training starts and ends, of one network on one data set.

    Attributes:
        images: in the Hessian.
        net: the network.
        activation: of the network.
        data: the data set.
        dim: number of parameters.
        bound: the highest index that the structure allows, or None.
        trained: the indices where training ends.
        random: those at random weights.
        pairs: the lines of the runs, from random to trained.
    """

    images: int
    net: str
    activation: str
    data: str
    dim: int
    bound: int | None
    trained: Spread
    random: Spread
    pairs: Sequence[tuple[Record, Record]]

    @property
    def share(self) -> float:
        """The trained index as part of the parameters."""
        return self.trained.mean / self.dim

    @property
    def relative(self) -> float | None:
        """The standard deviation of the trained index as part of its mean."""
        return None if self.trained.std is None else self.trained.std / self.trained.mean


def claims(table: list[Record]) -> tuple[Grid, list[str]]:
    """The paper's claims: all cells of the table, and a sentence on each claim.

    Args:
        table: its lines.
    """
    found = _ends(table)
    rows = tuple(
        (
            f"{NAMES[c.net]}, {c.activation}",
            c.data,
            f"{c.images:,}",
            str(c.trained.num_runs),
            c.trained.text(),
            c.random.text(),
            "–" if c.bound is None else f"{c.bound:,}",
            f"{c.share:.1%}",
            "–" if c.relative is None else f"{c.relative:.1%}",
            *(
                f"{higher} of {total}"
                for higher, total in (_higher_in(c, t) for t in (None, COARSE))
            ),
        )
        for c in found
    )
    grid = Grid(
        "The three claims",
        (
            *("network", "data", "images", "runs", "index, trained", "random"),
            *("bound", "of n", "std / mean", "higher", f"higher at {COARSE} ‖H‖"),
        ),
        rows,
        2,
        "Mean ± standard deviation over the seeds, at the noise floor. bound: of the index, from"
        " the network's structure. of n: the trained index as part of the parameters. std / mean:"
        " of the trained index. higher: runs that end at a higher index than they start from, at"
        f" the noise floor, and of eigenvalues below −{COARSE} ‖H‖.",
    )
    groups: dict[tuple[str, int], list[Ends]] = {}
    for c in found:
        groups.setdefault((c.activation, c.images), []).append(c)
    sentences: dict[str, Callable[[Sequence[Ends]], str]] = {
        "The index is high where training ends": _high,
        "It is similar over runs": _similar,
        "It is higher than at random weights": _higher,
    }
    told = [
        f"{number}. *{claim}.* "
        + "; ".join(
            f"{activation}, {images:,} images: {tell(group)}"
            for (activation, images), group in groups.items()
        )
        + "."
        for number, (claim, tell) in enumerate(sentences.items(), start=1)
    ]
    return grid, told


def _ends(table: list[Record]) -> list[Ends]:
    """The cells of the table with runs of both kinds."""
    found = []
    for group in cells(table, ("images", "activation", "net", "data")).values():
        index = {
            state: [r["index"] for r in group if r["state"] == state]
            for state in ("trained", "random")
        }
        if all(index.values()):
            trained, random = (spread(index[state]) for state in ("trained", "random"))
            first = group[0]
            found.append(
                Ends(
                    images=first["images"],
                    net=first["net"],
                    activation=first["activation"],
                    data=first["data"],
                    dim=first["dim"],
                    bound=first["bound"],
                    trained=trained,
                    random=random,
                    pairs=before_and_after(group),
                )
            )
    return sorted(found, key=lambda c: (c.images, c.activation, c.net, c.data))


def _high(group: Sequence[Ends]) -> str:
    """How much of the parameters the index is."""
    allowed = {(c.bound, c.dim) for c in group if c.bound is not None}
    bounds = listed(f"{bound:,} of {dim:,}" for bound, dim in sorted(allowed))
    return f"{_range([c.share for c in group])} of the parameters, where {bounds} are possible"


def _similar(group: Sequence[Ends]) -> str:
    """How much it varies."""
    known = [c.relative for c in group if c.relative is not None]
    return f"its spread is {_range(known)} of its mean" if known else "not known from one seed"


def _higher(group: Sequence[Ends]) -> str:
    """In how many runs training ends at a higher index."""
    coarse = sum(_higher_in(c, COARSE)[0] for c in group)
    pairs = [pair for c in group for pair in c.pairs]
    risen = [(start, end) for start, end in pairs if end["index"] > start["index"]]
    freer = sum(end["nullity"] < start["nullity"] for start, end in risen)
    why = f" (in {freer} of these fewer eigenvalues are zero than before)" if risen else ""
    return (
        f"in {len(risen)} of {len(pairs)} runs at the noise floor{why}, and in {coarse} at"
        f" {COARSE} ‖H‖"
    )


def _higher_in(ends: Ends, ratio: str | None) -> tuple[int, int]:
    """In how many runs the index rises with training, of how many."""

    def count(record: Record) -> int:
        """Eigenvalues below −τ."""
        return int(record["index"] if ratio is None else record["ladder"][ratio])

    return sum(count(end) > count(start) for start, end in ends.pairs), len(ends.pairs)


def _range(parts: Sequence[float]) -> str:
    """The least and the largest of some parts, in per cent."""
    return f"{min(parts):.1%} to {max(parts):.1%}"
