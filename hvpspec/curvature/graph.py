"""Derivatives by autograd, and what its graphs tell of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from hvpspec.errors import InputError, NotDifferentiableError, first_line

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


def nodes(outputs: Iterable[Tensor]) -> list[Node]:
    """Every node of the graph that leads to some tensors, once, after those of its arguments."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output.grad_fn, False) for output in outputs]
    while stack:
        node, arguments_done = stack.pop()
        if node is None:
            continue
        if arguments_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((argument, False) for argument, _ in node.next_functions)
    return order


def is_used_once(outputs: Iterable[Tensor], leaf: Tensor) -> bool:
    """Whether a leaf, or its transpose, enters one operation on the way to some tensors."""
    consumers: dict[Node, list[Node]] = {}
    for node in nodes(outputs):
        for following, _ in node.next_functions:
            if following is not None:
                consumers.setdefault(following, []).append(node)
    found = [node for node in consumers if getattr(node, "variable", None) is leaf]
    while len(found) == 1:
        if len(consumers[found[0]]) != 1:
            return False
        found = consumers[found[0]]
        if found[0].name() != "TBackward0":
            return True
    return False


def foreign_leaves(loss: Tensor) -> list[Tensor]:
    """The tensors at the beginning of a graph by which it can be differentiated."""
    found = (getattr(node, "variable", None) for node in nodes([loss]))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def has_own_backward(loss: Tensor) -> bool:
    """Whether a graph holds a function whose derivative is written out in Python, or a hook's."""
    return any(isinstance(node, BackwardCFunction) for node in nodes([loss]))


#: The parameters that were handed to models in the place of their own, as far as they still exist.
HANDED = WeakTensorKeyDictionary()


def refuse_earlier_leaves(loss: Tensor, leaves: Iterable[Tensor]) -> None:
    """Raise where a loss depends on parameters that were handed to the model on an earlier pass.

    Args:
        loss: on some examples.
        leaves: the parameters of this pass.

    Raises:
        InputError: the model keeps something computed from parameters.
    """
    own = {id(leaf) for leaf in leaves}
    if any(id(leaf) not in own and leaf in HANDED for leaf in foreign_leaves(loss)):
        raise InputError(
            "the network keeps a tensor that was computed from parameters on an earlier pass; "
            "clear such caches in the forward pass, or call model.train() if that switches them off"
        )


def refuse_known_faults(ends: Iterable[Tensor]) -> None:
    """Raise where a graph holds a function whose derivatives are known to be missing or wrong.

    PyTorch puts an error node behind a function that was declared differentiable only once, but one
    that leads nowhere: asked for the derivative by given tensors it is never run, and its share
    would be missing without a word.
    """
    for node in nodes(ends):
        name = node.name().rpartition("::")[2]
        if name in ("Error", "DelayedError"):
            raise NotDifferentiableError(
                "the network contains a function marked once_differentiable, so that its second "
                "derivative does not exist; replace it by one PyTorch can differentiate twice"
            )
        if name.startswith("WeightNormInterface"):
            raise NotDifferentiableError(
                "PyTorch's second derivative of weight_norm is wrong; remove the parametrisation "
                "(torch.nn.utils.parametrize.remove_parametrizations) or write g * v / v.norm()"
            )
        if name.startswith("BinaryCrossEntropyBackward"):
            raise NotDifferentiableError(
                "PyTorch's second derivative of binary_cross_entropy is wrong where a sigmoid "
                "saturates; use binary_cross_entropy_with_logits on the logits"
            )
        if name == "CheckpointFunctionBackward":
            raise NotDifferentiableError(
                "a reentrant checkpoint hides parameters from torch.autograd.grad; pass "
                "use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if getattr(node, "_saved_scale_grad_by_freq", False) is True:
            raise NotDifferentiableError(
                "an embedding scales its gradient by frequency, which is then not the loss's; "
                "leave out scale_grad_by_freq=True"
            )
