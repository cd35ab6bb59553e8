"""What the paper's page says first: the CNN's row, and what was counted.

Each sentence takes its numbers from the lines of the results, and is left out where there are none
for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from examples.paper.published import NAMES, PUBLISHED
from examples.paper.results import Record
from examples.paper.scoring import Cell, Score, belongs, cell_of, most_complete, scores
from examples.paper.statistics import before_and_after, cells, listed, spread

#: So many zero eigenvalues tell which part of them comes out negative.
MANY = 100
#: Images that are few: most eigenvalues are zero.
FEW = 16


def paragraphs(table: list[Record], searched: list[Record]) -> list[str]:
    """All of them, in their order.

    Args:
        table: its lines.
        searched: those of the search for a way of counting.
    """
    found = [
        impossible(table, searched),
        with_softmax(searched),
        half_of_the_zeros(searched),
        one_way(searched),
        no_critical_points(table),
        all_images(table),
    ]
    return [paragraph for paragraph in found if paragraph]


def impossible(table: list[Record], searched: list[Record]) -> str:
    """Why the CNN's published numbers are no Morse indices."""
    own = [r for r in table if r["net"] == "cnn"]
    n, bound = own[0]["dim"], own[0]["bound"]
    published = [PUBLISHED[cell].mean for cell in PUBLISHED if cell[0] == "cnn"]
    trained = [spread([r["raw_count"] for r in g]).mean for g in _cells_of(own, "trained")]
    text = (
        f"**The CNN's row cannot be a Morse index.** {n - bound} of its {n} parameters are those of"
        " a last linear layer, in which the cross-entropy of the logits is convex, so that the"
        " Hessian is positive semidefinite on them: no weights, data or hidden activation give an"
        f" index above {bound}. Published are {min(published):,.1f} to {max(published):,.1f}. In"
        f" {len(own)} runs of the table the index is at most {max(r['index'] for r in own)}. Even"
        f" all that is computed as negative comes to {min(trained):.0f} to {max(trained):.0f} on"
        " average where training ends."
    )
    spectra = [
        r
        for r in _published(searched)
        if r["net"] == "cnn" and r["state"] == "trained" and _head(r) == "logits"
    ]
    near = [r for r in spectra if _is_near(r)]
    if near:
        few = [r for r in near if r["images"] <= FEW]
        how_many = "all" if len(few) == len(near) else len(few)
        zeros = [r["nullity"] / r["dim"] for r in near]
        text += (
            f" Of {len(spectra):,} spectra of trained CNNs in the search below, {len(near)} have a"
            f" raw count within the published spread, {how_many} of these with"
            f" {listed(r['images'] for r in few)} images; {min(zeros):.0%} to {max(zeros):.0%} of"
            " their eigenvalues are zero up to round-off."
        )
    return text


def with_softmax(searched: list[Record]) -> str:
    """What a softmax before the cross-entropy would do."""
    own = [r for r in _published(searched) if _head(r) == "softmax"]
    cnn = [r["index"] for r in own if r["net"] == "cnn"]
    if not cnn:
        return ""
    best = scores(own)[0]
    ends = _rises(own)
    return (
        "**A softmax too many would allow it, but does not fit.** If the network returns"
        " probabilities and the cross-entropy takes them for logits, a common mistake, the loss is"
        f" not convex in the last layer. The CNN's index is then {min(cnn)} to {max(cnn)} in"
        f" {len(cnn)} spectra. But of the ways to count with such networks the best agrees with"
        f" {best.within(1)} of {len(best.counts)} published means ({best.images:,} images, below"
        f" {best.cutoff}), and the raw count is higher after training in {ends[0]} of {ends[1]}"
        " pairs only, while it is in all published cells."
    )


def half_of_the_zeros(searched: list[Record]) -> str:
    """How many of the eigenvalues that are zero came out negative."""
    told = []
    for dtype in ("float64", "float32"):
        for name, few in ((f"up to {FEW} images", True), ("more", False)):
            found = [
                (r["counts"]["0"] - r["counts"]["floor"]) / zeros
                for r in searched
                if r["dtype"] == dtype
                and (r["images"] <= FEW) == few
                and (zeros := _zeros(r)) >= MANY
            ]
            if len(found) >= 2:
                low, middle, high = statistics.quantiles(found, n=4)
                told.append(
                    f"{middle:.1%} (quartiles {low:.1%} and {high:.1%}) of {len(found):,} spectra"
                    f" in {dtype} with {name}"
                )
    if not told:
        return ""
    return (
        f"**Half of what is zero is counted.** Where {MANY} eigenvalues or more are within ±n u ‖H‖"
        " (without those of rows of zeros, where the solver sets these apart), the share of them"
        f" that came out below 0 has the median {'; '.join(told)}. With more images, above all in"
        " float32, small positive eigenvalues are among them."
    )


def one_way(searched: list[Record]) -> str:
    """The way that accounts for most of the published numbers at once, and why."""
    if not searched:
        return ""
    found = scores(searched)
    one = most_complete(found)
    complete = sum(len(score.counts) == len(PUBLISHED) for score in found)
    far = {cell: one.distances[cell] for cell in one.counts if one.distances[cell] > 1}
    text = (
        f"**What the numbers may be.** The {one.activation} networks' Hessian over {one.images:,}"
        f" {one.sample} images, {one.seeds} seeds, in {one.dtype}, by `{one.solver}`, each"
        f" eigenvalue below {one.cutoff} counted: {one.within(1)} of {len(one.counts)} means lie"
        " within the published spread,"
        f" {_hits(one, 'random')} at random weights and {_hits(one, 'trained')} where training"
        " ends."
    )
    if far:
        others = listed((f"{NAMES[net]} {data} {state}" for net, data, state in far), "and")
        text += (
            f" The others, {others}, are off by"
            f" {min(far.values()):.1f} to {max(far.values()):.1f} published standard"
            " deviations."
        )
    text += (
        f" Of {len(found):,} ways of counting {complete} have counts for all {len(PUBLISHED)}"
        " cells; this one was chosen by the numbers that it is held against, which does not prove"
        " it."
    )
    if one.activation == "relu" and one.solver != "eigvalsh":
        own = [r for r in _published(searched) if r["net"] != "cnn" and belongs(r, one)]
        raw, floor = (_rises(own, cutoff) for cutoff in ("0", "floor"))
        text += (
            " The loss over so few images does not depend on the weights of pixels that are black"
            " in all of them, nor on a unit that is dead on all: their rows are zero exactly. Of"
            " the other rows most eigenvalues are zero, since the Hessian is of low rank, and half"
            " of these are counted. The more units are alive, the more is counted: on the same"
            f" images the raw count is higher after training than before in {raw[0]} of {raw[1]}"
            f" pairs, but the count below −n u ‖H‖ in {floor[0]} of {floor[1]}. It takes no saddles"
            " for published numbers that rise with training. A network whose units are all dead"
            " has next to nothing to count: some such seeds make the wide spread of the CNN at"
            " random weights." + _without_dead_units(found, one, far)
        )
    head = "" if one.head == "logits" else f" --head {one.head}"
    again = (
        f"python -m examples.paper protocols --activation {one.activation}{head}"
        f" --images {one.images}"
        f" --sample {one.sample} --dtype {one.dtype} --assembly {one.assembly}"
        f" --solver {one.solver} --epochs 0 --epochs {one.epochs} --seeds {one.seeds}"
    )
    return f"{text}{_checked(searched)} These counts are made again by `{again}`."


def _without_dead_units(found: Sequence[Score], one: Score, far: Iterable[Cell]) -> str:
    """What the same way of counting gives where no unit can be dead, for what it does not fit."""
    way = ("head", "images", "dtype", "assembly", "solver", "sample", "cutoff", "epochs")
    for score in found:
        same = all(getattr(score, name) == getattr(one, name) for name in way)
        distances = [score.distances[cell] for cell in far if cell in score.distances]
        if same and score.activation == "tanh" and distances:
            return (
                " The rest would fit if no unit were dead after training: with tanh, where"
                f" none can be, the same way of counting is off by {min(distances):.1f} to"
                f" {max(distances):.1f} published standard deviations there ({score.seeds} seeds)."
                " Next to nothing is published of the training."
            )
    return ""


def no_critical_points(table: list[Record]) -> str:
    """That the counts are not those of critical points."""
    trained = [r for r in table if r["state"] == "trained"]
    pairs = before_and_after(table)
    if not pairs:
        return ""
    norms = [r["grad_norm"] for r in trained]
    larger = sum(end["grad_norm"] > start["grad_norm"] for start, end in pairs)
    return (
        f"**None of these points is critical.** At the {len(trained)} trained points ‖∇f‖ is"
        f" {min(norms):.2g} to {max(norms):.2g}, in {larger} of {len(pairs)} cases more than at the"
        f" initial weights, and {min(r['nullity'] for r in trained):,} eigenvalues or more are zero"
        " up to round-off: the counts are of the curvature there, not of nondegenerate saddles as"
        " in Morse theory."
    )


def all_images(table: list[Record]) -> str:
    """What the number of images does to the index of the same weights."""
    where = ("net", "data", "activation", "seed", "epochs", "state")
    told = []
    for point in cells(table, where).values():
        found = {r["images"]: r for r in point}
        if len(found) > 1:
            told.append((found[min(found)], found[max(found)]))
    if not told:
        return ""
    parts = []
    for state in ("trained", "random"):
        own = [(a, b) for a, b in told if a["state"] == state]
        if own:
            ratios = [b["index"] / a["index"] for a, b in own]
            lower = sum(b["index"] < a["index"] for a, b in own)
            parts.append(
                f"{min(ratios):.0%} to {max(ratios):.0%} of it at {len(own)} {state} weights"
                f" (lower in {lower})"
            )
    few, many = told[0][0]["images"], told[0][1]["images"]
    return (
        f"**Fewer images, more negative directions.** On {many:,} images, those of the training,"
        f" the index is, against that on {few:,} of them, {' and '.join(parts)}: what is not"
        " negative for the loss that was minimised is so for a part of it."
    )


def _rises(records: Iterable[Record], cutoff: str = "0") -> tuple[int, int]:
    """In how many pairs a count rises with training, of how many."""
    pairs = before_and_after(records)
    higher = sum(end["counts"][cutoff] > start["counts"][cutoff] for start, end in pairs)
    return higher, len(pairs)


def _cells_of(records: Iterable[Record], state: str) -> list[list[Record]]:
    """The runs of one state that differ in nothing but the seed."""
    own = [r for r in records if r["state"] == state]
    return list(cells(own, ("net", "data", "activation", "images")).values())


def _published(records: Iterable[Record]) -> list[Record]:
    """The lines for which there is a published number."""
    return [r for r in records if cell_of(r) in PUBLISHED]


def _head(record: Record) -> str:
    """What the network returns; lines from before this was asked are of logits."""
    return str(record.get("head", "logits"))


def _is_near(record: Record) -> bool:
    """Whether a raw count lies within the published spread."""
    published = PUBLISHED[cell_of(record)]
    return bool(abs(record["counts"]["0"] - published.mean) <= published.std)


def _hits(score: Score, state: str) -> str:
    """How many of the means of a state a way of counting gives."""
    own = [score.distances[cell] for cell in score.counts if cell[2] == state]
    return f"{sum(distance <= 1 for distance in own)} of {len(own)}"


def _zeros(record: Record) -> int:
    """Eigenvalues of a line that are zero up to round-off and could come out negative."""
    if record["solver"] == "eigvalsh":
        return int(record["nullity"])
    # Lines from before rows of zeros were counted do not tell.
    return record["nullity"] - record["zero_rows"] if "zero_rows" in record else 0


def _checked(searched: list[Record]) -> str:
    """What a general solver counts on perceptrons where all ways were taken."""
    same = ("net", "data", "activation", "state", "seed", "epochs", "images", "dtype", "sample")
    told = []
    for point, group in cells([{"sample": "first", **r} for r in searched], same).items():
        found = {r["solver"]: r["counts"]["0"] for r in group if r["assembly"] == "blocks"}
        if len(found) == 3 and point[0] != "cnn":
            told.append(
                f"{found['eig']:,} with `eig`, {found['eigvalsh-live']:,} without rows of zeros and"
                f" {found['eigvalsh']:,} with `eigvalsh` on the whole"
                f" ({NAMES[str(point[0])]}, {point[1]}, {point[3]}, seed {point[4]})"
            )
    if not told:
        return ""
    return (
        " To set rows of zeros apart is what a general eigenvalue solver does by itself, when it"
        f" balances the matrix; counted on the same matrix are {'; '.join(told)}."
    )
