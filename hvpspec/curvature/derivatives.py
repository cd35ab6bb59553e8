"""First derivatives by autograd, with an error that says which second derivative is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hvpspec.errors import NotDifferentiableError, first_line

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative for .* (is )?not implemented|differentiate twice|once_differentiable"
    r"|does not (support|have) (a )?double backward|double backward"
    r"|support automatic differentiation|requires create_graph=False"
)


def differentiate(
    values: Tensor | Iterable[Tensor],
    leaves: Mapping[str, Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    batched: bool = False,
) -> dict[str, Tensor]:
    """Return the derivatives of ``<values, weights>`` by the leaves that have a path to it.

    Args:
        values: one tensor or several; without weights, one scalar.
        leaves: what to differentiate by, by name.
        weights: a tensor of its shape for each value.
        create_graph: whether the derivatives are to be differentiated again.
        retain_graph: whether the graph is needed again; None for ``create_graph``.
        batched: whether the weights have a leading dimension, of several sets of weights.

    Raises:
        NotDifferentiableError: an operation in between has no second derivative.
    """
    outputs = [values] if isinstance(values, Tensor) else list(values)
    if not (outputs and outputs[0].requires_grad):
        return {}
    try:
        parts = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            weights,
            create_graph=create_graph,
            retain_graph=retain_graph or create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    except RuntimeError as error:
        if not _NO_SECOND_DERIVATIVE.search(str(error)):
            raise
        raise NotDifferentiableError(
            f"PyTorch has no second derivative here: {first_line(error)}; "
            "replace that operation by one it can differentiate twice"
        ) from error
    return {name: p for name, p in zip(leaves, parts, strict=True) if p is not None}
