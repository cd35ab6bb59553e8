"""Passes that spare a traced graph what it does for nothing: zeros, copies, passes over memory.

Forward derivatives are traced with zeros for whatever has no tangent, and one operation at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, fx

_aten = torch.ops.aten

_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
# Zero if their first argument is.
_LINEAR = {
    _aten.alias.default, _aten.clone.default, _aten.detach.default, _aten._to_copy.default,
    _aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.t.default,
    _aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.squeeze.dims, _aten.select.int, _aten.slice.Tensor, _aten.sum.dim_IntList,
    _aten.neg.default, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar,
}  # fmt: skip
# Zero if one of their arguments is.
_BILINEAR = {_aten.mul.Tensor, _aten.mm.default, _aten.bmm.default}
_SUMS = {_aten.add.Tensor: 1.0, _aten.sub.Tensor: -1.0}
_IN_PLACE = {
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.addcmul.default: _aten.addcmul_.default,
}
_COMMUTATIVE = {_aten.add.Tensor, _aten.mul.Tensor}


def drop_zeros(graph: fx.Graph) -> None:
    """Replace sums with what is zero whatever the inputs by their other term.

    A zero times infinity counts as zero, as it does to backward differentiation, which never meets
    it.

    Args:
        graph: of ATen operations with their results' shapes in ``meta["val"]``.
    """
    changing = {memory_of(target) for node in graph.nodes for target in written_by(node)}
    zero: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or memory_of(node) in changing:
            continue
        if node.target in _SUMS and not node.kwargs:
            _drop_zero_terms(graph, node, zero)
        elif (
            node.target in _ZEROS
            or (node.target in _LINEAR and node.args[0] in zero)
            or (node.target in _BILINEAR and not zero.isdisjoint(node.args))
        ):
            zero.add(node)


def _drop_zero_terms(graph: fx.Graph, node: fx.Node, zero: set[fx.Node]) -> None:
    """Replace a sum or difference of which a term is zero, or note that both are."""
    first, second = node.args
    if first in zero and second in zero:
        zero.add(node)
    elif second in zero and _is_like(first, node):
        node.replace_all_uses_with(first)
    elif first in zero and _is_like(second, node):
        if node.target is _aten.sub.Tensor:
            with graph.inserting_before(node):
                negative = graph.call_function(_aten.neg.default, (second,))
            _replace(graph, node, negative)
        else:
            node.replace_all_uses_with(second)


def drop_copies(graph: fx.Graph) -> None:
    """Copy into new memory of another layout only where the layout is another."""
    writers = Counter(memory_of(target) for node in graph.nodes for target in written_by(node))
    for node in graph.nodes:
        if node.target is not _aten.copy_.default or len(node.args) != 2:
            continue
        new, source = node.args
        if (
            new.target is _aten._new_zeros_with_same_feature_meta.default
            and writers[new] == 1
            and new.users.keys() == {node}
            and _is_like(source, node, layout=False)
            and node.meta["val"].is_contiguous()
        ):
            with graph.inserting_before(node):
                copy = graph.call_method("contiguous", (source,))
            _replace(graph, node, copy)
            graph.erase_node(new)


def fuse_products(graph: fx.Graph) -> None:
    """Replace ``x + a b`` by one operation, which reads and writes memory once."""
    for node in graph.nodes:
        if node.target not in _SUMS or node.kwargs:
            continue
        sign = _SUMS[node.target]
        terms = [node.args, node.args[::-1]] if sign > 0 else [node.args]
        for x, product in terms:
            if (
                isinstance(product, fx.Node)
                and product.target is _aten.mul.Tensor
                and len(product.users) == 1
                and _makes(node, torch.addcmul, x, *product.args)
            ):
                with graph.inserting_before(node):
                    fused = graph.call_function(
                        _aten.addcmul.default, (x, *product.args), {"value": sign}
                    )
                _replace(graph, node, fused)
                graph.erase_node(product)
                break


def reuse_memory(graph: fx.Graph) -> None:
    """Write results where an argument lay that nothing else needs."""
    for node in graph.nodes:
        if node.target not in _IN_PLACE:
            continue
        candidates = node.args[:2] if node.target in _COMMUTATIVE else node.args[:1]
        for place in candidates:
            if isinstance(place, fx.Node) and _is_like(place, node) and _is_owned(place):
                others = [a for a in node.args if a is not place]
                if len(others) == len(node.args) - 1:  # not a tensor with itself
                    node.args = (place, *others)
                    node.target = _IN_PLACE[node.target]
                break


def _is_owned(node: fx.Node) -> bool:
    """Whether a tensor's memory was allocated in the graph and is used for one purpose only."""
    while len(node.users) == 1 and node.op.startswith("call") and not written_by(node):
        if not may_be_view(node):
            return True
        node = node.all_input_nodes[0]
    return False


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Put a node in the place of another with the same result."""
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _makes(node: fx.Node, function: Callable[..., Tensor], *arguments: object) -> bool:
    """Whether a function of the arguments, all tensors of one dtype, has a node's layout."""
    tensors = []
    for argument in arguments:
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
        if not isinstance(value, Tensor) or value.ndim == 0 or not value.is_floating_point():
            return False
        size, stride, dtype = value.size(), value.stride(), value.dtype
        tensors.append(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
    result, expected = function(*tensors), node.meta["val"]
    return (
        {t.dtype for t in tensors} == {expected.dtype}
        and result.shape == expected.shape
        and result.stride() == expected.stride()
    )


def _is_like(argument: object, node: fx.Node, *, layout: bool = True) -> TypeGuard[fx.Node]:
    """Whether an argument has the shape and dtype of a result, and the same strides."""
    if not isinstance(argument, fx.Node) or not isinstance(argument.meta.get("val"), Tensor):
        return False
    a, b = argument.meta["val"], node.meta["val"]
    return a.shape == b.shape and a.dtype == b.dtype and (a.stride() == b.stride() or not layout)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operation writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = {
        **dict(zip((a.name for a in schema.arguments), node.args, strict=False)),
        **node.kwargs,
    }
    return [
        value
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(value := named.get(argument.name), fx.Node)
    ]


def memory_of(node: fx.Node) -> fx.Node:
    """The node that allocated what a node is a view of, or wrote into."""
    while node.op.startswith("call") and node.all_input_nodes and may_be_view(node):
        node = node.all_input_nodes[0]
    return node


def may_be_view(node: fx.Node) -> bool:
    """Whether an operation's result may share the memory of its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(a.alias_info is not None for a in schema.arguments)
