"""The preconditioned Hessian, with Adam's diagonal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hvpspec
from hvpspec import HessianOperator, InputError, PreconditionedOperator, adam_preconditioner


def trained(
    kind: type[torch.optim.Optimizer], steps: int, **options: float
) -> tuple[torch.optim.Optimizer, HessianOperator]:
    """A small network after some steps, its optimizer, and its Hessian."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        X, y = torch.randn(20, 3).double(), torch.randint(2, (20,))
    optimizer = kind(net.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimizer.step()
    return optimizer, HessianOperator(net, nn.CrossEntropyLoss(), (X, y))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_it_is_what_the_next_step_is_divided_by(
    kind: type[torch.optim.Optimizer], amsgrad: bool
) -> None:
    """Without a first moment, Adam's step is lr g / D, of which all but D is known."""
    options = {"betas": (0.0, 0.9), "amsgrad": amsgrad, "weight_decay": 0.0}
    optimizer, H = trained(kind, 5, **options)
    before = H.space.flatten(dict(H.model.named_parameters())).detach()
    D = adam_preconditioner(optimizer, H)
    # The step that has just been made, again: the moments of the last gradient are in D.
    gradient = torch.cat([p.grad.flatten() for p in H.model.parameters() if p.grad is not None])
    _, H2 = trained(kind, 4, **options)
    earlier = H2.space.flatten(dict(H2.model.named_parameters())).detach()
    torch.testing.assert_close(before, earlier - 0.01 * gradient / D, rtol=1e-12, atol=1e-14)


def test_the_preconditioned_matrix() -> None:
    optimizer, H = trained(torch.optim.Adam, 5)
    D = adam_preconditioner(optimizer, H)
    A = PreconditionedOperator(H, D)
    matrix = H.to_dense() / D.sqrt() / D.sqrt()[:, None]
    torch.testing.assert_close(A.to_dense(), matrix, rtol=1e-12, atol=1e-9)
    V = torch.randn(H.shape[0], 3, dtype=torch.float64)
    torch.testing.assert_close(A @ V, matrix @ V, rtol=1e-12, atol=1e-9)
    # Those of D^-1 H, and with as many below zero as H has.
    similar = torch.linalg.eigvals(H.to_dense() / D[:, None]).real.sort().values
    values = hvpspec.eigvalsh(A)
    torch.testing.assert_close(values, similar, rtol=1e-8, atol=1e-8 * float(values.abs().max()))
    index = hvpspec.index(A, method="exact")
    assert index.index == hvpspec.index(H, method="exact").index
    assert index.bound == hvpspec.index(H, method="exact").bound
    # The gradient in its coordinates is another, and the loss is the same.
    assert (index.loss, index.gradient_norm) == (H.loss(), None)
    assert hvpspec.index(A, 1e-6 * index.norm, method="certified").index is not None


def test_float32_goes_up_to_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(9, 9, generator=generator)
    D = torch.rand(9, generator=generator) + 0.1
    A = PreconditionedOperator(hvpspec.DenseOperator(matrix + matrix.T), D)
    exact = A.in_float64()
    assert exact.dtype == torch.float64
    torch.testing.assert_close(A.to_dense().double(), exact.to_dense(), rtol=1e-5, atol=1e-5)


def scaled(D: Tensor) -> PreconditionedOperator:
    return PreconditionedOperator(hvpspec.DenseOperator(torch.eye(3)), D)


def test_what_cannot_be_used() -> None:
    optimizer, H = trained(torch.optim.Adam, 0)
    with pytest.raises(InputError, match=r"Adam has not moved 0\.weight yet; take a step"):
        adam_preconditioner(optimizer, H)
    for momentum in (0.0, 0.9):
        optimizer, H = trained(torch.optim.SGD, 2, momentum=momentum)
        with pytest.raises(InputError, match="SGD divides its steps in another way; pass an Adam"):
            adam_preconditioner(optimizer, H)
    other, _ = trained(torch.optim.Adam, 2)
    with pytest.raises(InputError, match="Adam has not moved"):
        adam_preconditioner(other, H)
    with pytest.raises(InputError, match=r"D must have shape \(3,\), got \(2,\)"):
        scaled(torch.ones(2))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="D must hold positive, finite numbers"):
            scaled(torch.tensor([1.0, bad, 1.0]))
