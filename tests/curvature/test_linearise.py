"""Traced products are linear to the last digit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hvpspec.curvature.linearise import _drop_constants


def traced(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[fx.GraphModule, ...]:
    """A function of float64 tensors as a graph, twice, and the tensors."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return make_fx(function)(*inputs), inputs


def operations(module: fx.GraphModule) -> Counter[str]:
    """How often each operation is in a graph, by its name."""
    module.recompile()
    return Counter(
        str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
        for node in module.graph.nodes
        if node.op == "call_function"
    )


def same(module: fx.GraphModule, function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """A graph gives what the function gives, up to round-off."""
    module.graph.lint()
    module.recompile()
    result = module(*(x.clone() for x in inputs))
    expected = function(*(x.clone() for x in inputs))
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_constant_terms_of_a_linear_function_are_left_out() -> None:
    def function(v: Tensor, c: Tensor) -> Tensor:
        return (2 * v + (c - c)) - c.sum() * 0

    module, inputs = traced(function, (4, 5), (4, 5))
    v = next(iter(module.graph.nodes))
    dependent = {v}
    for node in module.graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    _drop_constants(module.graph, dependent)
    module.graph.eliminate_dead_code()
    assert operations(module) == {"mul": 1}
    same(module, lambda v, c: 2 * v, inputs)
