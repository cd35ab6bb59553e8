"""What goes wrong at any moment, in any question, is said in words, and nothing is lost by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hvpspec
from hvpspec import DenseOperator, InputError, NonFiniteError, RecordedOperator, SymmetricOperator
from hvpspec.linalg.operator import as_operator
from hvpspec.results import plain

N = 24


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


Question = Callable[[Any], Any]
QUESTIONS: dict[str, Question] = {
    "index": hvpspec.index,
    "certified": lambda A: hvpspec.index(A, 0.05, method="certified", generator=seeded()),
    "quadrature": lambda A: hvpspec.index(A, 0.05, method="quadrature", generator=seeded()),
    "filtered": lambda A: hvpspec.index(A, 0.05, method="filtered", generator=seeded()),
    "inertia": lambda A: hvpspec.index(A, 0.05, method="inertia"),
    "density": lambda A: hvpspec.spectral_measure(A, 2, 8, generator=seeded()).nodes,
    "eigenpairs": lambda A: hvpspec.eigsh(A, 3, generator=seeded()),
    "hutchinson": lambda A: hvpspec.trace(A, 9, method="hutchinson", generator=seeded()),
    "hutch++": lambda A: hvpspec.trace(A, 12, generator=seeded()),
    "xtrace": lambda A: hvpspec.trace(A, 12, method="xtrace", generator=seeded()),
    "norm": lambda A: hvpspec.frobenius_norm(A, 9, generator=seeded()),
    "diagonal": lambda A: hvpspec.diagonal(A, 12, generator=seeded()),
    "matrix": lambda A: as_operator(A).to_dense(),
}


def matrix() -> Tensor:
    Q, _ = torch.linalg.qr(torch.randn(N, N, generator=seeded(), dtype=torch.float64))
    A = (Q * torch.linspace(-1, 3, N).double()) @ Q.T
    return (A + A.T) / 2


class Faulty(DenseOperator):
    """A matrix seen through products, of which one vector's is spoiled, once.

    Args:
        at: number of that vector, from 0.
        value: what an entry of its product becomes.
    """

    def __init__(self, at: float = math.inf, value: float = math.nan) -> None:
        super().__init__(matrix())
        self.at, self.value = at, value

    def _matmat(self, V: Tensor) -> Tensor:
        product = super()._matmat(V)
        column = self.at - self.num_matvecs
        if 0 <= column < V.shape[1]:
            product[7, int(column)] = self.value
            self.at = math.inf
        return product

    _pieces = SymmetricOperator._pieces
    _entries_compared = False

    def fingerprint(self) -> dict[str, str]:
        return {**super().fingerprint(), "operator": "Faulty"}


def spent(question: str) -> int:
    """Products that a question takes, in all of the operators that it makes."""
    A = Faulty()
    QUESTIONS[question](A)
    return A.num_matvecs


PRODUCTS = {question: spent(question) for question in QUESTIONS}
moments = st.sampled_from(sorted(QUESTIONS)).flatmap(
    lambda q: st.tuples(st.just(q), st.integers(0, PRODUCTS[q] - 1))
)


@settings(deadline=None, max_examples=30)
@given(moment=moments, value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_product_that_is_not_finite(moment: tuple[str, int], value: float) -> None:
    question, at = moment
    ask, A = QUESTIONS[question], Faulty(at, value)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        ask(A)
    # The operator is as good as before, and so is the answer.
    assert plain(ask(A)) == plain(ask(Faulty()))


@settings(deadline=None, max_examples=15)
@given(moment=moments, every=st.sampled_from([0.0, 1e6]))
def test_what_was_kept_before_a_fault_is_sound(moment: tuple[str, int], every: float) -> None:
    question, at = moment
    ask = QUESTIONS[question]
    with TemporaryDirectory() as folder:
        path = Path(folder)
        with RecordedOperator(Faulty(), path / "whole") as whole:
            expected = ask(whole)
        with (
            pytest.raises(NonFiniteError),
            RecordedOperator(Faulty(at), path / "parts", every=every) as R,
        ):
            ask(R)
        with RecordedOperator(Faulty(), path / "parts") as R:
            assert plain(ask(R)) == plain(expected)


@settings(deadline=None, max_examples=40)
@given(
    question=st.sampled_from(sorted(QUESTIONS)),
    A=st.sampled_from(
        [
            torch.ones(3),
            torch.ones(2, 3),
            torch.ones(2, 2, 2),
            torch.tensor(1.0),
            torch.zeros(0, 0),
            torch.ones(3, 3, dtype=torch.int64),
            torch.eye(3, dtype=torch.complex64),
            torch.eye(2, dtype=torch.bool),
            torch.eye(2).to_sparse(),
            torch.eye(2, device="meta"),
            torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
            torch.tensor([[1.0, math.nan], [math.nan, 1.0]]),
            torch.diag(torch.tensor([1.0, math.inf])),
            None,
            "matrix",
            [[1.0], [2.0, 3.0]],
        ]
    ),
)
def test_what_is_no_symmetric_matrix(question: str, A: Any) -> None:
    with pytest.raises(InputError):
        QUESTIONS[question](A)


@pytest.mark.parametrize(
    ("returned", "kind"),
    [(None, "NoneType"), ([1.0] * N, "list"), (torch.ones(N) * 1j, "torch.complex64")],
)
def test_functions_that_return_no_real_tensor(returned: Any, kind: str) -> None:
    A = hvpspec.FunctionOperator(N, lambda v: returned)
    for ask in QUESTIONS.values():
        with pytest.raises(InputError, match=f"must return a real tensor, but returned {kind}"):
            ask(A)


@pytest.mark.parametrize("V", [None, [1.0] * N])
def test_what_is_no_tensor(V: Any) -> None:
    A = DenseOperator(matrix())
    for multiply in (A.matvec, A.matmat, A.__matmul__):
        with pytest.raises(InputError, match=f"expected a tensor, got {type(V).__name__}"):
            multiply(V)


def test_blocks_of_no_vectors() -> None:
    nothing = torch.ones(N, 0, dtype=torch.float64)
    for A in (DenseOperator(matrix()), hvpspec.FunctionOperator(N, lambda v: v)):
        assert A.matmat(nothing).shape == (N, 0)


@pytest.mark.parametrize("shape", [(N,), (N - 1, 2), (2, N), (N, 2, 1), ()])
@pytest.mark.parametrize(
    "make",
    [
        DenseOperator,
        lambda A: -DenseOperator(A),
        lambda A: DenseOperator(A).shifted(1.0),
        lambda A: hvpspec.PreconditionedOperator(A, torch.ones(N)),
        lambda A: hvpspec.FunctionOperator(N, lambda v: A @ v),
    ],
)
def test_blocks_of_other_shapes(make: Any, shape: tuple[int, ...]) -> None:
    A = make(matrix())
    before = A.num_matvecs
    with pytest.raises(InputError, match="expected a block of shape"):
        A.matmat(torch.ones(shape, dtype=torch.float64))
    if shape != (N,):
        with pytest.raises(InputError, match="expected a vector of shape"):
            A.matvec(torch.ones(shape, dtype=torch.float64))
    assert A.num_matvecs == before
