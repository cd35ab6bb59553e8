"""Tables of text, made of the lines of many runs, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from rich import box
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True, eq=False)
class Table:
    """Text under headings.

    Attributes:
        title: what it shows.
        frame: the text, by heading.
        num_labels: columns at the left that hold words; the others hold numbers.
        note: what a reader should know, in sentences.
    """

    title: str
    frame: pd.DataFrame
    num_labels: int
    note: str = ""

    def rich(self) -> RichTable:
        """Lay the table out for a terminal; its text is never read as markup."""
        table = RichTable(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text(self.note) if self.note else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for i, heading in enumerate(self.frame.columns):
            table.add_column(
                Text(heading), justify="left" if i < self.num_labels else "right", overflow="fold"
            )
        for row in self.frame.itertuples(index=False):
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Write the table as a section of Markdown."""
        # Not DataFrame.to_markdown, whose padding would more than double the longest of the pages.
        headings, rows = list(self.frame.columns), self.frame.to_numpy().tolist()
        rule = [":--"] * self.num_labels + ["--:"] * (len(headings) - self.num_labels)
        lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
        lines.insert(1, f"|{'|'.join(rule)}|")
        note = [self.note, ""] if self.note else []
        return "\n".join([f"## {self.title}", "", *note, *lines, ""])


def mean_std(values: pd.Series, form: str = ",.1f") -> str:
    """The mean and the standard deviation (ddof 1) over runs; of a single run, its value.

    Args:
        values: at least one number.
        form: of each of the two.

    >>> mean_std(pd.Series([1, 4, 16]))
    '7.0 ± 7.9'
    """
    mean = f"{values.mean():{form}}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():{form}}"


def summary(
    lines: pd.DataFrame, by: Sequence[str], forms: Mapping[str, str], *, sort: bool = True
) -> pd.DataFrame:
    """Mean and standard deviation over the runs of each group.

    Args:
        lines: of the runs.
        by: fields that tell the groups; missing values are one more value.
        forms: numbers to average, each with the form of its text.
        sort: whether groups are ordered by their fields, or else by their first lines.

    Returns:
        The fields in ``by``, ``runs``, and the fields in ``forms`` as text.
    """
    groups = lines.groupby(list(by), dropna=False, sort=sort)
    found = groups.agg({name: partial(mean_std, form=form) for name, form in forms.items()})
    found.insert(0, "runs", groups.size().map(str))
    return found.reset_index()


def with_labels(frame: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """Put what names a run first, as people write it, and leave out the fields it is made of.

    Args:
        frame: with ``net``, ``activation``, ``data`` and ``images``, and what a table shows.
        fields: further names of columns for the left, in order.
    """
    labels = pd.DataFrame({"network": frame["net"] + " " + frame["activation"]})
    labels["data"] = frame["data"]
    for name in fields:
        labels[name] = frame[name].map("{:,}".format) if name == "images" else frame[name]
    rest = frame.drop(columns={"net", "activation", "data", "images", *fields})
    return pd.concat([labels, rest], axis=1)


def texts(values: pd.Series, form: str) -> pd.Series:
    """Each number as text, a dash where there is none."""
    return values.map(lambda x: "–" if pd.isna(x) else f"{x:{form}}")
