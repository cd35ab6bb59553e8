"""The objective at any point, against plain autograd on a copy of the network that stands there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvpspec
from hvpspec import Objective
from tests.curvature.cases import CASES, Case


def moved(model: nn.Module, f: Objective, theta: Tensor) -> nn.Module:
    """A copy of the network with other parameters."""
    there = copy.deepcopy(model)
    parameters = dict(there.named_parameters())
    with torch.no_grad():
        for name, part in f.space.unflatten(theta).items():
            parameters[name].copy_(part)
    return there


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_other_points(case: Case) -> None:
    model, inputs, targets = case.build()
    f = Objective(model, case.loss, (*inputs, targets), l2=0.1, chunk_size=4)
    here = f.space.flatten(f.leaves()).detach()
    theta = here + 0.1 * torch.randn(
        len(here), dtype=here.dtype, generator=torch.Generator().manual_seed(3)
    )
    v = torch.randn(len(here), dtype=here.dtype, generator=torch.Generator().manual_seed(4))
    value = f.value(theta)
    gradient, product = f.gradient(theta), f.hessian(theta) @ v
    g = Objective(moved(model, f, theta), case.loss, (*inputs, targets), l2=0.1)
    assert value == pytest.approx(g.value(), rel=1e-12)
    torch.testing.assert_close(gradient, g.gradient(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(product, g.hessian() @ v, rtol=1e-9, atol=1e-11)
    # Nothing of it stays: the present point is where it was.
    assert f.value() == pytest.approx(f.value(here), rel=1e-12)
    torch.testing.assert_close(f.hessian().matvec(v), f.hessian(here).matvec(v))


class Checkpointed(nn.Module):
    """A network of which a part is evaluated again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        part: Callable[[Tensor], Tensor] = lambda x: torch.tanh(self.first(x))  # noqa: E731
        return self.head(checkpoint(part, x, use_reentrant=False))


def test_what_is_evaluated_again_is_so_at_the_same_point() -> None:
    torch.manual_seed(0)
    model = Checkpointed()
    data = torch.randn(12, 4), torch.randint(3, (12,))
    f = Objective(model, nn.CrossEntropyLoss(), data)
    theta = 2 * f.space.flatten(f.leaves()).detach()
    there = moved(model, f, theta).double()
    data64 = data[0].double(), data[1]
    expected = Objective(there, nn.CrossEntropyLoss(), data64).hessian().to_dense()
    found = f.in_float64().hessian(theta).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    H = f.in_float64().hessian(theta)
    for _ in range(4):  # also from graphs that were kept
        torch.testing.assert_close(H @ expected[:, :2], expected @ expected[:, :2])


def test_index_at_another_point() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    M = torch.randn(3, 3, dtype=torch.float64)
    x = torch.eye(3, dtype=torch.float64)
    f = Objective(model, nn.MSELoss(reduction="sum"), (x, M.T))
    # At the origin of 1/2 ||W2 W1 - M||^2 the index is h rank M (here h = 2), all else is zero.
    result = hvpspec.index(f.hessian(torch.zeros(12)), tau=1e-9)
    assert (result.index, result.nullity) == (6, 0)


def test_what_is_refused() -> None:
    model, data = nn.Linear(2, 1), (torch.ones(3, 2), torch.zeros(3, 1))
    f = Objective(model, nn.MSELoss(), data)
    with pytest.raises(hvpspec.InputError, match=r"theta must have shape \(3,\), got \(2,\)"):
        f.value(torch.zeros(2))
    with pytest.raises(hvpspec.InputError, match="mode must be 'eval' or 'as given', got 'train'"):
        Objective(model, nn.MSELoss(), data, mode="train")  # type: ignore[arg-type]
    options: dict[str, Any] = {"l2": -1.0}
    with pytest.raises(hvpspec.InputError, match="l2 must be a finite number"):
        Objective(model, nn.MSELoss(), data, **options)


def test_what_was_checked_is_not_checked_again() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    model, data = Counted(3, 2), (torch.randn(60, 3), torch.randint(2, (60,)))
    H = hvpspec.HessianOperator(model, nn.CrossEntropyLoss(), data, engine="double-backward")
    H.loss()
    calls.clear()
    for operator in (H, H.block("bias"), H.in_float64()):
        calls.clear()
        operator.matvec(torch.ones(operator.shape[0], dtype=operator.dtype))
        assert calls == [60]
