"""What is changed in a traced graph changes no result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hvpspec.curvature.linearise import (
    _accumulate_products,
    _drop_constants,
    _reuse_memory,
)


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
        return (c - c - 2 * v - c.sum() * 0) + 3 * v

    module, inputs = traced(function, (4, 5), (4, 5))
    v = next(iter(module.graph.nodes))
    dependent = {v}
    for node in module.graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    _drop_constants(module.graph, dependent)
    assert operations(module) == {"mul": 2, "neg": 1, "add": 1}
    same(module, lambda v, c: v, inputs)


def test_products_are_added_to_what_is_there() -> None:
    linear = nn.Linear(6, 3, dtype=torch.float64)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (x + linear(x)[:, :1]) + torch.bmm(A, B).view(10, 6)

    module, inputs = traced(function, (10, 6), (2, 5, 7), (2, 7, 6))
    _accumulate_products(module.graph)
    assert not operations(module)["bmm"]
    assert any("add_product_" in name for name in operations(module))
    same(module, function, inputs)


def test_products_are_not_added_to_what_is_needed_itself() -> None:
    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = x * 2
        return (y + A @ B) * y

    module, inputs = traced(function, (5, 6), (5, 7), (7, 6))
    _accumulate_products(module.graph)
    assert operations(module)["mm"] == 1
    same(module, function, inputs)
    module, inputs = traced(lambda x, A, B: x + A @ B, (5, 6), (5, 7), (7, 6))
    _accumulate_products(module.graph)
    assert operations(module)["mm"] == 1


def test_memory_is_used_again_along_a_chain_but_not_that_of_inputs() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return ((x + y).view(20) * 2 - 1).view(4, 5) * y

    module, inputs = traced(function, (4, 5), (4, 5))
    _reuse_memory(module.graph)
    assert operations(module)["add"] == 1
    assert operations(module)["mul_"] == 2
    same(module, function, inputs)
    x, y = (tensor.clone() for tensor in inputs)
    module(x, y)
    assert torch.equal(x, inputs[0])
    assert torch.equal(y, inputs[1])
