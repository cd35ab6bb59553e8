"""Dimensions from the squared lengths of projected Gaussian vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, chi2

from hvpspec import InputError
from hvpspec.spectrum.chi_squared import beta_interval, chi_squared_interval

ETA = 0.05


@given(st.integers(1, 10), st.integers(1, 60), st.floats(0, 300), st.floats(0, 1))
def test_the_bounds_are_what_they_are_defined_as(s: int, n: int, upper: float, part: float) -> None:
    lower = part * upper
    fits_low = [r for r in range(1, n + 1) if chi2.sf(lower, s * r) > ETA / 2]
    fits_high = [r for r in range(1, n + 1) if chi2.cdf(upper, s * r) > ETA / 2]
    least = 0 if lower == 0 else min(fits_low, default=n)
    most = max(fits_high, default=0)
    expected = (min(least, most), max(least, most))
    assert chi_squared_interval(lower, upper, s, ETA, n) == expected


@given(st.integers(1, 10), st.integers(2, 60), st.floats(0, 1), st.floats(0, 1))
def test_shares_likewise(s: int, n: int, upper: float, part: float) -> None:
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
    inside = squares[:, :, :r].sum((1, 2))
    whole = squares.sum((1, 2))
    allowed = trials * ETA + 4 * (trials * ETA * (1 - ETA)) ** 0.5  # 4 sigma of the binomial law
    for interval, values in ((chi_squared_interval, inside), (beta_interval, inside / whole)):
        bounds = [interval(x, x, s, ETA, n) for x in values.tolist()]
        assert sum(not low <= r <= high for low, high in bounds) <= allowed


def test_shares_are_sharper_than_sums() -> None:
    """Where most of the space lies below, what is left out says more."""
    n, r, s = 1000, 900, 4
    low, high = chi_squared_interval(s * r, s * r, s, ETA, n)
    share_low, share_high = beta_interval(r / n, r / n, s, ETA, n)
    # Standard deviations are sqrt(2 r / s) and sqrt(2 r (1 - r / n) / s).
    assert high - low > 2.5 * (share_high - share_low)
    assert share_low <= r <= share_high


@given(st.integers(1, 8), st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_shares_are_mirrored(s: int, n: int, a: float, b: float) -> None:
    # Shares whose complements are exact, so that the two sides see the same numbers.
    lower, upper = sorted((round(a * 1024) / 1024, round(b * 1024) / 1024))
    low, high = beta_interval(lower, upper, s, ETA, n)
    assert beta_interval(1 - upper, 1 - lower, s, ETA, n) == (n - high, n - low)


@pytest.mark.parametrize("n", [1, 50, 10**7])
def test_edges(n: int) -> None:
    assert chi_squared_interval(0.0, 0.0, 3, ETA, n) == (0, 0)
    assert beta_interval(0.0, 0.0, 3, ETA, n) == (0, 0)
    assert beta_interval(1.0, 1.0, 3, ETA, n) == (n, n)
    assert beta_interval(0.0, 1.0, 3, ETA, n) == (0, n)
    assert beta_interval(0.0, 1 - 1e-16, 3, ETA, n) == (0, n)
    assert chi_squared_interval(0.0, 1e9, 3, ETA, n) == (0, n)
    assert chi_squared_interval(1e12, 1e12, 3, ETA, n) == (n, n)
    assert chi_squared_interval(1e-300, 1.0, 3, ETA, n)[0] == 1  # not even that of nothing
    assert chi_squared_interval(0.0, 5.0, 3, ETA, 0) == (0, 0)
    assert beta_interval(0.0, 1.0, 3, ETA, 0) == (0, 0)


@pytest.mark.parametrize(("s", "eta"), [(1, 1e-3), (10, 1e-9)])
def test_more_length_never_means_fewer(s: int, eta: float) -> None:
    sums = torch.logspace(-6, 4, 60).tolist()
    bounds = [chi_squared_interval(x, x, s, eta, 500) for x in sums]
    assert bounds == sorted(bounds)
    assert [high for _, high in bounds] == sorted(high for _, high in bounds)
    for x in sums[36:]:  # from 1 on, where no bounds cross: more confidence, wider intervals
        low, high = chi_squared_interval(x, x, s, eta, 500)
        inner_low, inner_high = chi_squared_interval(x, x, s, 10 * eta, 500)
        assert low <= inner_low
        assert inner_high <= high


def test_crossing_bounds_are_put_in_order() -> None:
    """A sum that neither r = 1 nor r = 2 would give with 1000 probes."""
    assert chi_squared_interval(1500.0, 1500.0, 1000, ETA, 10) == (1, 2)
    assert beta_interval(0.5, 0.5 - 1e-16, 3, ETA, 10) == beta_interval(0.5, 0.5, 3, ETA, 10)


@pytest.mark.parametrize("s", [1, 8])
@pytest.mark.parametrize("n", [1, 128, 10**6])
def test_round_off_of_the_sums_is_that_of_whole_lengths(n: int, s: int) -> None:
    """Sums are parts of ``s n`` and off by its round-off even where they vanish."""
    off = 0.9e-12 * s * n
    for x in (0.0, 1e-3 * s * n):
        exact = chi_squared_interval(x, x, s, ETA, n)
        low, high = chi_squared_interval(x, x - off, s, ETA, n)
        assert (low, high) == exact or x > 0
        assert low <= high
    assert chi_squared_interval(-off, -off, s, ETA, n) == (0, 0)
    with pytest.raises(InputError, match="0 <= lower <= upper"):
        chi_squared_interval(0.0, -1.2e-12 * s * n, s, ETA, n)


@pytest.mark.parametrize("interval", [chi_squared_interval, beta_interval])
def test_errors(interval: Callable[..., tuple[int, int]]) -> None:
    for lower, upper in ((0.5, 0.2), (-0.1, 0.5), (math.nan, 0.5), (0.1, math.nan)):
        with pytest.raises(InputError, match="0 <= lower <= upper"):
            interval(lower, upper, 3, ETA, 10)
    with pytest.raises(InputError, match="num_probes must be at least 1, got 0"):
        interval(0.1, 0.2, 0, ETA, 10)
    with pytest.raises(InputError, match="eta must lie between 0 and 1, got 1"):
        interval(0.1, 0.2, 3, 1.0, 10)
    with pytest.raises(InputError, match=r"at most 1, got 1\.5"):
        beta_interval(0.1, 1.5, 3, ETA, 10)
