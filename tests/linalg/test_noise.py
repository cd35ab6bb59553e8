"""The measured noise floor against the error that was put in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hvpspec import ComputationError, DenseOperator, FunctionOperator
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


class Shared(FunctionOperator):
    """Products in float32 with an error that is the same in the float64 copy."""

    def __init__(self, multiply: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(200, lambda v: multiply(v.double()), dtype=torch.float32)
        self._copy = FunctionOperator(200, multiply)

    def in_float64(self) -> SymmetricOperator:
        return self._copy


def test_a_defect_of_symmetry_enters_the_floor() -> None:
    """Also where products in float64 have it, with which others are compared."""
    A, half = rotated(torch.linspace(-1, 2, 200)), rotated(torch.linspace(-1, 2, 200)).half()

    def multiply(v: torch.Tensor) -> torch.Tensor:
        return (half @ v.half()).double()

    for operator in (FunctionOperator(200, multiply), Shared(multiply)):
        noise = measure_noise(operator, torch.Generator().manual_seed(1))
        assert noise.symmetry_defect > 1e-6
        assert noise.floor >= 4 * 100**0.5 * noise.symmetry_defect
        V = torch.randn(200, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        V /= torch.linalg.vector_norm(V, dim=0)
        errors = operator.matmat(V.to(operator.dtype)).double() - A @ V
        assert noise.floor > float(torch.linalg.vector_norm(errors, dim=0).max())


def test_an_asymmetric_operator_is_refused() -> None:
    A = rotated(torch.linspace(-1, 2, 200))
    skew = torch.randn(200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    skew = 1e-3 * (skew - skew.T)
    for operator in (
        FunctionOperator(200, lambda v: A @ v + skew @ v),
        Shared(lambda v: A @ v + skew @ v),
    ):
        with pytest.raises(ComputationError, match="not symmetric"):
            measure_noise(operator, torch.Generator().manual_seed(1))


def test_products_are_counted() -> None:
    A = FunctionOperator(100, lambda v: torch.linspace(-1, 1, 100, dtype=v.dtype) * v)
    assert measure_noise(A, torch.Generator().manual_seed(0)).num_matvecs == A.num_matvecs
