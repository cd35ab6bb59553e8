"""Other libraries as oracles: where they answer the same question, the answers agree."""

from __future__ import annotations

import math
import sys

import linear_operator
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hessian_eigenthings import HessianOperator as EigenthingsOperator
from pyhessian import hessian as PyHessian
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpspec
from hvpspec import DenseOperator, GGNOperator, HessianOperator
from hvpspec.linalg import interop
from tests.linalg.test_dense import rotated

pytestmark = [
    pytest.mark.oracle,
    # PyHessian accumulates gradients in a graph, which leaks; linear_operator compiles TorchScript
    # and builds sparse tensors.
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network with data in 25 examples, which no batch size here divides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        return model.eval(), torch.randn(25, 6).to(dtype), torch.randint(3, (25,))


def ragged() -> tuple[nn.Module, DataLoader[tuple[Tensor, ...]]]:
    """The same in batches of 8, 8, 8 and 1."""
    model, X, y = problem()
    return model, DataLoader(TensorDataset(X, y), batch_size=8)


def exact() -> Tensor:
    """Its Hessian in float64."""
    model, X, y = problem(torch.float64)
    return HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()


def test_pyhessian_eigenvalues_and_trace() -> None:
    model, loader = ragged()
    H = HessianOperator(model, nn.CrossEntropyLoss(), loader)
    expected = torch.linalg.eigvalsh(exact())
    ours = hvpspec.eigsh(H, 2, "LM")
    by_size = expected[expected.abs().argsort(descending=True)[:2]].sort().values
    torch.testing.assert_close(ours.values, by_size, rtol=1e-4, atol=0)
    traced = hvpspec.trace(H, 20, generator=torch.Generator().manual_seed(0), method="hutchinson")
    assert abs(traced.value - float(expected.sum())) < 4 * traced.sem

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peer = PyHessian(model, nn.CrossEntropyLoss(), dataloader=loader, cuda=False)
        values, _ = peer.eigenvalues(maxIter=300, tol=1e-6, top_n=2)
        traces = peer.trace(maxIter=100, tol=0.0)
    model.zero_grad()
    assert sorted(values) == pytest.approx(ours.values.tolist(), rel=1e-3)
    sem = np.std(traces, ddof=1) / math.sqrt(len(traces))
    assert abs(np.mean(traces) - float(expected.sum())) < 4 * sem


def test_curvlinops_products_on_ragged_batches() -> None:
    model, loader = ragged()
    H = HessianOperator(model, nn.CrossEntropyLoss(), loader)
    peer = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), loader, check_deterministic=False
    )
    V = torch.randn(H.shape[0], 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(H @ V, peer @ V, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close((H @ V).double(), exact() @ V.double(), rtol=1e-5, atol=1e-6)


def test_curvlinops_gauss_newton_products_on_ragged_batches() -> None:
    model, loader = ragged()
    G = GGNOperator(model, nn.CrossEntropyLoss(), loader)
    peer = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), loader, check_deterministic=False
    )
    V = torch.randn(G.shape[0], 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(G @ V, peer @ V, rtol=1e-5, atol=1e-7)
    assert float((G @ V - exact().float() @ V).abs().max()) > 1e-3  # it is not the Hessian


def test_eigenthings_products_on_one_batch() -> None:
    model, X, y = problem()
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    peer = EigenthingsOperator(
        model, [(X, y)], lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    )
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(H @ v, peer.matvec(v).detach(), rtol=1e-5, atol=1e-6)


def test_scipy_eigsh_lobpcg_and_trace() -> None:
    model, X, y = problem(torch.float64)
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    peer, expected = H.to_scipy(), torch.linalg.eigvalsh(exact())
    ours = hvpspec.eigsh(H, 3, "SA", tol=1e-10)
    theirs = scipy.sparse.linalg.eigsh(peer, 3, which="SA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(theirs), ours.values.numpy(), rtol=1e-8)
    start = np.random.default_rng(0).standard_normal((H.shape[0], 3))
    largest, _ = scipy.sparse.linalg.lobpcg(peer, start, largest=True, tol=1e-8, maxiter=500)
    np.testing.assert_allclose(np.sort(largest), expected[-3:].numpy(), rtol=1e-6)
    columns = peer @ np.eye(H.shape[0])
    traced = hvpspec.trace(H, generator=torch.Generator().manual_seed(0))
    assert traced.sem == 0
    assert traced.value == pytest.approx(np.trace(columns), rel=1e-10)


class TestLinearOperator:
    """Sizes on both sides of 800, to which linear_operator takes Cholesky's way."""

    @pytest.mark.parametrize("n", [1, 40, 900])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_solve_and_log_determinant(self, n: int, dtype: torch.dtype) -> None:
        A = DenseOperator(rotated(torch.linspace(0.1, 3, n)).to(dtype))
        dense = A.to_dense().double() + 0.5 * torch.eye(n, dtype=torch.float64)
        wrapped = A.to_linear_operator()
        assert isinstance(wrapped, linear_operator.LinearOperator)
        assert (wrapped.shape, wrapped.dtype) == (A.shape, dtype)
        rhs = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
        quadratic = float((rhs.double() * torch.linalg.solve(dense, rhs.double())).sum())
        for shifted in (
            wrapped.add_jitter(0.5),
            wrapped.add_diagonal(torch.tensor(0.5, dtype=dtype)),
        ):
            solved = shifted.solve(rhs)
            torch.testing.assert_close(dense @ solved.double(), rhs.double(), rtol=0, atol=5e-3)
            with torch.random.fork_rng(devices=[]), linear_operator.settings.num_trace_samples(100):
                torch.manual_seed(0)
                found, logdet = shifted.inv_quad_logdet(rhs, logdet=True)
            assert float(found) == pytest.approx(quadratic, rel=1e-4)
            # 100 samples of log of numbers from 0.6 to 3.5: a spread of 0.5 sqrt(2 n / 100).
            spread = 4 * 0.5 * math.sqrt(2 * n / 100) if n > 800 else 1e-4
            assert float(logdet) == pytest.approx(float(torch.logdet(dense)), abs=spread)

    def test_products_entries_and_conversions(self) -> None:
        A = DenseOperator(rotated(torch.linspace(-1, 2, 300)).float())
        dense, wrapped = A.to_dense(), A.to_linear_operator()
        V = torch.randn(4, 300, 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(wrapped @ V, dense @ V)
        torch.testing.assert_close(wrapped @ V[0], dense @ V[0])
        torch.testing.assert_close(wrapped @ V[0, :, 0], dense @ V[0, :, 0])
        torch.testing.assert_close(wrapped.mT @ V[0], dense @ V[0])
        torch.testing.assert_close(wrapped.diagonal(), dense.diagonal())
        torch.testing.assert_close(wrapped.to_dense(), dense)
        torch.testing.assert_close((2.0 * wrapped + wrapped).to_dense(), 3 * dense)
        rows, columns = torch.tensor([3, 3, 5]), torch.tensor([280, 1, 5])
        torch.testing.assert_close(wrapped[rows, columns], dense[rows, columns])
        assert (wrapped.double() @ V[0].double()).dtype == torch.float64

    def test_products_are_counted_and_no_matrix_is_built(self) -> None:
        values = torch.linspace(0.5, 1, 3000, dtype=torch.float64)
        A = hvpspec.FunctionOperator(3000, lambda v: values * v)
        rhs = torch.ones(3000, 1, dtype=torch.float64)
        with linear_operator.settings.max_preconditioner_size(0):
            solved = A.to_linear_operator().add_jitter(1.0).solve(rhs)
        torch.testing.assert_close(solved[:, 0], 1 / (values + 1), rtol=1e-3, atol=0)
        assert A.num_matvecs < 50

    def test_the_preconditioner_works_too(self) -> None:
        A = DenseOperator(torch.diag(torch.linspace(0.5, 1, 2100, dtype=torch.float64)))
        rhs = torch.ones(2100, 1, dtype=torch.float64)
        solved = A.to_linear_operator().add_jitter(1.0).solve(rhs)
        torch.testing.assert_close(A.to_dense() @ solved + solved, rhs, rtol=5e-3, atol=0)

    def test_gradients_with_respect_to_the_other_side(self) -> None:
        A = DenseOperator(rotated(torch.linspace(1, 2, 30)))
        rhs = torch.ones(30, 1, dtype=torch.float64, requires_grad=True)
        (A.to_linear_operator() @ rhs).sum().backward()
        torch.testing.assert_close(rhs.grad, A.to_dense().sum(0)[:, None])

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "linear_operator", None)
        interop._wrapper_class.cache_clear()
        with pytest.raises(hvpspec.InputError, match="pip install linear_operator"):
            DenseOperator(torch.eye(2)).to_linear_operator()
        interop._wrapper_class.cache_clear()
