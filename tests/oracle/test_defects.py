"""Defects met in other libraries, of which this one is to be free.

Others are tested where the code is: ragged batches, frozen, tied and unused parameters, and memory
in tests/curvature/test_hessian.py; relative breakdown, low rank and orthogonality over many steps
in tests/linalg/test_recurrence.py; seeds in tests/linalg/test_probes.py; repeated eigenvalues in
tests/linalg/test_extremes.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpspec
from hvpspec import FunctionOperator, HessianOperator, eigsh, spectral_measure
from tests.oracle.test_peers import problem

pytestmark = pytest.mark.oracle


def scaled_loss(outputs: Tensor, targets: Tensor, *, scale: float) -> Tensor:
    return scale * F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("scale", [1e-8, 1e-6, 1e-5, 1e8])
def test_largest_eigenvalue_scales_with_the_loss(scale: float) -> None:
    """Vectors divided by ``norm + 1e-6`` lose two thirds of it at a loss scaled by 1e-6."""
    model, X, y = problem()
    plain = eigsh(HessianOperator(model, nn.CrossEntropyLoss(), (X, y)), 1, "LA")
    H = HessianOperator(model, partial(scaled_loss, scale=scale), (X, y))
    scaled = eigsh(H, 1, "LA")
    assert float(scaled.values / plain.values) == pytest.approx(scale, rel=1e-5)
    assert scaled.num_matvecs == plain.num_matvecs


@pytest.mark.parametrize("exponent", [-40, 40])
def test_powers_of_two_scale_the_answer_bit_by_bit(exponent: int) -> None:
    values = torch.linspace(-1, 3, 200, dtype=torch.float64)
    scale = 2.0**exponent
    A = FunctionOperator(200, lambda v: values * v)
    B = FunctionOperator(200, lambda v: scale * values * v)
    assert torch.equal(eigsh(A, 3, "BE").values * scale, eigsh(B, 3, "BE").values)
    left, right = (
        hvpspec.index(X, tau, method="certified", max_matvecs=60)
        for X, tau in ((A, 0.05), (B, 0.05 * scale))
    )
    assert (left.lower, left.upper, left.num_matvecs) == (
        right.lower,
        right.upper,
        right.num_matvecs,
    )


def test_negative_ritz_values_are_kept() -> None:
    values = -torch.linspace(1, 2, 30, dtype=torch.float64)
    A = FunctionOperator(30, lambda v: values * v)
    measure = spectral_measure(A, 3, 30, generator=torch.Generator().manual_seed(0))
    for nodes, weights in zip(measure.nodes, measure.weights, strict=True):
        torch.testing.assert_close(nodes, values.sort().values, rtol=1e-8, atol=0)
        assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(eigsh(A, 3, "LM").values, values.sort().values[:3])


class Counting:
    """Batches that count how often they are read through."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield from self.batches


def test_construction_reads_the_data_at_most_once() -> None:
    model, X, y = problem()
    data = Counting(list(zip(X.split(8), y.split(8), strict=True)))
    H = HessianOperator(model, nn.CrossEntropyLoss(), data, memory_budget=0)  # nothing is kept
    assert data.passes <= 1
    v = torch.ones(H.shape[0])
    H @ v
    assert data.passes <= 2  # one to learn what the data are, one for the product
    before = data.passes
    H @ v
    H @ torch.stack([v, v, v], 1)
    assert data.passes == before + 2  # a block takes one pass, too


def test_a_mean_over_ragged_batches_is_the_mean_over_examples() -> None:
    """Batches of 8, 8, 8 and 1: their means are not averaged with equal weights."""
    model, X, y = problem(torch.float64)
    batches = list(zip(X.split(8), y.split(8), strict=True))
    whole = HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
    H = HessianOperator(model, nn.CrossEntropyLoss(), batches).to_dense()
    torch.testing.assert_close(H, whole, rtol=1e-12, atol=1e-14)
