"""The measured noise floor against the error that was put in."""

from __future__ import annotations

import pytest
import torch

from hvpspec import DenseOperator, FunctionOperator
from hvpspec.linalg import measure_noise
from hvpspec.linalg.operator import SymmetricOperator
from tests.linalg.test_dense import HOSTILE, rotated


class Noisy(FunctionOperator):
    """A matrix with a given error, and its exact float64 copy."""

    def __init__(self, A: torch.Tensor, error: torch.Tensor) -> None:
        super().__init__(len(A), lambda v: A @ v + error @ v)
        self._exact = DenseOperator(A)

    def in_float64(self) -> SymmetricOperator:
        return self._exact


@pytest.mark.parametrize("seed", range(5))
def test_the_floor_bounds_the_error_and_not_by_much(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = rotated(torch.linspace(-1, 2, 200))
    error = 1e-7 * torch.randn(200, 200, dtype=torch.float64, generator=generator)
    error = (error + error.T) / 2
    noise = measure_noise(Noisy(A, error), torch.Generator().manual_seed(seed))
    size = float(torch.linalg.matrix_norm(error, 2))
    assert size <= noise.floor <= 6 * size
    assert noise.source == "compared with float64"


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HOSTILE)
def test_norm_and_floor_scale_with_the_matrix(name: str, scale: float) -> None:
    values = HOSTILE[name]
    norm = float(values.abs().max()) * scale
    for dtype in (torch.float64, torch.float32):
        operator = DenseOperator((rotated(values) * scale).to(dtype))
        noise = measure_noise(operator, torch.Generator().manual_seed(0))
        assert noise.norm == pytest.approx(norm, rel=0.05)
        u = torch.finfo(dtype).eps / 2
        assert u * norm * 0.9 <= noise.floor <= 100 * len(values) * u * norm or norm == 0


def test_an_asymmetric_operator_shows() -> None:
    A = rotated(torch.linspace(-1, 2, 200))
    skew = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    broken = FunctionOperator(200, lambda v: A @ v + 1e-3 * ((skew - skew.T) @ v))
    noise = measure_noise(broken, torch.Generator().manual_seed(1))
    assert noise.symmetry_defect > 1e-5
    assert noise.floor > 1e-4


def test_products_are_counted() -> None:
    A = FunctionOperator(100, lambda v: torch.linspace(-1, 1, 100, dtype=v.dtype) * v)
    assert measure_noise(A, torch.Generator().manual_seed(0)).num_matvecs == A.num_matvecs
