"""Extreme eigenpairs against the exact ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import hvpspec
from hvpspec import DenseOperator, FunctionOperator, eigsh
from tests.linalg.test_dense import HOSTILE, rotated

SPECTRA = {
    **HOSTILE,
    "spread": torch.linspace(-1, 2, 300),
    "triple at the top": torch.cat([torch.linspace(-2, 3, 200), torch.full((3,), 5.0)]),
    "two values": torch.cat([torch.full((40,), -1.0), torch.full((40,), 1.0)]),
    "bulk": torch.cat([torch.zeros(150), torch.logspace(-4, 1, 50)]),
}


def expected(values: Tensor, k: int, which: str) -> Tensor:
    values = values.double().sort().values
    n = len(values)
    if which == "LA":
        return values[n - k :]
    if which == "SA":
        return values[:k]
    if which == "BE":
        return torch.cat([values[: k // 2], values[n - (k - k // 2) :]])
    return values[values.abs().argsort(descending=True)[:k]].sort().values


# Scales as far apart are harder in single precision, and no harder in double precision than one.
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-8, torch.float32), (1.0, torch.float64), (1e8, torch.float32)]
)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
def test_equal_the_exact_ones(name: str, which: str, scale: float, dtype: torch.dtype) -> None:
    values = SPECTRA[name].double()
    A = rotated(values) * scale
    k = min(4, len(values))
    pairs = eigsh(A.to(dtype), k, which)
    norm = float(values.abs().max()) * scale
    # A residual of sqrt(u) ||A|| leaves an error of u ||A||^2 / gap, and at most sqrt(u) ||A||.
    tolerance = 2 * (torch.finfo(dtype).eps / 2) ** 0.5 * norm
    found = pairs.values
    truth = expected(values * scale, k, which)
    if which == "LM":  # of two values of equal size either may come
        found, truth = found.abs().sort().values, truth.abs().sort().values
    assert float((found - truth).abs().max()) <= tolerance
    assert bool(pairs.converged.all())
    X = pairs.vectors.double()
    residuals = torch.linalg.vector_norm(A.to(dtype).double() @ X - X * pairs.values, dim=0)
    torch.testing.assert_close(pairs.residual_norms, residuals, rtol=0.1, atol=tolerance)
    gram = X.T @ X - torch.eye(k, dtype=torch.float64)
    assert float(gram.abs().max()) < 100 * torch.finfo(dtype).eps


def test_all_pairs_of_a_small_matrix() -> None:
    values = torch.tensor([-3.0, -1.0, -1.0, 0.0, 2.0, 2.0, 2.0])
    pairs = eigsh(rotated(values), 7, "SA")
    torch.testing.assert_close(pairs.values, values.double(), rtol=0, atol=1e-7)


def test_what_does_not_converge_is_said() -> None:
    A = FunctionOperator(3000, lambda v: torch.linspace(0, 1, 3000, dtype=v.dtype) * v)
    pairs = eigsh(A, 5, "LA", max_matvecs=40)
    assert not bool(pairs.converged.all())
    assert bool((pairs.residual_norms > 0).all())
    assert pairs.num_matvecs == A.num_matvecs <= 40


@pytest.mark.parametrize("max_matvecs", [6, 7, 50])
@pytest.mark.parametrize("values", [torch.zeros(40), torch.ones(40), torch.linspace(-1, 2, 300)])
def test_the_budget_is_kept(values: Tensor, max_matvecs: int) -> None:
    A = DenseOperator(rotated(values))
    pairs = eigsh(A, 3, "LA", max_matvecs=max_matvecs)
    assert len(pairs.values) == 3
    assert pairs.num_matvecs == A.num_matvecs <= max_matvecs


def test_products_are_counted_and_reported() -> None:
    A = DenseOperator(rotated(torch.linspace(-1, 2, 300)))
    seen: list[tuple[int, int]] = []
    pairs = eigsh(A, 3, "LA", progress=lambda *done: seen.append(done))
    assert pairs.num_matvecs == A.num_matvecs
    assert seen == sorted(seen)
    assert seen


def test_same_generator_same_bits() -> None:
    A = rotated(torch.linspace(-1, 2, 100))
    runs = [eigsh(A, 2, "LA", generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(runs[0].values, runs[1].values)
    assert torch.equal(runs[0].vectors, runs[1].vectors)


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e30])
def test_scales_at_which_squares_overflow_in_float32(scale: float) -> None:
    values = torch.tensor([-1.0] * 4 + [0.0] * 60 + [3.0, 2.0])
    A = (rotated(values) * scale).float()
    pairs = eigsh(A, 3, "LM")
    assert (pairs.values / scale).tolist() == pytest.approx([-1.0, 2.0, 3.0], abs=1e-5)
    result = hvpspec.index(A, 0.8 * scale, method="certified")
    assert (result.index, result.certified) == (4, True)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200])
def test_scales_beyond_float64_are_refused(scale: float) -> None:
    A = rotated(torch.tensor([-1.0] * 4 + [0.0] * 60 + [3.0, 2.0])) * scale
    generator = torch.Generator().manual_seed(0)
    asks = [lambda: eigsh(A, 3), lambda: hvpspec.spectral_measure(A, generator=generator)]
    asks += [
        partial(hvpspec.index, A, scale / 2, method=method)
        for method in ("certified", "slq", "chebyshev")
    ]
    for ask in asks:
        with pytest.raises(hvpspec.ComputationError, match=r"out of range.*; scale the matrix"):
            ask()


def test_errors() -> None:
    with pytest.raises(hvpspec.InputError, match="k must be between 1 and the size 3, got 4"):
        eigsh(torch.eye(3), 4)
    for k in (0, 2.0, "2"):
        with pytest.raises(hvpspec.InputError, match="k must be a whole number of at least 1, got"):
            eigsh(torch.eye(3), k)  # type: ignore[arg-type]
    with pytest.raises(hvpspec.InputError, match="which must be"):
        eigsh(torch.eye(3), 1, "SM")
    for tol in (-1.0, 0.0, float("nan")):
        with pytest.raises(hvpspec.InputError, match="tol must be positive and finite"):
            eigsh(torch.eye(3), 1, tol=tol)
    for max_matvecs in (-5, 0, 3, 30.5):
        with pytest.raises(hvpspec.InputError, match=r"at least 2 k = 4.*, got"):
            eigsh(torch.eye(3), 2, max_matvecs=max_matvecs)


def test_a_warm_start_takes_fewer_products_to_the_same_pairs() -> None:
    values = torch.linspace(-1, 3, 2000, dtype=torch.float64) ** 3
    moved = values + 1e-4 * torch.sin(torch.arange(2000, dtype=torch.float64))
    before = eigsh(FunctionOperator(2000, lambda v: values * v), 4, "LA")
    A = FunctionOperator(2000, lambda v: moved * v)
    cold, warm = eigsh(A, 4, "LA"), eigsh(A, 4, "LA", x0=before.vectors)
    assert bool(warm.converged.all())
    torch.testing.assert_close(warm.values, cold.values, rtol=1e-9, atol=0)
    assert warm.num_matvecs < 0.8 * cold.num_matvecs
    # A start that is blind to all that is wanted is made good by the rounds that follow.
    blind = eigsh(A, 4, "LA", x0=torch.eye(2000, dtype=torch.float64)[0])
    torch.testing.assert_close(blind.values, cold.values, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "x0", [torch.ones(3), torch.ones(4, 0), torch.zeros(4), torch.full((4,), torch.nan)]
)
def test_warm_starts_that_are_none(x0: torch.Tensor) -> None:
    with pytest.raises(hvpspec.InputError, match="x0 must"):
        eigsh(torch.eye(4), 1, x0=x0)
