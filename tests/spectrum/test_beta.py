"""Dimensions from the share that Gaussian vectors have in a subspace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, chi2

from hvpspec import InputError
from hvpspec.spectrum.beta import beta_interval

ETA = 0.05


@given(st.integers(1, 10), st.integers(2, 60), st.floats(0, 1), st.floats(0, 1))
def test_the_bounds_are_what_they_are_defined_as(s: int, n: int, upper: float, part: float) -> None:
    lower = part * upper
    inner = range(1, n)
    fits_low = [r for r in inner if beta.sf(lower, s * r / 2, s * (n - r) / 2) > ETA / 2]
    fits_high = [r for r in inner if beta.cdf(upper, s * r / 2, s * (n - r) / 2) > ETA / 2]
    # r = 0 and r = n are certain of 0 and 1; within round-off of these they remain possible.
    least = 0 if 1 - lower >= 1 - 1e-12 else min(fits_low, default=n)
    most = n if upper >= 1 - 1e-12 else max(fits_high, default=0)
    assert beta_interval(lower, upper, s, ETA, n) == (min(least, most), max(least, most))


@pytest.mark.parametrize("s", [1, 3, 10])
@pytest.mark.parametrize(
    ("n", "r"), [(1, 0), (1, 1), (30, 0), (30, 1), (30, 12), (30, 29), (30, 30)]
)
def test_coverage(n: int, r: int, s: int) -> None:
    trials = 2000
    generator = torch.Generator().manual_seed(1000 * s + r)
    squares = torch.randn(trials, s, n, dtype=torch.float64, generator=generator) ** 2
    shares = squares[:, :, :r].sum((1, 2)) / squares.sum((1, 2))
    allowed = trials * ETA + 4 * (trials * ETA * (1 - ETA)) ** 0.5  # 4 sigma of the binomial law
    bounds = [beta_interval(x, x, s, ETA, n) for x in shares.tolist()]
    assert sum(not low <= r <= high for low, high in bounds) <= allowed


def test_in_a_large_space_the_law_is_chi_squared() -> None:
    """The numbers on the page on the certificate: what one and eight probes have to reach."""
    n, eta = 10**6, 0.01
    for s, quantile in ((1, 3.9e-5), (8, 1.3)):
        assert chi2.ppf(eta / 2, s) == pytest.approx(quantile, rel=0.05)
        for factor, most in ((0.95, 0), (1.05, 1)):
            share = factor * float(chi2.ppf(eta / 2, s)) / (s * n)
            assert beta_interval(0.0, share, s, eta, n) == (0, most)


@given(st.integers(1, 8), st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_shares_are_mirrored(s: int, n: int, a: float, b: float) -> None:
    # Shares whose complements are exact, so that the two sides see the same numbers.
    lower, upper = sorted((round(a * 1024) / 1024, round(b * 1024) / 1024))
    low, high = beta_interval(lower, upper, s, ETA, n)
    assert beta_interval(1 - upper, 1 - lower, s, ETA, n) == (n - high, n - low)


@pytest.mark.parametrize("n", [1, 50, 10**7])
def test_edges(n: int) -> None:
    assert beta_interval(0.0, 0.0, 3, ETA, n) == (0, 0)
    assert beta_interval(1.0, 1.0, 3, ETA, n) == (n, n)
    assert beta_interval(0.0, 1.0, 3, ETA, n) == (0, n)
    assert beta_interval(0.0, 1 - 1e-16, 3, ETA, n) == (0, n)
    assert beta_interval(0.0, 1.0, 3, ETA, 0) == (0, 0)


@pytest.mark.parametrize(("s", "eta"), [(1, 1e-3), (10, 1e-9)])
def test_a_larger_share_never_means_fewer(s: int, eta: float) -> None:
    shares = torch.logspace(-9, -0.01, 60).tolist()
    bounds = [beta_interval(x, x, s, eta, 500) for x in shares]
    assert bounds == sorted(bounds)
    assert [high for _, high in bounds] == sorted(high for _, high in bounds)
    for x in shares[40:]:  # where no bounds cross: more confidence, wider intervals
        low, high = beta_interval(x, x, s, eta, 500)
        inner_low, inner_high = beta_interval(x, x, s, 10 * eta, 500)
        assert low <= inner_low
        assert inner_high <= high


def test_crossing_bounds_are_put_in_order() -> None:
    """A share that neither r = 1 nor r = 2 of 10 would give with 1000 probes."""
    assert beta_interval(0.15, 0.15, 1000, ETA, 10) == (1, 2)
    assert beta_interval(0.5, 0.5 - 1e-16, 3, ETA, 10) == beta_interval(0.5, 0.5, 3, ETA, 10)


@pytest.mark.parametrize("n", [1, 128, 10**6])
def test_round_off_of_a_share_is_that_of_one(n: int) -> None:
    assert beta_interval(-0.9e-12, -0.9e-12, 3, ETA, n) == (0, 0)
    assert beta_interval(0.0, -0.9e-12, 3, ETA, n) == (0, 0)
    with pytest.raises(InputError, match="0 <= lower <= upper"):
        beta_interval(0.0, -1.1e-12, 3, ETA, n)


def test_errors() -> None:
    for lower, upper in ((0.5, 0.2), (-0.1, 0.5), (math.nan, 0.5), (0.1, math.nan)):
        with pytest.raises(InputError, match="0 <= lower <= upper"):
            beta_interval(lower, upper, 3, ETA, 10)
    with pytest.raises(InputError, match="num_probes must be at least 1, got 0"):
        beta_interval(0.1, 0.2, 0, ETA, 10)
    with pytest.raises(InputError, match="eta must lie between 0 and 1, got 1"):
        beta_interval(0.1, 0.2, 3, 1.0, 10)
    with pytest.raises(InputError, match=r"at most 1, got 1\.5"):
        beta_interval(0.1, 1.5, 3, ETA, 10)
