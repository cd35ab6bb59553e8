"""Exact eigenvalues and inertia, on hostile matrices too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hvpspec
from hvpspec import ComputationError, DenseOperator, FunctionOperator, eigvalsh, inertia
from hvpspec.linalg.dense import assembly_error, spectral_norm


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues and a random eigenbasis."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    A = (Q * eigenvalues.double()) @ Q.T
    return (A + A.T) / 2


HOSTILE = {
    "one": torch.tensor([-3.0]),
    "zero": torch.zeros(6),
    "rank one": torch.tensor([0.0] * 8 + [2.0]),
    "repeated": torch.tensor([-1.0] * 4 + [2.0] * 5),
    "all negative": -torch.arange(1.0, 9.0),
    "wide": torch.tensor([-1e3, -1e-3, 1e-3, 1.0, 1e3]),
    "opposite": torch.tensor([-2.0, -1.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_spectra(name: str, scale: float) -> None:
    values = HOSTILE[name].double() * scale
    A = rotated(values)
    norm = float(values.abs().max())
    # Weyl, with LAPACK's backward error and that of making the matrix.
    torch.testing.assert_close(
        eigvalsh(A), values.sort().values, rtol=0, atol=10 * len(values) * 1.2e-16 * norm
    )
    for tau in (1e-5 * norm, 0.6 * norm):
        counts = inertia(A, tau)
        assert counts.negative == int((values < -tau).sum())
        assert counts.positive == int((values > tau).sum())
        assert counts.negative + counts.zero + counts.positive == len(values)


@given(
    st.lists(st.sampled_from([-4.0, -1.0, -0.25, 0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=25),
    st.sampled_from([0.1, 0.3, 0.75, 3.0]),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_inertia_counts_eigenvalues(values: list[float], tau: float, seed: int) -> None:
    A = rotated(torch.tensor(values), seed)
    counts = inertia(A, tau)
    assert counts.negative == sum(x < -tau for x in values)
    assert counts.positive == sum(x > tau for x in values)
    swapped = inertia(-A, tau)
    assert (swapped.negative, swapped.positive) == (counts.positive, counts.negative)


def test_inertia_without_resolution_counts_exact_zeros() -> None:
    A = torch.zeros(5, 5)
    A[0, 1] = A[1, 0] = 1.0  # eigenvalues -1 and 1 from one 2 x 2 pivot
    A[2, 2] = -2.0
    counts = inertia(A)
    assert (counts.negative, counts.zero, counts.positive) == (2, 2, 1)
    singular = torch.ones(3, 3)  # no zero row, but two zero pivots
    counts = inertia(singular)
    assert (counts.negative, counts.zero, counts.positive) == (0, 2, 1)


def test_zero_rows_are_exact_zero_eigenvalues() -> None:
    A = torch.zeros(7, 7, dtype=torch.float64)
    live = torch.tensor([1, 3, 6])
    A[live[:, None], live] = rotated(torch.tensor([-1.0, -2.0, 3.0]))
    assert eigvalsh(A).eq(0).sum() == 4
    assert inertia(A, 0.5).zero == 4


def test_float32_matrices_are_counted_in_float64() -> None:
    A = rotated(torch.linspace(-1, 1, 30)).float()
    torch.testing.assert_close(eigvalsh(A), torch.linalg.eigvalsh(A.double()))


def test_spectral_norm_is_close() -> None:
    for values in (*HOSTILE.values(), torch.linspace(-1, 1, 300)):
        norm = spectral_norm(rotated(values))
        assert 0.98 * values.abs().max() <= norm <= values.abs().max() * (1 + 1e-6)


def test_assembly_error_sees_the_round_off_of_products() -> None:
    A = rotated(torch.linspace(-1, 1, 60))
    noise = 1e-6 * rotated(torch.randn(60, generator=torch.Generator().manual_seed(0)), 1)
    noisy = FunctionOperator(60, lambda v: A @ v + noise @ v)
    error = assembly_error(noisy, A)
    norm = float(torch.linalg.matrix_norm(noise, 2))
    assert norm <= error <= 10 * norm


#: Powers of two, by which a matrix is multiplied exactly.
FAR = [-450, -300, -256, 256, 300, 450]


@pytest.mark.parametrize("exponent", FAR)
@pytest.mark.parametrize("name", HOSTILE)
def test_answers_scale_with_the_matrix(name: str, exponent: int) -> None:
    A, scale = rotated(HOSTILE[name]), 2.0**exponent
    scaled = A * scale
    before = scaled.clone()
    norm = float(HOSTILE[name].abs().max())
    # The backward error is that of two runs, since LAPACK scales far from 1 and not near it.
    torch.testing.assert_close(
        eigvalsh(scaled) / scale, eigvalsh(A), rtol=0, atol=10 * len(A) * 1.2e-16 * norm
    )
    for tau in (1e-5 * norm, 0.6 * norm):
        counts, expected = inertia(scaled, tau * scale), inertia(A, tau)
        assert (counts.negative, counts.zero) == (expected.negative, expected.zero)
        assert counts.tau == tau * scale
    for method in ("exact", "ldl"):
        result = hvpspec.index(scaled, method=method)  # type: ignore[arg-type]
        plain = hvpspec.index(A, method=method)  # type: ignore[arg-type]
        for field in ("index", "lower", "upper", "nullity", "positive", "certified"):
            assert getattr(result, field) == getattr(plain, field)
        assert result.norm / scale == pytest.approx(plain.norm, rel=0.02)
        assert result.noise_floor / scale == pytest.approx(plain.noise_floor, rel=0.1)
    assert torch.equal(scaled, before)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("power", [-135, 0, 135])
@pytest.mark.parametrize("n", [2, 3])
def test_counts_of_hilbert_matrices(n: int, power: int, sign: int) -> None:
    """Which are positive definite."""
    i = torch.arange(n, dtype=torch.float64)
    A = sign * (1 / (i[:, None] + i[None] + 1) * 10.0**power)
    right = n if sign == -1 else 0
    largest = float(A.abs().max())
    for operator in (A, FunctionOperator(n, lambda v: A @ v)):
        for method in ("exact", "ldl"):
            for tau in (None, 0.0, 1e-6 * largest):
                result = hvpspec.index(operator, tau, method=method)  # type: ignore[arg-type]
                assert result.index == right
    counts = inertia(A)
    assert (counts.negative, counts.zero) == (right, 0)


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e200, 1e308])
def test_matrices_out_of_range_are_refused_by_every_question(size: float) -> None:
    A = torch.tensor([[-1.0, 0.5], [0.5, 1.0]], dtype=torch.float64) * size
    for ask in (eigvalsh, inertia, hvpspec.index, lambda A: hvpspec.index(A, method="ldl")):
        with pytest.raises(ComputationError, match=r"out of range.*; scale the matrix"):
            ask(A)


def test_entries_that_overflow_are_refused() -> None:
    A = torch.full((2, 2), -1e308, dtype=torch.float64)
    with pytest.raises(ComputationError, match=r"out of range.*; scale the matrix"):
        eigvalsh(DenseOperator(A).shifted(-1e308))


def test_taus_far_from_the_matrix() -> None:
    A = torch.diag(torch.tensor([-1.0, 3.0, 0.0], dtype=torch.float64))
    assert inertia(A, 1e308).zero == 3
    assert inertia(A, 1e-310) == hvpspec.linalg.InertiaResult(1, 1, 1, 1e-310)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_symmetry_of_a_matrix_is_judged_by_its_largest_entry(dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    least = finfo.smallest_normal * finfo.eps
    for size in (least, 100 * least, finfo.smallest_normal, 1.0, finfo.max / 4, finfo.max):
        A = torch.tensor([[0.5, 1.0], [1.0, -0.25]], dtype=torch.float64) * size
        assert torch.equal(DenseOperator(A.to(dtype)).to_dense(), A.to(dtype))
        if size < 100 * least:
            continue
        for wrong in (-1.0, 0.0, 0.5):
            B = A.to(dtype, copy=True)
            B[1, 0] *= wrong
            with pytest.raises(hvpspec.InputError, match="the matrix is not symmetric"):
                DenseOperator(B)
        # Round-off of a few units is none.
        B = A.to(dtype, copy=True)
        B[1, 0] *= 1 - 4 * finfo.eps
        means = DenseOperator(B).to_dense()
        assert torch.equal(means, means.mT)


def test_errors() -> None:
    with pytest.raises(hvpspec.InputError, match=r"tau must be .* got -1"):
        inertia(torch.eye(2), -1.0)
    with pytest.raises(hvpspec.InputError, match=r"tau must be .* got nan"):
        inertia(torch.eye(2), float("nan"))
    for tau in ("1", [1.0], torch.tensor([1.0, 2.0])):
        with pytest.raises(hvpspec.InputError, match=r"tau must be .* got "):
            inertia(torch.eye(2), tau)  # type: ignore[arg-type]
    with pytest.raises(hvpspec.InputError, match="not symmetric"):
        eigvalsh(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    with pytest.raises(hvpspec.InputError, match="square matrix"):
        DenseOperator(torch.ones(2, 3))
    with pytest.raises(hvpspec.InputError, match="NaN"):
        DenseOperator(torch.full((2, 2), torch.nan))
    with pytest.raises(hvpspec.InputError, match="floating-point type"):
        DenseOperator(torch.eye(2, dtype=torch.int64))
    with pytest.raises(hvpspec.InputError, match="size of at least 1"):
        DenseOperator(torch.empty(0, 0))
    with pytest.raises(hvpspec.InputError, match=r"a whole number, got 2\.5"):
        FunctionOperator(2.5, lambda v: v)  # type: ignore[arg-type]
    with pytest.raises(hvpspec.InputError, match="GiB are free"):
        FunctionOperator(10**7, lambda v: v).to_dense()
    with pytest.raises(hvpspec.InputError, match=r"must return shape \(3,\)"):
        FunctionOperator(3, lambda v: v[:2]).to_dense()
    with pytest.raises(hvpspec.NonFiniteError, match="for a finite vector"):
        FunctionOperator(3, lambda v: v / 0).to_dense()
