"""Ways down that leave saddles, and degenerate points by their third derivative."""

from __future__ import annotations

import math

import pytest
import torch

from hvpspec.errors import InputError
from hvpspec.landscape import lower_index
from tests.landscape.functions import deep_linear, monkey, tensor, two_factors


def test_an_exact_saddle_is_left():
    way = lower_index(two_factors(0.1), torch.zeros(2), lipschitz=20.0)
    assert way.end.kind == "minimum"
    assert way.end.certified
    assert abs(float(way.values[-1]) - 0.18) < 1e-12
    assert way.indices[0].tolist() == [1, 1, 1]
    assert way.indices[-1].tolist() == [0, 0, 0]


def test_a_monkey_saddle_is_left_to_third_order_only():
    stays = lower_index(monkey(), torch.zeros(2))
    assert stays.end.kind == "degenerate"
    assert len(stays.points) == 1
    way = lower_index(monkey(), torch.zeros(2), order=3, lipschitz=40.0)
    assert way.end.kind == "minimum"
    assert abs(way.end.value + 27 / 256) < 1e-12
    assert abs(float(way.end.theta.norm()) - 0.75) < 1e-9
    angle = math.degrees(math.atan2(way.end.theta[1], way.end.theta[0])) % 120
    assert abs(angle - 60) < 1e-6
    assert torch.allclose(way.end.index.eigenvalues, tensor(2.25, 6.75))


def test_the_third_derivative_of_a_monkey_saddle():
    # A minimum ends the way, and has no null space; the measure is that of the last look.
    way = lower_index(monkey(), torch.zeros(2), order=3)
    assert way.third_order == 0
    assert bool((way.values[1:] <= way.values[:-1]).all())


def test_a_chain_of_three_linear_layers_is_left():
    # At 0 the Hessian of (a b c - 1)^2 / 2 vanishes, and D^3 f does not.
    from hvpspec.landscape import FunctionLandscape

    F = FunctionLandscape(3, lambda p: (p.prod() - 1) ** 2 / 2)
    way = lower_index(F, torch.zeros(3), order=3)
    assert float(way.values[-1]) < 1e-12


def test_a_linear_network_goes_to_its_minimum():
    M = torch.diag(tensor(2, 1))
    way = lower_index(deep_linear(M, 2), torch.zeros(8))
    assert float(way.values[-1]) < 1e-12
    assert bool((way.values[1:] <= way.values[:-1]).all())


def test_an_order_that_does_not_exist():
    with pytest.raises(InputError, match="order must be 2 or 3, got 4"):
        lower_index(two_factors(0.1), torch.zeros(2), order=4)
