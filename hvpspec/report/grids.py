"""A grid of text, for a terminal and for a page."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Grid:
    """Rows under headings, all of it text.

    Attributes:
        title: what it shows.
        headings: one for each column.
        rows: as many entries in each as there are headings.
        num_labels: columns at the left that hold words; the others hold numbers.
        note: what a reader should know, in sentences.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1
    note: str = ""


def grid_table(grid: Grid) -> Table:
    """Lay a grid out for a terminal; its text is never read as markup.

    Args:
        grid: the grid.
    """
    table = Table(
        title=Text(grid.title, style="bold"),
        title_justify="left",
        caption=Text(grid.note) if grid.note else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for i, heading in enumerate(grid.headings):
        justify: JustifyMethod = "left" if i < grid.num_labels else "right"
        table.add_column(Text(heading), justify=justify, overflow="fold")
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def grid_markdown(grid: Grid) -> str:
    """Write a grid as a section of Markdown.

    Args:
        grid: the grid.

    >>> print(grid_markdown(Grid("Indices", ("network", "index"), (("cnn", "51"),))))
    ## Indices
    <BLANKLINE>
    | network | index |
    |:--|--:|
    | cnn | 51 |
    <BLANKLINE>
    """
    aligned = [":--" if i < grid.num_labels else "--:" for i in range(len(grid.headings))]
    lines = [f"## {grid.title}", ""]
    if grid.note:
        lines += [grid.note, ""]
    lines += [_line(grid.headings), f"|{'|'.join(aligned)}|", *map(_line, grid.rows), ""]
    return "\n".join(lines)


def _line(entries: tuple[str, ...]) -> str:
    """One row; an upright bar of the text is not one of the table."""
    escaped = [entry.replace("|", r"\|") for entry in entries]
    return f"| {' | '.join(escaped)} |"
