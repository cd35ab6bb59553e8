"""Write the page ``paper.md``, every number of it from the lines in ``results``.

Run it with ``python docs/paper.py`` after a sweep of ``hvpspec reproduce ... --out docs/results``.
Experiments without lines have no section yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvpspec.experiments import (
    PUBLISHED,
    SOURCE,
    Spread,
    curve_grids,
    linear_grids,
    most_complete,
    read,
    regularised_grids,
    score_grids,
    scores,
    solution_grids,
    spectra_grids,
    spread,
    table_grids,
    with_table,
)
from hvpspec.experiments.results import Record
from hvpspec.experiments.statistics import cells
from hvpspec.report import Grid, grid_markdown

HERE = Path(__file__).parent
NAMES = {"cnn": "CNN", "mlp2": "2-MLP", "mlp3": "3-MLP"}
#: So many zero eigenvalues tell which part of them comes out negative.
MANY = 100
#: What a point of the table is, but for its seed.
CELL = ("images", "net", "activation", "data")

INTRODUCTION = f"""# The paper's experiments

*Made by `docs/paper.py` from the lines in `docs/results`, which `hvpspec reproduce` wrote;
`results/*.md` have all tables. Images in the Hessian, τ and seeds stand with each number.*

The paper ({SOURCE}) counts the negative eigenvalues of the train-loss Hessian at random weights
and where SGD and Adam end, for three small networks on two data sets. It concludes that training
ends at saddles of high index, similar over runs, and higher than at random weights. It gives
neither activation, batch, learning rate, epochs, precision, the number of images in the Hessian,
nor a cutoff. Yet these networks have directions in which the loss is exactly flat: those of
pixels that are always black, of dead units, of a shift of all logits. An eigenvalue that is zero
is computed as some ±1e-17, and about half of these are counted as negative. Here each count
names its resolution: eigenvalues below −τ, τ the noise floor of the computed matrix.
"""


def main() -> None:
    """Write the page."""
    (HERE / "paper.md").write_text(page(HERE / "results"), encoding="utf-8")


def page(results: Path) -> str:
    """The page as Markdown.

    Args:
        results: folder of the lines.
    """
    sections: dict[str, Callable[[list[Record]], str]] = {
        "table": table,
        "protocols": protocols,
        "spectra": spectra,
        "curves": curves,
        "regularised": regularised,
        "solutions": solutions,
        "linear": linear,
    }
    found = {name: read(results / f"{name}.jsonl") for name in sections}
    if found["protocols"]:
        found["protocols"] = with_table(found["protocols"], found["table"])
    told = [section(found[name]) for name, section in sections.items() if found[name]]
    return "\n".join([INTRODUCTION, verdict(found["table"], found["protocols"]), *told])


def verdict(lines: list[Record], searched: list[Record]) -> str:
    """The CNN's row, what was counted and the three claims, in words and numbers.

    Args:
        lines: of the table.
        searched: of the search for a protocol.
    """
    exact = [r for r in lines if r["net"] == "cnn"]
    n, bound = exact[0]["dim"], exact[0]["bound"]
    published = [PUBLISHED[cell].mean for cell in PUBLISHED if cell[0] == "cnn"]
    parts = [
        "## Verdict",
        "",
        f"**The CNN's row cannot be a Morse index.** {n - bound} of its {n} parameters are a linear"
        " head under a convex loss, on which the Hessian is positive semidefinite, so that no"
        f" weights, data or activation give an index above {bound}. Published are"
        f" {min(published):,.1f} to {max(published):,.1f}. Over {len(exact)} runs the index was at"
        f" most {max(r['index'] for r in exact)}, the raw count at most"
        f" {max(r['raw_count'] for r in exact)}."
        + _what_then([r for r in searched if r["net"] == "cnn"]),
        "",
    ]
    if searched:
        parts += [_half_of_the_zeros(searched), "", _one_way(searched), ""]
    return "\n".join([*parts, *_claims(lines)])


def _what_then(records: Sequence[Record]) -> str:
    """Which CNN runs of the search come near to the published numbers."""
    found = [r for r in records if (r["net"], r["data"], r["state"]) in PUBLISHED]
    if not found:
        return ""
    near = [r for r in found if _is_near(r)]
    dtypes = {d: sum(r["dtype"] == d for r in near) for d in ("float32", "float64")}
    nullities = [r["nullity"] / r["dim"] for r in near]
    text = (
        f" Of {len(found):,} spectra in the search below, {len(near)} have a raw count within the"
        f" published spread: {dtypes['float32']} in float32 and {dtypes['float64']} in float64."
    )
    if near:
        text += (
            f" In these {min(nullities):.0%} to {max(nullities):.0%} of the eigenvalues are zero up"
            f" to round-off, {statistics.median(nullities):.0%} in the median."
        )
    return text


def _is_near(record: Record) -> bool:
    """Whether a raw count lies within the published spread."""
    published = PUBLISHED[record["net"], record["data"], record["state"]]
    return bool(abs(record["counts"]["0"] - published.mean) <= published.std)


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
    """

    images: int
    net: str
    activation: str
    data: str
    dim: int
    bound: int | None
    trained: Spread
    random: Spread

    @property
    def share(self) -> float:
        """The trained index as part of the parameters."""
        return self.trained.mean / self.dim

    @property
    def relative(self) -> float | None:
        """The standard deviation of the trained index as part of its mean."""
        return None if self.trained.std is None else self.trained.std / self.trained.mean

    @property
    def distance(self) -> float | None:
        """The difference of the two means in standard deviations of a run."""
        if self.trained.std is None or self.random.std is None:
            return None
        size = ((self.trained.std**2 + self.random.std**2) / 2) ** 0.5
        return (self.trained.mean - self.random.mean) / size if size else None


def _ends(lines: list[Record]) -> list[Ends]:
    """The cells of the table with runs of both kinds."""
    found = []
    for (images, net, activation, data), group in sorted(cells(lines, CELL).items(), key=str):
        index = {
            state: [r["index"] for r in group if r["state"] == state]
            for state in ("trained", "random")
        }
        if all(index.values()):
            spreads = {state: spread(counts) for state, counts in index.items()}
            size = group[0]["dim"], group[0]["bound"]
            found.append(Ends(images, net, activation, data, *size, **spreads))  # type: ignore[arg-type]
    return found


def _claims(lines: list[Record]) -> list[str]:
    """The paper's claims, each with the numbers of all cells."""
    found = _ends(lines)
    rows = [
        (
            f"{NAMES[c.net]}, {c.activation}",
            c.data,
            f"{c.images:,}",
            str(c.trained.num_runs),
            c.trained.text(),
            c.random.text(),
            f"{c.share:.1%}",
            "–" if c.relative is None else f"{c.relative:.1%}",
            "–" if c.distance is None else f"{c.distance:+.1f}",
        )
        for c in found
    ]
    grid = Grid(
        "The three claims",
        (
            *("network", "data", "images", "runs", "index, trained", "random"),
            *("of n", "std / mean", "trained − random"),
        ),
        tuple(rows),
        2,
        "Mean ± standard deviation over the seeds, at the noise floor. of n: the trained index as"
        " part of the parameters. std / mean: of the trained index. trained − random: difference of"
        " the means in units of the root mean square of the two standard deviations.",
    )
    groups = {
        activation: [c for c in found if c.activation == activation]
        for activation in dict.fromkeys(c.activation for c in found)
    }
    claims = {
        "The index is high where training ends": _high,
        "It is similar over runs": _similar,
        "It is higher than at random weights": _higher,
    }
    told = [
        f"{number}. *{claim}.* "
        + "; ".join(f"{activation}: {tell(group)}" for activation, group in groups.items())
        + "."
        for number, (claim, tell) in enumerate(claims.items(), start=1)
    ]
    return [_subsection(grid), "", *told, ""]


def _high(group: Sequence[Ends]) -> str:
    """How much of the parameters the index is."""
    low, high = _range([c.share for c in group])
    allowed = {(c.bound, c.dim) for c in group if c.bound is not None}
    bounds = ", ".join(f"{bound:,} of {dim:,}" for bound, dim in sorted(allowed))
    return f"{low} to {high} of the parameters, where at most {bounds} are possible"


def _similar(group: Sequence[Ends]) -> str:
    """How much it varies."""
    known = [c.relative for c in group if c.relative is not None]
    if not known:
        return "not known from one seed"
    low, high = _range(known)
    return f"its standard deviation is {low} to {high} of its mean"


def _higher(group: Sequence[Ends]) -> str:
    """In how many cells training ends at a higher index."""
    higher = sum(c.trained.mean > c.random.mean for c in group)
    known = [c.distance for c in group if c.distance is not None]
    clear, lower = sum(d > 2 for d in known), sum(d < -2 for d in known)
    return (
        f"higher in {higher} of {len(group)} cells, by more than two standard deviations in"
        f" {clear}; lower by as much in {lower}"
    )


def _range(parts: Sequence[float]) -> tuple[str, str]:
    """The least and the largest of some parts, in per cent."""
    return f"{min(parts):.1%}", f"{max(parts):.1%}"


def table(lines: list[Record]) -> str:
    """All cells of the paper's table.

    Args:
        lines: of the table.
    """
    seconds = sum(r["seconds"] for r in lines) / 3600
    return _section(
        "The table",
        f"{len(lines)} runs, {seconds:.1f} hours of one core, in float64. Training is on all images"
        " of the data set; how, stands in the second table.",
        table_grids(lines),
    )


def protocols(lines: list[Record]) -> str:
    """The search for a way of counting that gives the published numbers.

    Args:
        lines: of the search.
    """
    found = scores(lines)
    best = found[0]
    text = (
        f"{len(lines):,} spectra and {len(found):,} ways of counting. The best agrees with"
        f" {best.within(1)} of {len(best.counts)} published means within the published spread, and"
        f" with {best.within(2)} within twice that. `results/protocols.md` has the scores of all."
    )
    return _section("What the published numbers are", text, score_grids(lines)[:3])


def _half_of_the_zeros(lines: list[Record]) -> str:
    """How many of the eigenvalues that are zero came out negative."""
    shares = []
    for dtype in ("float64", "float32"):
        found = [
            (r["counts"]["0"] - r["counts"]["floor"]) / zeros
            for r in lines
            if r["dtype"] == dtype and (zeros := _zeros(r)) >= MANY
        ]
        if len(found) >= 2:
            low, middle, high = statistics.quantiles(found, n=4)
            shares.append(
                f"{middle:.1%} (quartiles {low:.1%} and {high:.1%}) of {len(found):,} spectra in"
                f" {dtype}"
            )
    if not shares:
        return ""
    return (
        f"**Half of what is zero is counted.** Where {MANY} eigenvalues or more are within ±n u ‖H‖"
        " (without those of rows of zeros, where the solver sets these apart), the share of them"
        f" that came out below 0 has the median {', and '.join(shares)}."
    )


def _zeros(record: Record) -> int:
    """Eigenvalues of a line that are zero up to round-off and could come out negative."""
    if record["solver"] == "eigvalsh":
        return int(record["nullity"])
    # Lines from before rows of zeros were counted do not tell.
    return record["nullity"] - record["zero_rows"] if "zero_rows" in record else 0


def _one_way(lines: list[Record]) -> str:
    """The way that accounts for most of the published numbers at once, and why."""
    one = most_complete(scores(lines))
    text = (
        f"**What the numbers may be.** The {one.activation} networks' Hessian over {one.images:,}"
        f" {one.sample} images, seeds: {one.seeds}, by `{one.solver}`, each eigenvalue below"
        f" {one.cutoff} counted:"
        f" {one.within(1)} of {len(one.counts)} means lie within the published spread,"
        f" {one.within(2)} within twice that."
    )
    pairs = [
        (count, one.counts[net, data, "random"])
        for (net, data, state), count in one.counts.items()
        if net != "cnn" and state == "trained" and (net, data, "random") in one.counts
    ]
    if pairs and one.activation == "relu" and one.solver != "eigvalsh":
        more = sum(trained > random for trained, random in pairs)
        text += (
            " The loss over so few images does not depend on the weights of pixels that are black"
            " in all of them, nor on a unit that is dead on all: their rows are zero exactly. Of"
            " the other rows most eigenvalues are zero up to round-off, and half of these are"
            " counted. Fewer units are dead after training than before, so that in"
            f" {more} of {len(pairs)} cells of the perceptrons more is counted where training ends:"
            " so it takes no saddles for the trained numbers to be the higher ones. And a network"
            " whose units are all dead has next to nothing to count: hence the wide spread of the"
            " CNN at random weights. What remains of the differences may be in the training, of"
            " which next to nothing is published: with fewer dead units the perceptrons' trained"
            " counts are higher."
        )
    again = (
        f"hvpspec reproduce protocols --activation {one.activation} --images {one.images}"
        f" --sample {one.sample} --dtype {one.dtype} --assembly {one.assembly}"
        f" --solver {one.solver} --epochs 0 --epochs {one.epochs} --seeds {one.seeds}"
    )
    return f"{text}{_checked(lines)} These counts are made again by `{again}`."


def _checked(lines: list[Record]) -> str:
    """What a general solver counts on perceptrons where both ways were taken."""
    same = ("net", "data", "activation", "seed", "epochs", "images", "dtype", "assembly", "sample")
    by_matrix: dict[tuple[object, ...], dict[str, int]] = {}
    for r in lines:
        if r["net"] != "cnn":
            matrix = tuple(r.get(name) for name in same)
            by_matrix.setdefault(matrix, {})[r["solver"]] = r["counts"]["0"]
    told = [
        f"{found['eig']:,} with `eig`, {found['eigvalsh-live']:,} without rows of zeros and"
        f" {found['eigvalsh']:,} with `eigvalsh` on the whole"
        for found in by_matrix.values()
        if len(found) == 3
    ]
    if not told:
        return ""
    return (
        " To set rows of zeros apart is what a general eigenvalue solver does by itself, when it"
        f" balances the matrix; on the same matrices of perceptrons counts are {'; '.join(told)}."
    )


def spectra(lines: list[Record]) -> str:
    """The eigenvalues of one run per network and data set."""
    grids = spectra_grids(lines)
    pictures = [
        _picture(f"spectra-{activation}-{kind}", caption)
        for activation in dict.fromkeys(str(r["activation"]) for r in lines)
        for kind, caption in (
            ("linear", f"Spectra of trained {activation} networks"),
            ("symlog", "The same on a symlog axis, the noise floor shaded"),
            ("parts", "By rank, matrix by matrix"),
        )
    ]
    return _section("Spectra", "", grids, pictures)


def curves(lines: list[Record]) -> str:
    """Index against loss along training."""
    grids = curve_grids(lines)
    picture = _picture("curves", "Index against loss and epochs")
    return _section("Along training", "", grids[1:], [picture])


def regularised(lines: list[Record]) -> str:
    """What λ does."""
    picture = _picture("regularised", "Index and nullity against λ")
    return _section("With a penalty", "", regularised_grids(lines), [picture])


def solutions(lines: list[Record]) -> str:
    """Where training ends from many initial weights."""
    picture = _picture("solutions", "Final weights in the plane of two principal components")
    return _section("Many solutions", "", solution_grids(lines), [picture])


def linear(lines: list[Record]) -> str:
    """Linear regression, where all is known."""
    return _section("Linear regression", "", linear_grids(lines))


def _section(title: str, text: str, grids: Sequence[Grid], pictures: Sequence[str] = ()) -> str:
    """A section of the page, its tables one level below it."""
    parts = [f"## {title}", *([text] if text else []), *pictures]
    return "\n\n".join([*parts, *map(_subsection, grids), ""])


def _subsection(grid: Grid) -> str:
    """A table under a heading one level below that of a section."""
    return f"#{grid_markdown(grid)}".rstrip()


def _picture(stem: str, caption: str) -> str:
    """A picture of the results."""
    return f"![{caption}](results/{stem}.png)"


if __name__ == "__main__":
    main()
