"""Factors that do not depend on the vectors, moved out of what is computed for each of them.

Whatever is linear in the vectors entry by entry is one multiplication, by a factor that is worked
out once: ``(v a) b`` is ``v (a b)``, and an activation's derivative need not be evaluated again.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hvpspec.curvature.simplify import called, same_layout

_aten = torch.ops.aten

_PRODUCTS = {_aten.mul.Tensor, _aten.mul.Scalar}
_QUOTIENTS = {_aten.div.Tensor, _aten.div.Scalar}
# Linear in their first argument, entry by entry, and dear to evaluate.
_DERIVATIVES = {
    _aten.elu_backward.default, _aten.gelu_backward.default, _aten.mish_backward.default,
    _aten.sigmoid_backward.default, _aten.silu_backward.default, _aten.softplus_backward.default,
    _aten.tanh_backward.default,
}  # fmt: skip


@dataclass(frozen=True)
class _Scaled:
    """A node as a multiple of another.

    Attributes:
        argument: the other.
        factor: a number, or a node that does not depend on the vectors.
    """

    argument: fx.Node
    factor: fx.Node | float


def hoist_factors(graph: fx.Graph, dependent: Set[fx.Node]) -> None:
    """Multiply by one factor where several follow each other, or where a derivative is evaluated.

    Args:
        graph: of ATen operations with their results in ``meta["val"]``.
        dependent: the nodes that depend on the vectors.
    """
    dependent, scaled = set(dependent), dict[fx.Node, _Scaled]()
    for node in [node for node in graph.nodes if node in dependent]:
        with graph.inserting_before(node):
            found = _as_scaled(graph, node, dependent)
            if found is None:
                continue
            inner = scaled.get(found.argument)
            if inner is not None and len(found.argument.users) == 1:
                found = _Scaled(inner.argument, _product(graph, inner.factor, found.factor))
            elif node.target not in _DERIVATIVES:
                scaled[node] = found
                continue
            new = _times(graph, found.argument, found.factor)
        if same_layout(new, node):
            node.replace_all_uses_with(new)
            dependent.add(new)
            scaled[new] = found
    graph.eliminate_dead_code()


def _as_scaled(graph: fx.Graph, node: fx.Node, dependent: Set[fx.Node]) -> _Scaled | None:
    """A node as a multiple of its only argument that depends on the vectors, if it is one."""
    arguments = [n for n in node.all_input_nodes if n in dependent]
    if len(arguments) != 1:
        return None
    (argument,) = arguments
    others: list[Any] = [other for other in node.args if other is not argument]
    if node.target in _PRODUCTS and len(others) == 1:
        return _Scaled(argument, others[0])
    if node.args[0] is not argument:
        return None
    if node.target is _aten.neg.default:
        return _Scaled(argument, -1.0)
    if node.target in _QUOTIENTS and isinstance(others[0], (int, float)):
        return _Scaled(argument, 1 / others[0])
    if node.target in _DERIVATIVES:
        # Without the dimension of the block, along which nothing changes.
        points = [
            n.args[0] if isinstance(n, fx.Node) and n.target is _aten.expand.default else n
            for n in others
        ]
        like = next(n for n in points if isinstance(n, fx.Node))
        ones = called(graph, _aten.ones_like.default, like)
        return _Scaled(argument, called(graph, node.target, ones, *points, **node.kwargs))
    return None


def _product(graph: fx.Graph, a: fx.Node | float, b: fx.Node | float) -> fx.Node | float:
    """The product of two factors."""
    if isinstance(a, fx.Node):
        return _times(graph, a, b)
    return _times(graph, b, a) if isinstance(b, fx.Node) else a * b


def _times(graph: fx.Graph, node: fx.Node, factor: fx.Node | float) -> fx.Node:
    """A node times a factor."""
    operation = _aten.mul.Tensor if isinstance(factor, fx.Node) else _aten.mul.Scalar
    return called(graph, operation, node, factor)
