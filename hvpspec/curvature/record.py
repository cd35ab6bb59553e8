"""What the first pass over the data found, with which all later ones must agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import torch

from hvpspec.curvature.sharding import reshard, shard
from hvpspec.errors import DataChangedError, NonFiniteError

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective


@dataclass
class Record:
    """What the first pass over the data found, with which all later ones must agree.

    Attributes:
        weights: of the chunks in the mean.
        total: what the sum over chunks is divided by.
        dtype: of the loss.
        marks: of the model's parameters and buffers, by which changes are known.
        sums: whether the loss is a sum, so that each chunk weighs 1.
        losses: on the chunks at the present parameters, by the dtype of the computation.
    """

    weights: list[float]
    total: float
    dtype: torch.dtype
    marks: dict[str, tuple[float, float]]
    sums: bool
    losses: dict[torch.dtype, list[float]] = field(default_factory=dict)

    def combine(self, losses: Sequence[float]) -> float:
        """What these chunks contribute to the loss over the data."""
        return sum(w * x for w, x in zip(self.weights, losses, strict=True)) / self.total

    def size(self, losses: Sequence[float]) -> float:
        """What they would contribute if nothing cancelled between them."""
        return self.combine([abs(x) for x in losses])

    def compare_marks(self, objective: Objective, moved: Iterable[str]) -> None:
        """Raise DataChangedError if parameters or buffers are others than when this was made.

        Args:
            objective: whose they are.
            moved: names of those that are replaced.
        """
        now = parameter_marks(objective)
        if now != self.marks:
            but = set(moved)
            if any(now.get(k) != v for k, v in self.marks.items() if k not in but):
                raise DataChangedError(
                    "the parameters are others than when the operator was made; make a new one"
                )


def parameter_marks(objective: Objective) -> dict[str, tuple[float, float]]:
    """Two numbers for each parameter and buffer, or shard of one, by which a change is known.

    A norm tells all changes but those of signs and places, and these are told by the sum with
    unequal weights.
    """
    if objective.is_sharded:
        reshard(objective.given)
    tensors = {**objective.parameters(), **dict(objective.given.named_buffers())}
    marks = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                x = shard(tensor) if objective.is_sharded else tensor
                x = (torch.view_as_real(x) if x.is_complex() else x).flatten()
                dtype = torch.promote_types(x.dtype, torch.float32)
                weights = torch.linspace(1, 2, len(x), dtype=dtype, device=x.device)
                wide = torch.promote_types(x.dtype, torch.float64)
                norm = torch.linalg.vector_norm(x, dtype=wide)
                marks[name] = float(norm), float(torch.dot(x.to(dtype), weights))
    return marks


def raise_not_finite(loss: float, k: int, hint: str = "") -> NoReturn:
    """Say that the loss on chunk ``k`` is NaN or infinite, with what may help."""
    raise NonFiniteError(
        f"the loss is {loss} on chunk {k} of the data (counting from 0); check the inputs, the "
        f"targets and the weights for NaN and overflow{hint}"
    )


def raise_changed(difference: str) -> NoReturn:
    """Say that two passes over the data differ."""
    raise DataChangedError(
        f"two passes over the data differ ({difference}): switch off shuffling, augmentation "
        "and randomness in the model, and make a new operator when weights change"
    )
