"""The bulk, its outliers and gaps, on spectra in which they are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvpspec.spectrum.bulk import Outlier, Outliers, split_eigenvalues
from hvpspec.spectrum.measure import spectral_measure
from tests.linalg.test_dense import HOSTILE, rotated


def semicircle(n: int, seed: int = 0) -> Tensor:
    """Eigenvalues of a random symmetric matrix, about [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return torch.linalg.eigvalsh((M + M.T) / (8 * n) ** 0.5)


def outliers(A: Tensor, num_steps: int = 60, seed: int = 1) -> Outliers:
    generator = torch.Generator().manual_seed(seed)
    return spectral_measure(A, 8, num_steps, generator=generator).outliers()


def values(found: tuple[Outlier, ...]) -> list[float]:
    return [outlier.value for outlier in found]


BULK = semicircle(160)
FAR = torch.tensor([-2.0, 1.5, 2.5, 2.5, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_steps", [15, 50, 90])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_known_outliers_are_found(dtype: torch.dtype, num_steps: int, seed: int) -> None:
    """Before and after round-off lets the second copy of 2.5 turn up, by 17 to 40 steps.

    On its way from the bulk it is neither here nor there: in float32 at 17 steps.
    """
    A = rotated(torch.cat([BULK, FAR])).to(dtype)
    found = outliers(A, num_steps, seed)
    for seen, true in ((found.bottom, [-2.0]), (found.top, [1.5, 2.5, 4.0])):
        assert len(seen) == len(true)
        for outlier, value in zip(seen, true, strict=True):
            # Rotating costs some u ||A|| of the matrix's own.
            noise = 100 * torch.finfo(dtype).eps * 4
            assert abs(outlier.value - value) <= outlier.residual + noise
    low, high = found.bulk
    assert low == pytest.approx(float(BULK[0]), abs=0.05)
    assert high == pytest.approx(float(BULK[-1]), abs=0.05)
    assert found.gap_below == pytest.approx(low + 2, abs=1e-3)
    assert found.gap_above == pytest.approx(1.5 - high, abs=1e-3)


def test_multiplicity_is_estimated() -> None:
    true = torch.cat([torch.linspace(-1, 1, 100), torch.full((12,), 5.0), torch.full((4,), 7.0)])
    generator = torch.Generator().manual_seed(0)
    found = spectral_measure(rotated(true), 20, 14, generator=generator).outliers()
    assert values(found.top) == pytest.approx([5.0, 7.0])
    for outlier, count in zip(found.top, (12, 4), strict=True):
        # 4 sigma of chi-squared with 20 * count degrees, over 20.
        assert abs(outlier.multiplicity - count) < 4 * (2 * count / 20) ** 0.5


@pytest.mark.parametrize(
    ("spectrum", "num_steps"),
    [
        (semicircle(200), 60),
        (semicircle(120), 120),
        (semicircle(60, 1), 60),
        (torch.linspace(0, 1, 200), 60),
        (torch.linspace(0, 1, 30), 30),
        (-torch.arange(1.0, 9.0), 8),
        (torch.tensor([-1.0] * 20 + [1.0] * 20), 10),
        (torch.zeros(5), 5),
        (torch.ones(7) * 3, 7),
        (torch.tensor([-3.0]), 1),
    ],
)
def test_none_where_there_are_none(spectrum: Tensor, num_steps: int) -> None:
    found = outliers(rotated(spectrum), num_steps)
    assert found.bottom == ()
    assert found.top == ()
    assert found.gap_below is None
    assert found.gap_above is None
    assert found.bulk == pytest.approx(
        (float(spectrum.min()), float(spectrum.max())), abs=0.05 * float(spectrum.abs().max())
    )


def test_rank_one_is_an_outlier_of_zero() -> None:
    found = outliers(rotated(HOSTILE["rank one"]))
    assert found.bottom == ()
    assert values(found.top) == pytest.approx([2.0])
    assert found.bulk == pytest.approx((0.0, 0.0), abs=1e-14)
    assert found.gap_above == pytest.approx(2.0)


def test_an_exact_null_space_does_not_make_the_tail_outliers() -> None:
    """Most eigenvalues 0, a tail over decades, and nine far off: only the latter are isolated."""
    tail = torch.logspace(-6, -1, 50)
    spectrum = torch.cat([torch.zeros(150), tail, torch.linspace(1, 7, 9)])
    found = outliers(rotated(spectrum), 60)
    assert values(found.top) == pytest.approx(torch.linspace(1, 7, 9).tolist())
    assert found.bulk == pytest.approx((0.0, 0.1), abs=1e-6)


def test_a_barely_run_lanczos_resolves_nothing() -> None:
    found = outliers(rotated(torch.cat([BULK, FAR])), 3)
    assert found.top == ()
    assert found.bottom == ()


@pytest.mark.parametrize("factor", [1e-8, 1e8, -1.0])
def test_scaling_scales_and_negation_mirrors(factor: float) -> None:
    A = rotated(torch.cat([BULK, FAR]))
    found, scaled = outliers(A), outliers(A * factor)
    if factor < 0:  # the same coefficients but for the sign, of which LAPACK makes other round-off
        assert values(scaled.top) == pytest.approx([-x for x in reversed(values(found.bottom))])
        assert values(scaled.bottom) == pytest.approx([-x for x in reversed(values(found.top))])
        assert scaled.bulk == pytest.approx((-found.bulk[1], -found.bulk[0]))
        assert scaled.gap_below == pytest.approx(found.gap_above)
        assert scaled.gap_above == pytest.approx(found.gap_below)
    else:
        for one, other in ((found.top, scaled.top), (found.bottom, scaled.bottom)):
            assert values(other) == pytest.approx([factor * x for x in values(one)], rel=1e-12)
        assert scaled.bulk == pytest.approx([factor * x for x in found.bulk], rel=1e-6)


def test_the_gap_can_be_chosen() -> None:
    A = rotated(torch.cat([BULK, FAR]))
    measure = spectral_measure(A, 8, 60, generator=torch.Generator().manual_seed(0))
    # Gaps are 0.25 (below 1.5), 0.4, 0.43 and 0.5 (below -2) of the width of what they bound.
    assert values(measure.outliers(min_gap=0.3).top) == pytest.approx([2.5, 4.0])
    assert measure.outliers(min_gap=2.0).top == ()


def test_of_known_eigenvalues_the_ends_come_apart_from_the_bulk() -> None:
    bulk = torch.linspace(-1, 1, 101, dtype=torch.float64)
    outliers = torch.tensor([-9.0, 4.0, 4.0 + 1e-12, 7.0], dtype=torch.float64)
    found = split_eigenvalues(torch.cat([bulk, outliers]).flip(0), noise_floor=1e-10)
    assert found.bulk == (-1, 1)
    assert [outlier.value for outlier in found.bottom] == [-9]
    assert [outlier.value for outlier in found.top] == pytest.approx([4, 7])
    assert [outlier.multiplicity for outlier in found.top] == pytest.approx([2, 1])
    assert {outlier.residual for outlier in (*found.bottom, *found.top)} == {1e-10}
    assert (found.gap_below, found.gap_above) == (pytest.approx(8), pytest.approx(3))


def test_of_known_eigenvalues_an_exact_null_space_is_within_the_bulk() -> None:
    tail = torch.linspace(0.005, 1, 200, dtype=torch.float64)
    found = split_eigenvalues(torch.cat([torch.zeros(950).double(), tail]), noise_floor=1e-12)
    assert (found.bulk, found.bottom, found.top) == ((0, 1), (), ())
    nothing = split_eigenvalues(torch.zeros(4), noise_floor=0.0)
    assert (nothing.bulk, nothing.bottom, nothing.top) == ((0, 0), (), ())
