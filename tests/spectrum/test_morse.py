"""The resolved index against what the eigenvalues say."""

from __future__ import annotations

import pytest
import torch

import hvpspec
from hvpspec import DenseOperator, FunctionOperator, index
from tests.linalg.test_dense import HOSTILE, rotated


@pytest.mark.parametrize("method", ["exact", "inertia", "auto"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HOSTILE)
def test_counts_signs_beyond_round_off(name: str, scale: float, method: str) -> None:
    values = HOSTILE[name].double() * scale
    result = index(rotated(values), method=method)
    assert result.index == int((values < 0).sum())
    assert result.nullity == int((values == 0).sum())
    assert result.positive == int((values > 0).sum())
    assert result.certified
    assert result.lower == result.upper == result.estimate == result.index
    assert result.tau == result.noise_floor
    assert (result.method == "inertia") == (method == "inertia")


@pytest.mark.parametrize("method", ["exact", "inertia"])
def test_round_off_around_zeros_is_not_counted(method: str) -> None:
    """A hundred exact zeros in a rotated basis come out with signs that mean nothing."""
    values = torch.cat([torch.zeros(100), torch.tensor([-1.0, -0.5, 2.0])])
    A = rotated(values)
    result = index(A, method=method)
    assert (result.index, result.nullity, result.positive) == (2, 100, 1)
    assert int((torch.linalg.eigvalsh(A) < 0).sum()) > 20
    if method == "exact":
        assert result.raw_count is not None
        assert result.raw_count > 20


@pytest.mark.parametrize("method", ["exact", "inertia"])
def test_below_the_noise_floor_only_an_interval_is_certain(method: str) -> None:
    values = torch.cat([torch.zeros(100), torch.tensor([-1.0, -0.5, 2.0])])
    result = index(rotated(values), tau=0.0, method=method)
    assert result.index is None
    assert not result.certified
    assert (result.lower, result.upper) == (2, 102)
    # Without eigenvalues near it, an unresolved tau is no obstacle.
    result = index(rotated(torch.tensor([-1.0, 2.0])), tau=0.0, method=method)
    assert result.index == 1
    assert result.certified


def test_both_exact_methods_agree_at_every_tau() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(80, dtype=torch.float64, generator=generator)
    values *= 10 ** (-8 * torch.rand(80, dtype=torch.float64, generator=generator))
    A = rotated(values)
    for tau in torch.logspace(-12, 0, 25).tolist():
        exact, ldl = index(A, tau, method="exact"), index(A, tau, method="inertia")
        for name in ("index", "nullity", "positive", "lower", "upper", "certified"):
            assert getattr(exact, name) == getattr(ldl, name)
        assert exact.noise_floor == pytest.approx(ldl.noise_floor, rel=0.05)


def test_the_curve_counts_at_each_tau() -> None:
    values = torch.tensor([-4.0, -1.0, -1.0, -0.1, 0.0, 3.0])
    result = index(rotated(values))
    curve = result.curve(torch.tensor([0.5, 2.0, 0.01, 8.0]))
    assert curve.taus.tolist() == pytest.approx([0.01, 0.5, 2.0, 8.0])
    assert curve.counts.tolist() == [4, 3, 1, 0]
    default = result.curve()
    assert default.taus[0] < result.noise_floor < default.taus[-1]
    assert all(default.counts.diff() <= 0)
    assert default.counts[default.taus > result.noise_floor][0] == result.index
    assert index(torch.zeros(3, 3)).curve().counts.eq(0).all()


def test_an_operator_without_float64_is_judged_by_its_own_dtype() -> None:
    values = torch.cat([torch.zeros(50), torch.tensor([-1.0, -1e-3, 2.0])])
    A = rotated(values).float()
    narrow = FunctionOperator(53, lambda v: A @ v, dtype=torch.float32)
    result = index(narrow)
    assert result.noise_floor > 53 * 2**-24
    assert (result.index, result.nullity) == (2, 50)
    assert index(DenseOperator(A)).noise_floor < 1e-12


def test_products_are_counted() -> None:
    operator = FunctionOperator(20, lambda v: -v)
    assert index(operator).num_matvecs == operator.num_matvecs == 20 + 4


def test_errors() -> None:
    with pytest.raises(hvpspec.InputError, match="method must be one of auto, exact"):
        index(torch.eye(2), method="lanczos")
    with pytest.raises(hvpspec.InputError, match="confidence must lie between 0 and 1, got 7"):
        index(torch.eye(2), method="certified", confidence=7)
    with pytest.raises(hvpspec.InputError, match="tau must be"):
        index(torch.eye(2), tau=-1e-3)
    with pytest.raises(hvpspec.InputError, match="use method='exact' for the curve"):
        index(torch.eye(2), method="inertia").curve()
    with pytest.raises(hvpspec.InputError, match="not symmetric"):
        index(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
