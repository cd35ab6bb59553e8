"""What is spared in a traced graph changes no result, and is spared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hvpspec.curvature.hoisting import hoist_factors
from hvpspec.curvature.simplify import (
    accumulate_products,
    drop_copies,
    fuse_products,
    merge_equal,
    reuse_memory,
)

aten = torch.ops.aten


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


def hoisted(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Counter[str]:
    """The operations that depend on the first input when factors are hoisted."""
    module, inputs = traced(function, *shapes)
    graph = module.graph

    def dependent() -> set[fx.Node]:
        found: set[fx.Node] = {next(iter(graph.nodes))}
        for node in graph.nodes:
            if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    hoist_factors(graph, dependent())
    same(module, function, inputs)
    return Counter(n.target.__name__ for n in dependent() if n.op == "call_function")


def test_factors_are_multiplied_first() -> None:
    names = hoisted(lambda v, a, b: -(v * a / 3 * b * 2), (4, 5, 6), (5, 6), (6,))
    assert names == {"mul.Tensor": 1}


def test_numbers_alone_stay_numbers() -> None:
    assert hoisted(lambda v: -(v * 2.0 / 3), (4, 5)) == {"mul.Scalar": 1}


@pytest.mark.parametrize("activation", ["gelu", "silu", "mish", "elu", "softplus", "tanh"])
def test_derivatives_are_evaluated_once(activation: str) -> None:
    def derivative(v: Tensor, x: Tensor) -> Tensor:
        wide = x.expand(4, -1, -1)
        if activation == "tanh":
            return aten.tanh_backward(v, wide)
        if activation == "elu":
            return aten.elu_backward(v, 1.0, 1.0, 1.0, False, wide)
        if activation == "softplus":
            return aten.softplus_backward(v, wide, 1.0, 20.0)
        return getattr(aten, f"{activation}_backward")(v, wide)

    assert hoisted(derivative, (4, 5, 6), (5, 6)) == {"mul.Tensor": 1}


def test_a_result_that_is_needed_itself_is_kept() -> None:
    def function(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        once = v * a
        return once * b + once

    assert hoisted(function, (4, 5), (5,), (5,)) == {"mul.Tensor": 2, "add.Tensor": 1}


def test_equal_results_are_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        return (x - x.mean(1, True)) * 2 + (x - x.mean(1, True)) * 2.5

    module, inputs = traced(function, (4, 5))
    merge_equal(module.graph)
    assert operations(module) == {"mean": 1, "sub": 1, "mul": 2, "add": 1}
    same(module, function, inputs)


def test_random_numbers_are_drawn_each_time() -> None:
    module, _ = traced(lambda x: torch.rand_like(x) - torch.rand_like(x), (4, 5))
    merge_equal(module.graph)
    assert operations(module)["rand_like"] == 2


def test_products_are_added_to_what_is_there() -> None:
    linear = nn.Linear(6, 3, dtype=torch.float64)

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (x + linear(x)[:, :1]) + torch.bmm(A, B).view(10, 6)

    module, inputs = traced(function, (10, 6), (2, 5, 7), (2, 7, 6))
    accumulate_products(module.graph)
    assert not operations(module)["bmm"]
    assert any("add_product_" in name for name in operations(module))
    same(module, function, inputs)


def test_products_are_not_added_to_what_is_needed_itself() -> None:
    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = x * 2
        return (y + A @ B) * y

    module, inputs = traced(function, (5, 6), (5, 7), (7, 6))
    accumulate_products(module.graph)
    assert operations(module)["mm"] == 1
    same(module, function, inputs)
    module, inputs = traced(lambda x, A, B: x + A @ B, (5, 6), (5, 7), (7, 6))
    accumulate_products(module.graph)
    assert operations(module)["mm"] == 1


def test_sums_with_products_of_constants_are_one_operation() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x - a * b + b * a

    module, inputs = traced(function, (4, 5), (5,), (4, 1))
    fuse_products(module.graph)
    assert operations(module) == {"addcmul": 2}
    same(module, function, inputs)


def test_copies_are_made_only_for_another_layout() -> None:
    def function(x: Tensor) -> Tensor:
        once = x.clone()
        turned = once.T.clone(memory_format=torch.contiguous_format)
        return torch.ops.aten.copy(turned, once.T) * turned

    module, inputs = traced(function, (4, 5))
    drop_copies(module.graph)
    assert not {"clone", "copy"} & operations(module).keys()
    assert sum(node.target == "contiguous" for node in module.graph.nodes) == 2
    same(module, function, inputs)


def test_memory_is_used_again_along_a_chain_but_not_that_of_inputs() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return ((x + y).view(20) * 2 - 1).view(4, 5) * y

    module, inputs = traced(function, (4, 5), (4, 5))
    reuse_memory(module.graph)
    assert operations(module)["add"] == 1
    assert operations(module)["mul_"] == 2
    same(module, function, inputs)
    x, y = (tensor.clone() for tensor in inputs)
    module(x, y)
    assert torch.equal(x, inputs[0])
    assert torch.equal(y, inputs[1])
