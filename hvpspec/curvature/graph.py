"""What an autograd graph tells."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node


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
