"""The paper's 2-layer perceptron on real images, from network to index."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import hvpspec
from hvpspec import HessianOperator, IndexResult
from hvpspec.curvature.kronecker import NUM_CHECKS
from hvpspec.zoo import load_data, mlp2


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """The float64 Hessian of the ReLU network at its initial weights on the sample of MNIST."""
    H = HessianOperator(mlp2(), nn.CrossEntropyLoss(), load_data("mnist-sample").tensors)
    H = H.in_float64()
    seen: list[tuple[int, int]] = []
    A = H.to_dense(progress=lambda *done: seen.append(done))
    # The first layer's block is made of outer products, the rest of a product for each column.
    assert H.num_matvecs == 110 + NUM_CHECKS
    assert seen == sorted(seen)
    assert seen[-1] == (7960, 7960)
    return A


@pytest.fixture(scope="module")
def exact(matrix: Tensor) -> IndexResult:
    return hvpspec.index(matrix, method="exact")


def test_the_resolved_index_obeys_the_structural_bound(exact: IndexResult) -> None:
    assert exact.dim == 7960
    assert exact.index is not None
    assert 0 < exact.index <= 90
    assert exact.raw_count is not None
    # Dead pixels and the shift of the softmax make over two thousand zeros; round-off gives about
    # one in ten of them a minus sign.
    assert exact.raw_count > 2 * exact.index
    assert exact.nullity is not None
    assert exact.nullity > 2000


def test_inertia_counts_the_same(matrix: Tensor, exact: IndexResult) -> None:
    tau = 1e-7 * exact.norm
    assert exact.eigenvalues is not None
    counted = hvpspec.inertia(matrix, tau)
    assert counted.negative == int((exact.eigenvalues < -tau).sum())
    assert counted.positive == int((exact.eigenvalues > tau).sum())
