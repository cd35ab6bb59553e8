"""Critical points of functions for which all of them are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hvpspec.errors import InputError, NonFiniteError
from hvpspec.landscape import FunctionLandscape, certify, critical_point
from tests.landscape.functions import (
    deep_linear,
    factorisation,
    gradient_flat,
    monkey,
    muller_brown,
    tensor,
    two_factors,
    two_units,
)

MINIMA = (-146.69951720995402, -108.16672411685235, -80.76781812965903)
SADDLES = (-72.24894011232522, -40.664843508657405)


@pytest.mark.parametrize(
    ("start", "target", "value"),
    [
        ((-0.5, 1.4), "minimum", MINIMA[0]),
        ((0.6, 0.0), "minimum", MINIMA[1]),
        ((-0.1, 0.5), "minimum", MINIMA[2]),
        ((0.2, 0.3), 1, SADDLES[0]),
        ((-0.8, 0.6), 1, SADDLES[1]),
        ((0.2, 0.3), "nearest", SADDLES[0]),
    ],
)
def test_the_points_of_muller_and_brown(start: tuple[float, float], target: str, value: float):
    # The third derivatives of f stay below 1e5 in [-2, 2]^2; K = 1e6 is proved with room.
    p = critical_point(muller_brown(), tensor(*start), target=target, lipschitz=1e6)
    assert abs(p.value - value) < 1e-10
    assert p.certified
    assert p.reason == ""
    assert p.kind == ("minimum" if value in MINIMA else "saddle of index 1")
    assert p.gradient_norm <= p.gradient_floor + 1e-12
    assert p.radius < 1e-12
    assert p.value_error < 1e-10


@pytest.mark.parametrize("lam", [0.05, 0.2])
def test_the_chain_of_two_factors(lam: float):
    F = two_factors(lam)
    low = critical_point(F, tensor(1.0, 0.7), lipschitz=20.0)
    assert abs(low.value - 2 * lam * (1 - lam)) < 1e-12
    assert torch.allclose(low.index.eigenvalues, tensor(*sorted((4 * lam, 2 - 4 * lam))))
    assert low.certified
    saddle = critical_point(F, torch.zeros(2), target="nearest", lipschitz=20.0)
    assert saddle.value == 0.5
    assert saddle.kind == "saddle of index 1"
    assert torch.allclose(saddle.index.eigenvalues, tensor(2 * lam - 1, 2 * lam + 1))


def test_a_curve_of_minima_is_degenerate():
    p = critical_point(two_factors(0.0), tensor(2.0, 0.7), lipschitz=20.0)
    assert p.kind == "degenerate"
    assert not p.certified
    assert "tilt" in p.reason


def test_an_exact_saddle_never_passes_for_a_minimum():
    p = critical_point(two_factors(0.1), torch.zeros(2), lipschitz=20.0)
    assert p.kind == "minimum"
    assert abs(p.value - 0.18) < 1e-12


def test_a_monkey_saddle_is_degenerate():
    p = critical_point(monkey(), torch.zeros(2), target="nearest", lipschitz=30.0)
    assert p.kind == "degenerate"
    assert p.gap == 0


@pytest.mark.parametrize("start", [(0.3, 0.5), (-1.0, 0.2), (2.0, -3.0)])
def test_a_flat_gradient_is_no_critical_point(start: tuple[float, float]):
    p = critical_point(gradient_flat(), tensor(*start), target="nearest")
    assert p.kind == "gradient-flat"
    assert abs(p.gradient_norm - 1) < 1e-6
    assert not p.certified


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_critical_points_of_a_factorisation(n: int):
    eigenvalues = torch.arange(n, 0, -1, dtype=torch.float64)
    for r in range(1, n + 1):
        F = factorisation(torch.diag(eigenvalues), r)
        for s in range(r + 1):
            for S in itertools.combinations(range(n), s):
                U = torch.zeros(n, r, dtype=torch.float64)
                for column, i in enumerate(S):
                    U[i, column] = eigenvalues[i].sqrt()
                p = certify(F, U.flatten(), lipschitz=1e3)
                others = [i for i in range(n) if i not in S]
                index = sum(bool(eigenvalues[i] > eigenvalues[j]) for i in others for j in S)
                index += (r - s) * len(others)
                nullity = s * (s - 1) // 2 + s * (r - s)
                assert p.index.lower == p.index.upper == index
                assert p.index.nullity == nullity
                assert (p.kind == "degenerate") == (nullity > 0)
                assert p.certified == (nullity == 0)


def test_isotropic_l2_leaves_a_rotation_degenerate():
    p = critical_point(factorisation(torch.diag(tensor(3, 2, 1)), 2, lam=0.1), tensor(*range(1, 7)))
    assert p.kind == "degenerate"
    assert p.index.nullity == 1


@pytest.mark.parametrize(("dy", "dx", "h"), [(2, 3, 2), (3, 3, 2), (3, 2, 4)])
def test_the_origin_of_a_deep_linear_network(dy: int, dx: int, h: int):
    generator = torch.Generator().manual_seed(dy + h)
    M = torch.randn(dy, dx, generator=generator, dtype=torch.float64)
    rank = min(dy, dx)
    p = certify(deep_linear(M, h), torch.zeros(dy * h + h * dx, dtype=torch.float64))
    assert p.index.lower == h * rank
    assert p.index.nullity == h * (dx + dy - 2 * rank)


def test_two_units():
    generator = torch.Generator().manual_seed(0)
    F, start = two_units(), torch.randn(4, generator=generator, dtype=torch.float64)
    low = critical_point(F, start, lipschitz=100.0)
    assert abs(low.value - 0.222822931967685) < 1e-12
    saddle = critical_point(F, start, target=1, lipschitz=100.0)
    assert abs(saddle.value - 0.2235121959369742) < 1e-12
    top = critical_point(F, 0.1 * start, target=2, lipschitz=100.0)
    assert top.value == 0.25
    assert low.certified
    assert saddle.certified
    assert top.certified
    assert (low.index.index, saddle.index.index, top.index.index) == (0, 1, 2)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_scale_of_f_does_not_matter(scale: float):
    F = FunctionLandscape(2, lambda p: scale * ((p[0] ** 2 - 1) ** 2 + p[1] ** 2))
    p = critical_point(F, tensor(0.3, 2.0), lipschitz=48 * scale)
    assert p.certified
    assert p.kind == "minimum"
    assert torch.allclose(p.theta.abs(), tensor(1, 0), atol=1e-12)


def test_no_radius_is_below_the_true_error():
    """Points around known ones: where a proof succeeds, the true point is in the ball."""
    F, generator = two_factors(0.1), torch.Generator().manual_seed(0)
    true = {0: tensor(1, 1) * math.sqrt(0.8), 1: tensor(0, 0)}
    proved = 0
    for k in range(1000):
        index = k % 2
        noise = 10 ** (-4 * torch.rand(1, generator=generator, dtype=torch.float64))
        direction = torch.randn(2, generator=generator, dtype=torch.float64)
        theta = true[index] + 0.3 * noise * direction
        # |D^3 f| is at most 6 |(a, b)| <= 12 in the ball of radius 2, where all starts are.
        p = certify(F, theta, lipschitz=12.0)
        if p.h <= 0.5:
            proved += 1
            assert torch.linalg.vector_norm(theta - true[index]) <= p.radius
            assert p.index.index == index
            assert abs(F.value(theta) - F.value(true[index])) <= p.value_error
    assert proved > 500


@pytest.mark.parametrize(
    ("theta", "options", "message"),
    [
        ((1.0, 2.0, 3.0), {}, "theta must have shape (2,), got (3,)"),
        ((1.0, math.nan), {}, "theta contains NaN or infinity"),
        ((1.0, 1.0), {"target": "maximum"}, "target must be 'minimum', 'nearest' or an index"),
        ((1.0, 1.0), {"target": 3}, "an index from 0 to 2, got 3"),
        ((1.0, 1.0), {"lipschitz": "guess"}, "lipschitz must be 'proved', 'estimated' or a number"),
        ((1.0, 1.0), {"lipschitz": -1.0}, "a number of at least 0, got -1.0"),
    ],
)
def test_bad_input(theta: tuple[float, ...], options: dict[str, object], message: str):
    with pytest.raises(InputError) as caught:
        critical_point(two_factors(0.1), tensor(*theta), **options)
    assert message in str(caught.value)


def test_a_function_that_is_not_finite():
    F = FunctionLandscape(1, lambda p: p.log().sum())
    with pytest.raises(NonFiniteError, match="f is nan at a point"):
        critical_point(F, tensor(-1.0))


def test_a_function_of_several_numbers():
    F = FunctionLandscape(2, lambda p: p * 2)
    with pytest.raises(InputError, match="must return one number"):
        F.value(tensor(1, 2))


def test_stacks_of_points_give_what_single_points_give():
    F, points = two_units(), torch.randn(5, 4, dtype=torch.float64)

    def stacked(of: list[Tensor]) -> Tensor:
        return torch.stack(of)

    assert torch.allclose(F.values(points), tensor(*(F.value(p) for p in points)))
    assert torch.allclose(F.gradients(points), stacked([F.gradient(p) for p in points]))
    assert torch.allclose(F.hessians(points), stacked([F.hessian(p).to_dense() for p in points]))


def test_a_result_prints_and_is_plain_data():
    p = critical_point(two_factors(0.1), tensor(1, 0.5), lipschitz=20.0)
    assert repr(p).startswith("CriticalPoint(kind='minimum', value=0.18")
    assert "proved" in p.summary()
    assert p.to_dict()["certified"] is True
    assert p.to_dict()["format"] == "hvpspec-critical-point"
