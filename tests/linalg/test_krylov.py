"""The block Krylov space: its recurrence, its orthogonality and its ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hvpspec
from hvpspec import DenseOperator, FunctionOperator, InputError
from hvpspec.linalg.krylov import KrylovSpace
from tests.linalg.test_dense import HOSTILE, rotated

N = 60


def orthonormal(rows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(N, rows, dtype=torch.float64, generator=generator)).Q.T


def gaussian(n: int, width: int, seed: int = 2) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(space: KrylovSpace, A: Tensor, D: Tensor) -> None:
    """Compare a space with its defining identity, to a small multiple of round-off."""
    known = space._basis[: space.size + space.width]
    V, following = known[: space.size], known[space.size :]
    scale = float(torch.linalg.matrix_norm(A, 2)) or 1.0
    residual = A @ V.T - V.T @ space.T - following.T @ space.coupling - D.T @ space.C
    assert float(residual.abs().max()) < 1e-13 * scale
    everything = torch.cat([D, known])
    gram = everything @ everything.T
    assert float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) < 1e-13


@pytest.mark.parametrize("deflated", [0, 4])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    "values",
    [torch.linspace(-1, 1, N), torch.tensor([0.0] * 50 + [1.0] * 3 + [-1.0] * 7), torch.zeros(N)],
    ids=["spread", "repeated", "zero"],
)
def test_the_recurrence_holds(values: Tensor, width: int, deflated: int) -> None:
    A, D = rotated(values), orthonormal(deflated)
    space = KrylovSpace(DenseOperator(A), gaussian(N, width), 25, D)
    while not space.full:
        space.expand()
        check(space, A, D)
    if not space.width:
        return
    theta, S, _ = space.ritz()
    space.restart(theta[-5:], S[:, -5:])
    check(space, A, D)
    while not space.full:
        space.expand()
    check(space, A, D)


def test_an_invariant_subspace_ends_it() -> None:
    values = torch.tensor([-1.0] * 20 + [2.0] * 40).double()
    space = KrylovSpace(FunctionOperator(N, lambda v: values * v), gaussian(N, 3), 50)
    while not space.full:
        space.expand()
    # Three start vectors have parts in two eigenspaces, each of dimension above three.
    assert (space.size, space.width) == (6, 0)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(space.T), torch.tensor([-1.0] * 3 + [2.0] * 3).double()
    )


def test_what_is_dropped_is_told() -> None:
    values = torch.tensor([1.0] * 10 + [0.0] * 50)
    u = 2**-24
    A = (rotated(values) + 8 * u * rotated(torch.linspace(-1, 1, N), 1)).float()
    space = KrylovSpace(DenseOperator(A), gaussian(N, 2).float(), 50)
    while not space.full:
        space.expand()
    assert space.width == 0
    V = space._basis[: space.size].double()
    residual = torch.linalg.matrix_norm(A.double() @ V.T - V.T @ space.T, 2)
    assert 2 * u < space.dropped < 20 * u
    assert residual < space.dropped + 5 * u  # of the products


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_whole_space_gives_all_eigenvalues(width: int) -> None:
    A = rotated(torch.linspace(-1, 1, N))
    space = KrylovSpace(DenseOperator(A), gaussian(N, width), 1000)
    while not space.full:
        space.expand()
    assert space.size == N
    torch.testing.assert_close(
        torch.linalg.eigvalsh(space.T), torch.linalg.eigvalsh(A), rtol=0, atol=1e-13
    )


def test_ritz_pairs_have_the_residuals_they_say() -> None:
    A, D = rotated(torch.linspace(-1, 1, N)), orthonormal(3)
    P = torch.eye(N, dtype=torch.float64) - D.T @ D
    space = KrylovSpace(DenseOperator(A), gaussian(N, 2), 20, D)
    while not space.full:
        space.expand()
    theta, S, residuals = space.ritz()
    X = space.rotate(S)
    true = torch.linalg.vector_norm(P @ A @ P @ X.T - X.T * theta, dim=0)
    torch.testing.assert_close(residuals, true, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-14, 1e-8, 1e8])
@pytest.mark.parametrize("name", HOSTILE)
def test_it_scales_with_the_matrix(name: str, scale: float) -> None:
    A = rotated(HOSTILE[name])
    spaces = []
    for factor in (1.0, scale):
        space = KrylovSpace(DenseOperator(factor * A), gaussian(len(A), 1), 100)
        while not space.full:
            space.expand()
        spaces.append(space)
    plain, scaled = spaces
    assert plain.size == scaled.size
    norm = float(A.abs().max())
    torch.testing.assert_close(scaled.T / scale, plain.T, rtol=1e-6, atol=1e-13 * norm)


def test_a_start_in_what_is_deflated_is_refused() -> None:
    D = orthonormal(4)
    with pytest.raises(hvpspec.InputError, match="span of what is deflated"):
        KrylovSpace(FunctionOperator(N, lambda v: v), D[:1].T.clone(), 10, D)


@pytest.mark.parametrize(
    ("ask", "limit"),
    [
        (lambda A: hvpspec.index(A, 1e-3, method="certified", num_steps=50), "num_steps"),
        (lambda A: hvpspec.eigsh(A, 5), "k"),
    ],
)
def test_a_basis_that_does_not_fit(
    ask: Callable[[DenseOperator], Any], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = DenseOperator(rotated(torch.linspace(-1, 2, N, dtype=torch.float64)))
    monkeypatch.setattr("hvpspec.linalg.memory.available_memory", lambda device: 40 * N * 8 + 7)
    remedy = f"choose a smaller {limit} (a basis of 40 fits), or fewer parameters"
    with pytest.raises(InputError, match=re.escape(remedy)):
        ask(A)
