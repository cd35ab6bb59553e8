"""Passes that spare a traced graph what it does for nothing: zeros, copies, what is done twice.

Forward derivatives are traced with zeros for whatever has no tangent, and one operation at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from hvpspec.curvature.kernels import add_product_

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
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_RANDOM = torch.Tag.nondeterministic_seeded
_COMMUTATIVE = {_aten.add.Tensor, _aten.mul.Tensor}


def drop_zeros(graph: fx.Graph) -> None:
    """Replace sums with what is zero whatever the inputs by their other term.

    A zero times infinity counts as zero, as it does to backward differentiation, which never meets
    it.

    Args:
        graph: of ATen operations with their results' shapes in ``meta["val"]``.
    """
    zero: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _SUMS and not node.kwargs:
            _drop_zero_terms(graph, node, zero)
        elif (
            node.target in _ZEROS
            or (node.target in _LINEAR and node.args[0] in zero)
            or (node.target in _BILINEAR and not zero.isdisjoint(node.args))
        ):
            zero.add(node)


def drop_constants(graph: fx.Graph, dependent: Set[fx.Node]) -> None:
    """Leave terms out that do not depend on the vectors: together they are zero up to round-off.

    Products are linear, but PyTorch's forward derivative of a group's norm, for one, subtracts a
    mean whose share in the result cancels. With small vectors its round-off would be all there is.

    Args:
        graph: as for :func:`drop_zeros`.
        dependent: the nodes that depend on the vectors.
    """
    constant = {node for node in graph.nodes if node not in dependent}
    for node in graph.nodes:
        if node in dependent and node.target in _SUMS and not node.kwargs:
            _drop_zero_terms(graph, node, constant)
    graph.eliminate_dead_code()


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
    """Copy only where the result's layout is another: nothing is changed in place.

    Args:
        graph: as for :func:`drop_zeros`.
    """
    for node in graph.nodes:
        if node.target is _aten.clone.default:
            (source,) = node.args
        elif node.target is _aten.copy.default:
            source = node.args[1]
        else:
            continue
        if _is_like(source, node):
            node.replace_all_uses_with(source)
        elif _is_like(source, node, layout=False) and node.meta["val"].is_contiguous():
            with graph.inserting_before(node):
                copy = graph.call_method("contiguous", (source,))
            _replace(graph, node, copy)
    graph.eliminate_dead_code()


def merge_equal(graph: fx.Graph) -> None:
    """Compute once what is computed more than once.

    Args:
        graph: as for :func:`drop_zeros`.
    """
    first: dict[tuple[object, str], fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or _RANDOM in getattr(node.target, "tags", ()):
            continue
        same = first.setdefault((node.target, repr((node.args, node.kwargs))), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


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
                and all(map(_is_floating, (x, *product.args)))
            ):
                with graph.inserting_before(node):
                    fused = called(graph, _aten.addcmul.default, x, *product.args, value=sign)
                if same_layout(fused, node):
                    _replace(graph, node, fused)
                    break
    graph.eliminate_dead_code()


def accumulate_products(graph: fx.Graph) -> None:
    """Add products of matrices to what is there as they are computed: ``x + A B`` in one pass."""
    for node in graph.nodes:
        if node.target is not _aten.add.Tensor or node.kwargs:
            continue
        for x, term in (node.args, node.args[::-1]):
            product = _behind_views(term)
            if (
                product is not None
                and product.target in (_aten.mm.default, _aten.bmm.default)
                and _is_like(x, node)
                and node.meta["val"].is_contiguous()
                and _is_owned(x)
            ):
                with graph.inserting_before(node):
                    _replace(graph, node, graph.call_function(add_product_, (x, *product.args)))
                break
    graph.eliminate_dead_code()


def _behind_views(term: object) -> fx.Node | None:
    """What a term in a sum is a contiguous view of, if nothing else needs it."""
    while isinstance(term, fx.Node) and len(term.users) == 1:
        if term.target not in _VIEWS:
            return term
        term = term.args[0]
    return None


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
    while len(node.users) == 1 and node.op.startswith("call"):
        if not _may_be_view(node):
            return True
        node = node.all_input_nodes[0]
    return False


def _is_floating(argument: object) -> TypeGuard[fx.Node]:
    """Whether an argument is a tensor of real numbers with dimensions, which promotes nothing."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return isinstance(value, Tensor) and value.ndim > 0 and value.is_floating_point()


def _replace(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Put a node in the place of another with the same result."""
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def called(graph: fx.Graph, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call, with its result's shape, strides and dtype in ``meta["val"]``.

    Args:
        graph: where; its point of insertion says at what place.
        function: of tensors.
        args: nodes with a ``meta["val"]``, and constants.
        kwargs: constants.
    """
    node = graph.call_function(function, args, kwargs)
    node.meta["val"] = function(*fx.node.map_arg(args, _without_memory), **kwargs)
    return node


def _without_memory(node: fx.Node) -> Tensor:
    """A node's result without its numbers."""
    value = node.meta["val"]
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have results of the same shape, strides and dtype."""
    x: Tensor = a.meta["val"]
    y: Tensor = b.meta["val"]
    return x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def _is_like(argument: object, node: fx.Node, *, layout: bool = True) -> TypeGuard[fx.Node]:
    """Whether an argument has the shape and dtype of a result, and the same strides."""
    if not isinstance(argument, fx.Node) or not isinstance(argument.meta.get("val"), Tensor):
        return False
    a, b = argument.meta["val"], node.meta["val"]
    return a.shape == b.shape and a.dtype == b.dtype and (a.stride() == b.stride() or not layout)


def _may_be_view(node: fx.Node) -> bool:
    """Whether an operation's result may share the memory of its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(a.alias_info is not None for a in schema.arguments)
