"""What every operator shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg, eigsh

import hvpspec
from hvpspec import DenseOperator, FunctionOperator
from hvpspec.linalg.tiles import symmetrise_
from tests.linalg.test_dense import rotated


def test_products_and_their_number() -> None:
    A = rotated(torch.linspace(-1, 2, 9))
    for operator in (DenseOperator(A), FunctionOperator(9, lambda v: A @ v)):
        V = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(operator @ V, A @ V)
        torch.testing.assert_close(operator @ V[:, 0], A @ V[:, 0])
        assert operator.num_matvecs == 5
        torch.testing.assert_close(operator.to_dense(), A)


def test_assembly_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    FunctionOperator(300, lambda v: v).to_dense(progress=lambda *done: seen.append(done))
    assert seen == [(256, 300), (300, 300)]


def test_symmetrise_works_across_stripes() -> None:
    A = torch.randn(2100, 2100, generator=torch.Generator().manual_seed(0))
    expected = (A + A.T) / 2
    assert torch.equal(symmetrise_(A), expected)


def test_float64_copy() -> None:
    narrow = DenseOperator(torch.eye(2))
    assert narrow.in_float64().dtype == torch.float64
    opaque = FunctionOperator(2, lambda v: v, dtype=torch.float32)
    assert opaque.in_float64() is opaque


def test_scipy_solvers_run_on_it() -> None:
    A = rotated(torch.linspace(1, 2, 20))
    for dtype in (torch.float32, torch.float64):
        operator = DenseOperator(A.to(dtype)).to_scipy()
        largest = eigsh(operator, k=2, which="LA", return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(largest), [2 - 1 / 19, 2], rtol=1e-5)
        x, info = cg(operator, np.ones(20), rtol=1e-4)
        assert info == 0
        assert np.linalg.norm(A.numpy() @ x - 1) < 1e-3 * np.sqrt(20)


def test_products_far_from_symmetric_are_refused() -> None:
    A = rotated(torch.linspace(-1, 2, 30))
    skew = torch.triu(torch.ones(30, 30, dtype=torch.float64), 1) / 10
    with pytest.raises(hvpspec.ComputationError, match="products are not symmetric"):
        FunctionOperator(30, lambda v: A @ v + skew @ v).to_dense()
