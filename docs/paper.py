"""Write the page ``paper.md``, every number of it from the lines in ``results``.

Run it with ``python docs/paper.py`` after a sweep of ``python -m examples.paper``.
Experiments without lines have no section yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from examples.paper.claims import claims
from examples.paper.curves import curve_grids
from examples.paper.linear import linear_grids
from examples.paper.published import SOURCE
from examples.paper.regularised import regularised_grids
from examples.paper.results import Record, read
from examples.paper.scoring import score_grids, scores, with_table
from examples.paper.solutions import solution_grids
from examples.paper.spectra import spectra_grids
from examples.paper.summary import table_grids
from examples.paper.verdict import paragraphs
from hvpspec.report import Grid, grid_markdown

HERE = Path(__file__).parent

INTRODUCTION = f"""# The paper's experiments

*Made by `docs/paper.py` from the lines in `docs/results`, which `python -m examples.paper` wrote;
`results/*.md` have all tables. Images in the Hessian, τ and seeds stand with each number.*

The paper ({SOURCE}) counts the negative eigenvalues of the train-loss Hessian at random weights
and where SGD and Adam end, for three small networks on two data sets. It concludes that training
ends at saddles of high index, similar over runs, and higher than at random weights. It gives
neither activation, batch, learning rate, epochs, precision, the number of images in the Hessian,
nor a cutoff. Yet these networks have directions in which the loss is exactly flat: those of
pixels that are always black, of dead units (ReLUs that are zero on all images), of a shift of all
logits. An eigenvalue that is zero is computed as some ±u‖H‖, u the unit round-off, and about half
of these are negative.

Here each count names its resolution. *Index*: eigenvalues below −τ. *τ*: unless said otherwise the
noise floor, n u ‖H‖ and the error of the assembled matrix, n its size. *Nullity*: eigenvalues
within ±τ. *Raw count*: all that are computed below 0. *Bound*: what the index cannot exceed,
whatever the weights. Words of the field are explained in the [glossary](glossary.md).
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
    grid, told = claims(lines)
    return "\n\n".join(
        ["## Verdict", *paragraphs(lines, searched), _subsection(grid), "\n".join(told), ""]
    )


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
    return "\n\n".join([*parts, *(_subsection(grid) for grid in grids if grid.rows), ""])


def _subsection(grid: Grid) -> str:
    """A table under a heading one level below that of a section."""
    return f"#{grid_markdown(grid)}".rstrip()


def _picture(stem: str, caption: str) -> str:
    """A picture of the results, and what it shows."""
    return f"![{caption}](results/{stem}.png)\n\n*{caption}.*"


if __name__ == "__main__":
    main()
