"""What a number is over several runs, whether two go together, and which runs do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from examples.paper.results import Record


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a number over runs.

    Attributes:
        mean: the mean.
        std: the standard deviation with ``ddof`` 1; None of a single run.
        num_runs: how many runs.
    """

    mean: float
    std: float | None
    num_runs: int

    def text(self, form: str = ",.1f") -> str:
        """The mean, and the standard deviation where there is one.

        Args:
            form: of each of the two.

        >>> spread([1.0, 2.0, 3.0]).text()
        '2.0 ± 1.0'
        """
        if self.std is None:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} ± {self.std:{form}}"


def spread(values: Sequence[float]) -> Spread:
    """The mean and standard deviation of some numbers, at least one.

    Args:
        values: one from each run.
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(math.fsum(values) / len(values), std, len(values))


def over(records: Iterable[Record], name: str, form: str = ",.1f") -> str:
    """The mean and standard deviation of a field over runs, as text.

    Args:
        records: the lines of the runs.
        name: of the field.
        form: of each of the two numbers.
    """
    return spread([record[name] for record in records]).text(form)


def cells(
    records: Iterable[Record], names: Sequence[str]
) -> dict[tuple[Hashable, ...], list[Record]]:
    """Put together the lines that agree in some fields.

    Args:
        records: the lines.
        names: of the fields.

    Returns:
        By the values of the fields, in the order of their first lines.
    """
    found: dict[tuple[Hashable, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def before_and_after(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """The lines of the same run before and after training, of each length of training.

    Args:
        records: the lines.
    """
    fields = ("net", "data", "activation", "seed", "images", "dtype")
    found = []
    for group in cells(records, fields).values():
        starts = [r for r in group if r["state"] == "random"]
        found += [(starts[0], r) for r in group if starts and r["state"] == "trained"]
    return found


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two is constant.

    Args:
        x: numbers.
        y: as many.

    >>> rank_correlation([1, 2, 3], [10, 30, 20])
    0.5
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def listed(items: Iterable[object], last_by: str = "or") -> str:
    """Some things, at least one, each once, with commas and a word before the last.

    Args:
        items: the things.
        last_by: the word.

    >>> listed([1, 16, 1, 64])
    '1, 16 or 64'
    """
    *others, last = dict.fromkeys(map(str, items))
    return f"{', '.join(others)} {last_by} {last}" if others else last
