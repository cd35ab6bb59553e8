"""What is wrong on a few examples of many, which no sample holds, is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpspec import HessianOperator
from tests.users.truth import Function, hessian, right, right_or_all_refused

#: Beyond this the functions below are wrong; only the rare examples get there.
EDGE = 3.0
N, RARE = 600, slice(100, 140)


class Clamped(torch.autograd.Function):
    """A clamp whose backward pass goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-EDGE, EDGE)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Sine(torch.autograd.Function):
    """A sine with the right gradient, which is a constant to the second derivative beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = torch.cos(x)
        return g * torch.where(x.abs() > EDGE, slope.detach(), slope)


class RightSine(Sine):
    """The same as it should be."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * torch.cos(x)


def clamped(x: Tensor) -> Tensor:
    return x.clamp(-EDGE, EDGE)


def straight_through(x: Tensor) -> Tensor:
    return torch.where(x.abs() > EDGE, x + (clamped(x) - x).detach(), x)


def hooked(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The identity, with a hook on the gradient where there is a rare example."""
    x = x * 1
    if x.requires_grad and float(x.detach().abs().max()) > EDGE:
        x.register_hook(change)
    return x


#: What is wrong, and the function that it stands for.
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a straight-through branch": (straight_through, clamped),
    "a straight-through function": (Clamped.apply, clamped),
    "a wrong double backward": (Sine.apply, torch.sin),
    "a hook that halves the gradient": (partial(hooked, lambda g: 0.5 * g), lambda x: x),
    "a hook that hides the second derivative": (partial(hooked, Tensor.detach), lambda x: x),
}


class Net(nn.Module):
    """A network with the function in it, and parameters on both sides."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(0.3 * self.function(self.a(x)))))


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 4, generator=generator).clamp(-1.5, 1.5)
    x[RARE] *= 6
    return x.to(dtype), torch.randint(3, (N,), generator=generator)


def operator(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype, batch_size: int | None = None
) -> HessianOperator:
    x, y = data(dtype)
    net = Net(function).to(dtype)
    if batch_size is None:
        return HessianOperator(net, nn.CrossEntropyLoss(), (x, y))
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return HessianOperator(net, nn.CrossEntropyLoss(), batches)


def truth(function: Callable[[Tensor], Tensor]) -> Tensor:
    x, y = data(torch.float64)
    return hessian(Net(function).double(), lambda call: F.cross_entropy(call(x), y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_on_rare_examples(what: str, batch_size: int | None, dtype: torch.dtype) -> None:
    wrong, right_one = WRONG[what]
    make = partial(operator, wrong, dtype, batch_size)
    assert not right_or_all_refused(make, truth(right_one))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize("function", [clamped, torch.sin, RightSine.apply, torch.relu])
def test_right_ones_are_answered(
    function: Callable[[Tensor], Tensor], batch_size: int | None, dtype: torch.dtype
) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    right(operator(function, dtype, batch_size), truth(function), tolerance)


@pytest.mark.parametrize("what", WRONG)
def test_the_wrong_ones_are_wrong(what: str) -> None:
    """By differences of the gradient of the function that is meant."""
    x, y = data(torch.float64)
    g, f = (
        Function(Net(h).double(), lambda call: F.cross_entropy(call(x), y)) for h in WRONG[what]
    )
    v = torch.randn(
        len(f.theta), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    e = 1e-6 * v[:, 0]
    product = (f.gradient(f.theta + e) - f.gradient(f.theta - e)) / 2e-6
    errors = [float((h.products(v)[:, 0] - product).norm() / product.norm()) for h in (f, g)]
    assert errors[0] < 1e-5
    assert errors[1] > 1e-2
