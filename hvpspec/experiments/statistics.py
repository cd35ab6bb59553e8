"""What a number is over several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
