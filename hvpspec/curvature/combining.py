"""Whether losses over parts of the data combine to the loss over all, found out by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvpspec.curvature.batches import Batch
from hvpspec.errors import InputError


def refuse_other_than_mean(
    loss: Callable[[Any, Any], Tensor], whole: Tensor, outputs: Any, targets: Any, n: int
) -> None:
    """Raise unless a loss is the mean of its values on two parts of a batch.

    Args:
        loss: of outputs and targets.
        whole: its value on the batch.
        outputs: what the model returned for a batch.
        targets: what they are compared with.
        n: how many examples there are. Where outputs or targets do not run over them, nothing is
            known, and nothing refused.
    """
    if n < 2 or not (_runs_over(n, outputs) and _runs_over(n, targets)):
        return
    cut = max(1, n // 3)
    parts = [
        float(loss(outputs[part], targets[part]).detach())
        for part in (slice(0, cut), slice(cut, n))
    ]
    value = float(whole.detach())
    mean = (cut * parts[0] + (n - cut) * parts[1]) / n
    tolerance = 1e3 * torch.finfo(whole.dtype).eps * max(abs(value), *map(abs, parts))
    if not abs(mean - value) <= tolerance:  # also where a part is 0/0
        rule = (
            "is a sum over them; wrap it as hvpspec.Loss(loss, reduction='sum')"
            if abs(sum(parts) - value) <= tolerance
            else "is not a mean over them; say what its mean divides by with "
            "hvpspec.Loss(loss, weight=lambda outputs, targets: ...)"
        )
        raise InputError(
            f"a loss function is taken as the mean over the examples of a batch, but this one "
            f"{rule}"
        )


def refuse_dependence(forward: Callable[[Batch], Any], batch: Batch, whole: Any) -> None:
    """Raise if an example's output depends on what else is in its batch.

    Args:
        forward: the model on a batch.
        batch: some examples.
        whole: what the model returned for them. Where it does not run over them, nothing is known.
    """
    n = len(batch)
    if n < 2 or not _runs_over(n, whole):
        return
    part = forward(next(batch.split(n - 1))).detach()
    whole = whole[: n - 1].detach()
    # Shapes decide how products are summed up: half the digits is far beyond that.
    tolerance = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
    if part.shape != whole.shape or not float((part - whole).abs().max()) <= tolerance:
        raise InputError(
            "the output of an example depends on its batch (batch statistics, or examples that "
            "are not along the first dimension); give all the data as one batch with "
            "chunk_size at least its length, or change the model"
        )


def _runs_over(n: int, value: Any) -> bool:
    """Whether a value is a tensor over n examples."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
