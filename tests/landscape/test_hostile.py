"""Landscapes that are out to get a wrong answer in silence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvpspec.errors import InputError
from hvpspec.landscape import (
    FunctionLandscape,
    NetworkLandscape,
    certify,
    critical,
    critical_point,
    critical_points,
    morse_check,
    steps,
    symmetries,
)
from tests.landscape.functions import DOUBLE, gradient_flat, tensor

LINE = torch.linspace(-10, 10, 41, dtype=DOUBLE)[:, None]


def double_well() -> FunctionLandscape:
    return FunctionLandscape(2, lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2)


# ---------------------------------------------------------------------------------------------
# Index and gap of large Hessians


def at_a_saddle(monkeypatch: pytest.MonkeyPatch, exact: int, inertia: int) -> object:
    """A saddle of index 3 of which the smallest |eigenvalue| is positive, taken for a large one."""
    monkeypatch.setattr(critical, "EXACT_UP_TO", exact)
    monkeypatch.setattr(critical, "INERTIA_UP_TO", inertia)
    values = torch.cat([tensor(-2, -1.5, -0.7, 0.4), torch.linspace(1, 3, 16, dtype=DOUBLE)])
    F = FunctionLandscape(20, lambda x: values @ x**2 / 2 + (x**4).sum())
    return certify(F, torch.zeros(20, dtype=DOUBLE), lipschitz=1.0)


def test_the_gap_of_a_saddle_may_end_at_a_positive_eigenvalue(monkeypatch: pytest.MonkeyPatch):
    p = at_a_saddle(monkeypatch, 10, 100)
    assert (p.kind, p.certified) == ("saddle of index 3", True)
    assert p.gap == pytest.approx(0.4)


def test_nothing_is_said_of_a_gap_that_is_unknown(monkeypatch: pytest.MonkeyPatch):
    p = at_a_saddle(monkeypatch, 10, 10)
    assert p.kind == "saddle of index 3"
    assert math.isnan(p.gap)
    assert math.isinf(p.radius)
    assert not p.certified
    assert "no gap" in p.reason
    assert "nan" not in {name: told for name, _, told in p.rows()}["f"]


def test_a_minimum_of_a_large_hessian_is_proved_by_factorisations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(critical, "EXACT_UP_TO", 10)
    values = torch.linspace(0.5, 3, 20, dtype=DOUBLE)
    F = FunctionLandscape(20, lambda x: values @ x**2 / 2)
    p = certify(F, torch.zeros(20, dtype=DOUBLE), lipschitz=1.0)
    assert (p.kind, p.certified, p.index.method) == ("minimum", True, "inertia")
    assert p.gap <= 0.5


def test_index_0_is_looked_for_as_a_minimum_is():
    start = tensor(0.1, 0.3)
    p, q = (critical_point(double_well(), start, target=target) for target in (0, "minimum"))
    assert torch.equal(p.theta, q.theta)


# ---------------------------------------------------------------------------------------------
# Which points are the same


def test_points_without_a_third_derivative_do_not_swallow_others():
    points = critical_points(FunctionLandscape(1, lambda x: -x[0].cos()), LINE)
    found = sorted(float(point.theta) for point in points)
    assert all(abs(x - math.pi * round(x / math.pi)) < 1e-9 for x in found)
    assert {-2, -1, 0, 1, 2} <= {round(x / (2 * math.pi), 6) for x in found}
    assert len(found) == len({round(x, 6) for x in found})


def test_no_point_is_returned_twice_whatever_the_constant():
    F = FunctionLandscape(1, lambda x: ((x[0] / 1e-10) ** 2 - 1) ** 2)
    starts = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    points = critical_points(F, 1e-10 * starts, lipschitz=1e45)  # far too large for h <= 1/2
    assert len(points) == len({round(float(p.theta) * 1e10, 3) for p in points})


def test_starts_out_of_the_domain_do_not_end_a_search():
    F = FunctionLandscape(2, lambda x: x[0] - x[0].log() + x[1] + 1 / x[1].sqrt())
    starts = tensor(2, 1, -1, 1, 1, -2, 0, 1, 0.5, 0.5).view(5, 2)
    (point,) = critical_points(F, starts)
    assert point.theta.tolist() == pytest.approx([1, 0.5 ** (2 / 3)])
    with pytest.raises(InputError, match="finite"):
        critical_points(F, torch.full((1, 2), math.nan))


def test_a_morse_check_counts_critical_points_only_and_each_once():
    F = double_well()
    low, left = (critical_point(F, tensor(x, 0.1), lipschitz=60.0) for x in (1.1, -1.1))
    top = critical_point(F, tensor(0.1, 0.1), target=1, lipschitz=60.0)
    assert morse_check(point for point in (low, left, top)).complete
    for wrong in (
        critical_point(F, tensor(0.8, 0.5), max_gradients=1),
        critical_point(gradient_flat(), tensor(0.3, 0.2), target="nearest"),
    ):
        with pytest.raises(InputError, match=wrong.kind):
            morse_check([wrong])
    with pytest.raises(InputError, match="the same"):
        morse_check([low, low, top])


# ---------------------------------------------------------------------------------------------
# Functions and points


def test_a_function_in_float32_has_another_floor():
    F = FunctionLandscape(2, lambda x: ((x.float() - 0.1) ** 2).sum())
    with pytest.raises(InputError, match="float64"):
        critical_point(F, tensor(0.3, 0.4), lipschitz=0.0)


@pytest.mark.parametrize("f", [lambda x: tensor(3)[0], lambda x: (x.detach() ** 2).sum()])
def test_a_function_without_a_graph_is_refused(f: object):
    with pytest.raises(InputError, match="does not depend on theta"):
        critical_point(FunctionLandscape(2, f), tensor(0.3, 0.4))


def test_a_function_that_writes_into_its_argument_does_not_move_the_point():
    F = FunctionLandscape(1, lambda x: x.sub_(1).square().sum())
    theta = tensor(3)
    assert F.value(theta) == 4
    assert theta == 3
    assert critical_point(F, theta).theta == 1
    assert [float(p.theta) for p in critical_points(F, LINE)] == [1.0]


def test_a_function_that_vmap_cannot_take_is_refused():
    F = FunctionLandscape(1, lambda x: x[0] ** 2 if x[0] > 0 else 2 * x[0] ** 2)
    with pytest.raises(InputError, match="vmap"):
        critical_points(F, LINE)


@pytest.mark.parametrize("find", [certify, critical_point])
def test_points_that_are_none(find: object):
    F = double_well()
    for theta in (tensor(1, 2, 3), tensor(1, 2)[None], torch.tensor([1j, 2]), "ab", None):
        with pytest.raises(InputError, match="theta must"):
            find(F, theta)
    with pytest.raises(InputError, match="finite"):
        find(F, tensor(math.nan, 1))
    for theta in ([1.0, 0.0], torch.tensor([1, 0]), tensor(1, 0).float().requires_grad_()):
        p = find(F, theta, lipschitz=60.0)
        assert p.certified
        assert p.theta.dtype == DOUBLE
        assert not p.theta.requires_grad
    with pytest.raises(InputError, match="at least 1"):
        FunctionLandscape(0, lambda x: x.sum())


# ---------------------------------------------------------------------------------------------
# Symmetries that are none


def shared() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def tied() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    net[4].weight = net[0].weight
    return net


def hooked() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    net[1].register_forward_hook(lambda module, args, out: out + torch.arange(3).to(out))
    return net


def tokens() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    )


@pytest.mark.parametrize("network", [shared, tied, hooked, tokens])
def test_exchanges_that_change_f_are_refused(network: object):
    torch.manual_seed(0)
    data = torch.randn(20, 4), torch.randint(3, (20,))
    F = NetworkLandscape(network(), nn.CrossEntropyLoss(), data, l2=0.02)
    with pytest.raises(InputError, match=r"changes f|read off"):
        symmetries(F)


# ---------------------------------------------------------------------------------------------
# Kinks without a name


def test_a_jump_of_the_gradient_is_no_round_off():
    F = FunctionLandscape(1, lambda x: torch.where(x > 0, x, -x).sum() + x[0] ** 2)
    p = certify(F, tensor(0), lipschitz=0.0)
    assert (p.kind, p.certified) == ("kink", False)
    assert "jumps" in p.reason


# ---------------------------------------------------------------------------------------------
# Steps without all eigenpairs


def test_steps_by_krylov_methods_lead_to_the_index_that_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
):
    values = torch.cat([tensor(-2, -1.5, -0.5), torch.linspace(0.7, 3, 17, dtype=DOUBLE)])
    F = FunctionLandscape(20, lambda x: values @ x**2 / 2 + (x**4).sum() / 40 + 0.1 * x.sum())
    start = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    monkeypatch.setattr(steps, "DENSE_UP_TO", 10)
    for k in (1, 2, 3):
        assert critical_point(F, start, target=k).kind == f"saddle of index {k}"


def test_steps_by_krylov_methods_are_those_from_all_eigenpairs():
    values = torch.cat([tensor(-2, -1.5, -0.5), torch.linspace(0.7, 3, 17, dtype=DOUBLE)])
    H = FunctionLandscape(20, lambda x: values @ x**2 / 2).hessian(torch.zeros(20, dtype=DOUBLE))
    g = torch.linspace(-1, 1, 20, dtype=DOUBLE)
    for k in (None, 3):
        p = steps.DenseCurvature(H).towards(g, k, 100.0)
        q = steps.IterativeCurvature(H, 4).towards(g, k, 100.0)
        assert torch.allclose(p, q, atol=1e-3)
