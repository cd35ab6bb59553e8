"""What the first pass over the data found, with which all later ones must agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch

from hvpspec.errors import DataChangedError


@dataclass(frozen=True)
class Reference:
    """The losses on the chunks, and how they are weighed.

    Attributes:
        weights: of the chunks in the mean.
        losses: on them.
        dtype: of the loss.
        marks: of the model's parameters and buffers, by which changes are known.
        total: what the sum over chunks is divided by.
    """

    weights: list[float]
    losses: list[float]
    dtype: torch.dtype
    marks: dict[str, tuple[float, float]]
    total: float

    @cached_property
    def scale(self) -> float:
        """The size of a loss, against which a change is judged."""
        return max(map(abs, self.losses))

    @property
    def value(self) -> float:
        """What these chunks contribute to the risk."""
        weighed = zip(self.weights, self.losses, strict=True)
        return sum(w * x for w, x in weighed) / self.total

    @property
    def mass(self) -> float:
        """What they would contribute if nothing cancelled between them."""
        weighed = zip(self.weights, self.losses, strict=True)
        return sum(w * abs(x) for w, x in weighed) / self.total

    def share(self, k: int) -> float:
        """What the loss on chunk ``k`` is multiplied by in the risk."""
        return self.weights[k] / self.total

    def compare(self, k: int, weight: float, loss: float) -> None:
        """Raise DataChangedError unless chunk k's weight and loss are those of the first pass."""
        before = self.losses[k]
        # A repeated forward pass gives the same bits, except for the order of summation on GPUs.
        tolerance = 1e3 * torch.finfo(self.dtype).eps * self.scale
        same = weight == self.weights[k] and (weight == 0 or abs(loss - before) <= tolerance)
        if not same:
            raise_changed(f"loss {loss:.6g} on chunk {k}, before {before:.6g}")


def raise_changed(difference: str) -> NoReturn:
    """Say that two passes over the data differ."""
    raise DataChangedError(
        f"two passes over the data differ ({difference}): switch off shuffling, augmentation "
        "and randomness in the model, and make a new operator when weights change"
    )
