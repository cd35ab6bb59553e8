"""Derivatives beside central differences, on functions whose derivatives are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvpspec.curvature.differences import Comparison, Parts, compare

U = torch.finfo(torch.float64).eps / 2
N = 30


def parted(vector: Tensor) -> Parts:
    """The vector in two parts, as of two layers."""
    return {"front": vector[: N // 3], "back": vector[N // 3 :]}


def compared(
    f: Callable[[Tensor], Tensor],
    theta: Tensor,
    *,
    wrong_product: float = 0.0,
    wrong_gradient: float = 0.0,
    u: float = U,
) -> tuple[Comparison, Comparison]:
    """Compare autograd's derivatives of a function, or wrong ones, with differences."""

    def both(point: Parts) -> tuple[float, Parts]:
        theta = torch.cat(list(point.values())).requires_grad_()
        value = f(theta)
        (gradient,) = torch.autograd.grad(value, theta)
        return float(value.detach()), parted(gradient * (1 + wrong_gradient))

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(theta), dtype=theta.dtype, generator=generator)
    v = v / torch.linalg.vector_norm(v)
    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (product,) = torch.autograd.grad(gradient, leaf, v, allow_unused=True, materialize_grads=True)
    product = product * (1 + wrong_gradient) + wrong_product * torch.linalg.vector_norm(
        product
    ) * v.flip(0)
    here = parted(theta)
    return compare(both, here, both(here), parted(v), parted(product), u, 1e-6)


def point(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(N, dtype=torch.float64, generator=generator)


def smooth(theta: Tensor) -> Tensor:
    return torch.tanh(theta).square().sum() + (theta.roll(1) * theta).sin().sum()


@pytest.mark.parametrize("loss_scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_right_derivatives_agree_at_every_scale(scale: float, loss_scale: float) -> None:
    by_product, by_value = compared(lambda t: loss_scale * smooth(t / scale), point(scale))
    assert by_product.is_conclusive
    assert by_value.is_conclusive
    # What is left is the error of the difference itself, which is allowed for.
    assert max(by_product.defect, by_value.defect) < 1e-6


@pytest.mark.parametrize("fault", [1.0, 1e-1, 1e-2])
def test_faults_are_as_large_as_they_are(fault: float) -> None:
    by_product, by_value = compared(smooth, point(), wrong_product=fault)
    assert by_product.is_conclusive
    assert by_product.defect == pytest.approx(fault, rel=0.5)
    assert by_value.defect < 1e-6
    _, by_value = compared(smooth, point(), wrong_gradient=fault)
    assert by_value.defect == pytest.approx(fault / (1 + fault), rel=0.1)


def kinked(theta: Tensor) -> Tensor:
    """Ten thousand kinks on the way, and curvature between them."""
    places = torch.linspace(-3, 3, 10_000, dtype=theta.dtype)
    return (
        torch.relu(theta[:, None] - places).square().mul(0.01).sum()
        + torch.relu(theta[:, None] - places).sum()
    )


def test_kinks_on_the_way_are_no_fault() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        theta = torch.randn(N, dtype=torch.float64, generator=generator)
        by_product, by_value = compared(kinked, theta)
        assert by_product.defect < 1e-3
        assert by_value.defect < 1e-3


def test_a_kink_at_the_very_point_says_nothing() -> None:
    by_product, _ = compared(
        lambda t: torch.relu(t).sum() + t.square().sum(), torch.zeros(N).double()
    )
    assert not by_product.is_conclusive


def test_a_derivative_that_is_wrong_at_a_point_alone() -> None:
    """``abs(t)**2`` has the second derivative 2 at 0, PyTorch says 0."""
    by_product, _ = compared(lambda t: (t.abs() ** 2).sum() + t.sum(), torch.zeros(N).double())
    assert by_product.is_conclusive
    assert by_product.defect == pytest.approx(1.0, rel=1e-2)


def test_where_the_hessian_is_zero() -> None:
    by_product, by_value = compared(lambda t: t.sum() + 0 * t.square().sum(), point())
    assert by_product == Comparison(True, 0.0)
    assert by_value.is_conclusive


def test_low_precision_is_allowed_for() -> None:
    def rounded(t: Tensor) -> Tensor:
        return smooth(t.float()).double()

    u = torch.finfo(torch.float32).eps / 2
    by_product, by_value = compared(rounded, point(), u=u)
    assert max(by_product.defect, by_value.defect) < 1e-3
    by_product, _ = compared(rounded, point(), u=u, wrong_product=0.3)
    assert by_product.defect > 0.1


def test_a_point_that_is_zero_but_for_roundoff() -> None:
    def symmetric(theta: Tensor) -> Tensor:
        # Two terms whose gradients cancel at 0, up to the round-off of each.
        a = torch.linspace(0.1, 1, N, dtype=torch.float64)
        return torch.exp(a * theta).sum() + torch.exp(-a * theta).sum()

    by_product, _ = compared(symmetric, point(1e-30))
    assert by_product.is_conclusive
    assert by_product.defect < 1e-6
