"""What an autograd graph tells about a loss before it is trusted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hvpspec.curvature.sharding import reshard, shard
from hvpspec.errors import InputError, NotDifferentiableError


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


def refuse_hidden_errors(gradient: Iterable[Tensor]) -> None:
    """Raise where a function on the way to a gradient was declared differentiable only once.

    PyTorch puts an error node behind such a function, but one that leads nowhere: asked for the
    derivative by given tensors it is never run, and its share would be missing without a word.
    """
    for node in nodes(gradient):
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


def refuse_own_parameters(loss: Tensor, model: nn.Module) -> None:
    """Raise where a loss takes the model's parameters by itself.

    The operator differentiates by copies that it hands to the model; a penalty on the parameters in
    the loss function sees the originals, and would be a constant without a word.
    """
    own = {id(p): name for name, p in model.named_parameters()}
    for node in nodes([loss]):
        name = own.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise InputError(
                f"the loss takes the parameter {name!r} by itself, not through the outputs; "
                "use l2= for a penalty, or compute it in the model's forward pass"
            )


def parameter_marks(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two numbers for each parameter and buffer, or shard of one, by which a change is known.

    A norm tells all changes but those of signs and places, and these are told by the sum with
    unequal weights.
    """
    reshard(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        return {
            name: _mark(shard(t).flatten()) for name, t in tensors.items() if t.is_floating_point()
        }


def _mark(x: Tensor) -> tuple[float, float]:
    """The norm of a vector, and its sum with weights from 1 to 2."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = torch.linspace(1, 2, len(x), dtype=dtype, device=x.device)
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float64))
    return float(norm), float(torch.dot(x.to(dtype), weights))
