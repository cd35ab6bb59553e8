"""All critical points of small functions, and the Morse inequalities."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hvpspec.errors import InputError
from hvpspec.landscape import certify, critical_points, morse_check
from tests.landscape.functions import (
    factorisation,
    monkey,
    muller_brown,
    tensor,
    two_units,
    xor,
    xor_images,
)


def starts(s: int, n: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(s, n, generator=generator, dtype=torch.float64)


def test_the_five_points_of_muller_and_brown():
    centre = tensor(-0.2, 0.7)
    found = critical_points(muller_brown(), centre + starts(400, 2, 0.6), lipschitz=1e6)
    inside = [p for p in found if p.value < 0]
    values = [-146.69951720995402, -108.16672411685235, -80.76781812965903,
              -72.24894011232522, -40.664843508657405]  # fmt: skip
    assert [round(p.value, 9) for p in inside] == [round(v, 9) for v in values]
    assert [p.index.index for p in inside] == [0, 0, 0, 1, 1]
    assert all(p.certified for p in inside)


def test_the_points_of_a_rank_one_factorisation():
    M = torch.diag(tensor(4, 3, 2, 1))
    found = critical_points(factorisation(M, 1), starts(600, 4, 2.0), lipschitz=60.0)
    counts = Counter((round(p.value, 10), p.index.index) for p in found)
    assert counts == {(3.5, 0): 2, (5.25, 1): 2, (6.5, 2): 2, (7.25, 3): 2, (7.5, 4): 1}
    assert morse_check(found).counts == (2, 2, 2, 2, 1)
    assert morse_check(found).complete


def test_the_points_of_two_units():
    found = critical_points(two_units(), starts(300, 4, 1.5), lipschitz=100.0)
    counts = Counter((round(p.value, 12), p.index.index) for p in found)
    assert counts == {(0.222822931968, 0): 4, (0.223512195937, 1): 4, (0.25, 2): 1}
    assert morse_check(found).euler_sum == 1


@pytest.mark.parametrize(("lam", "counts"), [(0.05, (1,)), (0.02, (9, 8))])
def test_the_points_of_xor_with_one_unit(lam: float, counts: tuple[int, ...]):
    found = critical_points(xor(1, lam), starts(400, 5, 2.0), lipschitz=20.0)
    assert morse_check(found).counts == counts
    assert all(p.certified for p in found)


def test_the_225_points_of_xor_with_two_units():
    begin = xor_images(starts(100, 9, 3.0))
    found = critical_points(xor(2, 0.02), begin, lipschitz=20.0)
    counts = Counter((round(p.value, 8), p.index.index) for p in found)
    assert counts == {
        (0.55790025, 0): 16, (0.64850105, 0): 32, (0.69314718, 0): 1,
        (0.66235250, 1): 64, (0.67194245, 1): 16, (0.69590150, 1): 16, (0.69978048, 1): 16,
        (0.69717364, 2): 16, (0.69830533, 2): 32, (0.70157784, 2): 16,
    }  # fmt: skip
    check = morse_check(found)
    assert check.counts == (49, 112, 64)
    assert check.euler_sum == 1
    assert check.complete


def test_a_highest_index():
    found = critical_points(two_units(), starts(300, 4, 1.5), max_index=1, lipschitz=100.0)
    assert {p.index.index for p in found} == {0, 1}


def test_missing_points_are_said():
    found = critical_points(two_units(), starts(300, 4, 1.5), lipschitz=100.0)
    minima = [p for p in found if p.kind == "minimum"]
    assert not morse_check(minima).complete
    assert "incomplete" in morse_check(minima).message
    saddles = [p for p in found if p.kind != "minimum"]
    assert not morse_check(saddles).complete
    assert not morse_check([]).complete


def test_degenerate_points_have_no_morse_inequalities():
    p = certify(monkey(), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(InputError, match="degenerate; add l2 or a tilt"):
        morse_check([p])


@pytest.mark.parametrize(
    ("begin", "options", "message"),
    [
        (torch.zeros(3), {}, "starts must have shape"),
        (torch.zeros(3, 5), {}, "starts must have shape"),
        (torch.zeros(3, 4), {"max_index": 9}, "max_index must be between 0 and 4"),
    ],
)
def test_bad_input(begin: torch.Tensor, options: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        critical_points(two_units(), begin, **options)
