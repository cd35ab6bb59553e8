"""Operators that break a promise: each question answers as for a careful one, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hvpspec
from hvpspec import ComputationError, FunctionOperator, InputError, SymmetricOperator
from hvpspec.results import plain
from tests.linalg.test_dense import HOSTILE, rotated
from tests.spectrum.test_faults import QUESTIONS, N, matrix

Function = Callable[[Tensor], Tensor]


def in_place(A: Tensor) -> Function:
    """Uses its argument as scratch space."""

    def multiply(v: Tensor) -> Tensor:
        product = A @ v
        v.zero_()
        return product

    return multiply


def into_its_argument(A: Tensor) -> Function:
    """Returns its argument, with the product in it."""
    return lambda v: v.copy_(A @ v)


def in_numpy(A: Tensor) -> Function:
    """Changes its argument behind the back of torch."""

    def multiply(v: Tensor) -> Tensor:
        array = v.numpy()
        array[:] = (A @ v).numpy()
        return v

    return multiply


def into_one_buffer(A: Tensor) -> Function:
    """Returns the same tensor each time."""
    buffers: dict[tuple[int, ...], Tensor] = {}

    def multiply(v: Tensor) -> Tensor:
        return buffers.setdefault(tuple(v.shape), torch.empty_like(v)).copy_(A @ v)

    return multiply


def with_all_arguments_kept(A: Tensor) -> Function:
    """Keeps what it was given, and changes it in the next call."""
    kept: list[Tensor] = []

    def multiply(v: Tensor) -> Tensor:
        for before in kept:
            before.fill_(torch.nan)
        kept[:] = [v]
        return A @ v

    return multiply


CARELESS = [in_place, into_its_argument, in_numpy, into_one_buffer, with_all_arguments_kept]


class Subclass(SymmetricOperator):
    """A user's own operator."""

    def __init__(self, function: Function) -> None:
        super().__init__(N, dtype=torch.float64, device="cpu")
        self._multiply = function

    def _matmat(self, V: Tensor) -> Tensor:
        return self._multiply(V)


@pytest.mark.parametrize("question", sorted(QUESTIONS))
@pytest.mark.parametrize("careless", CARELESS)
@pytest.mark.parametrize("kind", [lambda f: FunctionOperator(N, f), Subclass])
def test_what_a_product_does_to_memory_changes_no_answer(
    kind: Callable[[Function], SymmetricOperator], careless: Any, question: str
) -> None:
    A, ask = matrix(), QUESTIONS[question]
    assert plain(ask(kind(careless(A)))) == plain(ask(kind(lambda v: A @ v)))


@pytest.mark.parametrize("careless", CARELESS)
@pytest.mark.parametrize("kind", [lambda f: FunctionOperator(N, f), Subclass])
def test_vectors_of_the_caller_stay_and_products_too(
    kind: Callable[[Function], SymmetricOperator], careless: Any
) -> None:
    A = matrix()
    operator = kind(careless(A))
    V = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = V.clone()
    first, second = operator @ V[:, 0], operator @ V[:, 1]
    block, again = operator @ V, operator @ V.flip(1)
    assert torch.equal(V, before)
    torch.testing.assert_close(first, A @ V[:, 0])
    torch.testing.assert_close(second, A @ V[:, 1])
    torch.testing.assert_close(block, A @ V)
    torch.testing.assert_close(again, A @ V.flip(1))
    # What is done with a product changes neither the operator nor another product.
    block.zero_()
    torch.testing.assert_close(again, A @ V.flip(1))


@pytest.mark.parametrize("careless", CARELESS)
def test_adapters_pass_on_whole_vectors(careless: Any) -> None:
    A = matrix()
    x = np.linspace(-1, 1, N)
    expected = A.numpy() @ x
    for operator in (FunctionOperator(N, careless(A)), Subclass(careless(A))):
        adapter = operator.to_scipy()
        first, second = adapter @ x, adapter @ np.ones(N)
        np.testing.assert_allclose(first, expected, atol=1e-14)
        np.testing.assert_allclose(second, A.numpy() @ np.ones(N), atol=1e-14)
        assert np.array_equal(x, np.linspace(-1, 1, N))
        adapted = operator.to_linear_operator()
        v = torch.from_numpy(x)
        torch.testing.assert_close(adapted @ v, A @ v)
        assert np.array_equal(x, np.linspace(-1, 1, N))


def one_row(A: Tensor) -> Tensor:
    """A product whose row 3 is another, as where a hook changes one parameter's gradient."""
    return torch.cat([A[:3], 1.5 * A[3:4], A[4:]])


def scaled_rows(A: Tensor) -> Tensor:
    """Gradients divided by frequencies, as in an embedding."""
    return torch.linspace(1, 2, N, dtype=A.dtype)[:, None] * A


def skewed(size: float) -> Callable[[Tensor], Tensor]:
    """A skew part of a given size relative to the matrix."""

    def skew(A: Tensor) -> Tensor:
        K = torch.randn(N, N, dtype=A.dtype, generator=torch.Generator().manual_seed(3))
        K = K - K.T
        return A + size * float(A.norm() / K.norm()) * K

    return skew


def one_entry(A: Tensor) -> Tensor:
    """A thousandth more in a single entry off the diagonal."""
    wrong = A.clone()
    wrong[2, 5] += 1e-3 * A.abs().max()
    return wrong


ASYMMETRIC: dict[str, Callable[[Tensor], Tensor]] = {
    "one row": one_row,
    "rows": scaled_rows,
    "one entry": one_entry,
    "skew 1": skewed(1.0),
    "skew 1e-3": skewed(1e-3),
    "skew 1e-9": skewed(1e-9),
}


@pytest.mark.parametrize("question", sorted(QUESTIONS))
@pytest.mark.parametrize("name", ASYMMETRIC)
def test_no_question_answers_for_products_that_are_not_symmetric(name: str, question: str) -> None:
    for scale in (1e-8, 1.0, 1e100):
        wrong = ASYMMETRIC[name](matrix()) * scale
        with pytest.raises(ComputationError, match="the products are not symmetric"):
            QUESTIONS[question](FunctionOperator(N, lambda v, B=wrong: B @ v))  # type: ignore[misc]


@pytest.mark.parametrize("question", sorted(QUESTIONS))
@pytest.mark.parametrize("name", ["one row", "rows", "skew 1e-3"])
def test_nor_in_float32(name: str, question: str) -> None:
    wrong = ASYMMETRIC[name](matrix()).float()
    A = FunctionOperator(N, lambda v: wrong @ v, dtype=torch.float32)
    for _ in range(2):  # nor the second time
        with pytest.raises(ComputationError, match="the products are not symmetric"):
            QUESTIONS[question](A)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda A: -A,
        lambda A: A.shifted(3.0),
        lambda A: hvpspec.PreconditionedOperator(A, torch.linspace(1, 2, N)),
    ],
)
def test_nor_through_a_wrapper(wrap: Callable[[SymmetricOperator], SymmetricOperator]) -> None:
    wrong = one_row(matrix())
    for question, ask in QUESTIONS.items():
        with pytest.raises(ComputationError, match="not symmetric"):
            ask(wrap(FunctionOperator(N, lambda v: wrong @ v)))
        assert ask(wrap(FunctionOperator(N, lambda v: matrix() @ v))) is not None, question


def test_nor_when_products_are_kept(tmp_path: Any) -> None:
    wrong = one_row(matrix())
    for question, ask in QUESTIONS.items():
        with (
            hvpspec.RecordedOperator(
                FunctionOperator(N, lambda v: wrong @ v), tmp_path / question
            ) as R,
            pytest.raises(ComputationError, match="not symmetric"),
        ):
            ask(R)


def test_a_matrix_is_compared_entry_by_entry_before_it_is_an_operator() -> None:
    for name, wrong in ASYMMETRIC.items():
        for question, ask in QUESTIONS.items():
            with pytest.raises(InputError, match="the matrix is not symmetric"):
                ask(wrong(matrix()))
            assert name, question


@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e-8, 1.0, 1e8, 1e100])
@pytest.mark.parametrize("name", HOSTILE)
def test_symmetric_products_pass_in_any_precision(name: str, scale: float) -> None:
    A = rotated(HOSTILE[name]) * scale
    for outer, inner in (
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        B = A.to(inner)
        if bool(torch.isfinite(B).all()):
            operator = FunctionOperator(
                len(A),
                lambda v, B=B: B @ v.to(B.dtype),  # type: ignore[misc]
                dtype=outer,
            )
            operator.check_symmetry()
            assert operator.num_matvecs == 0


@pytest.mark.parametrize("form", ["factors", "Gram", "differences"])
@pytest.mark.parametrize("inner", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 5, 200])
def test_so_do_products_that_are_symmetric_up_to_round_off(
    n: int, inner: torch.dtype, form: str
) -> None:
    """Computed in ways of which the matrix itself is not exactly symmetric."""
    outer = torch.float64 if inner == torch.float64 else torch.float32
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        J = torch.randn(n + 3, n, dtype=torch.float64, generator=generator)
        d = 10 ** (-6 * torch.rand(n + 3, dtype=torch.float64, generator=generator))
        narrow, weights = J.to(inner), d.to(inner)

        def by_factors(v: Tensor, J: Tensor = narrow, d: Tensor = weights) -> Tensor:
            return (J.T * d) @ (J @ v.to(inner))

        def by_gram(v: Tensor, J: Tensor = narrow) -> Tensor:
            return J.T @ (J @ v.to(inner)) / len(J)

        def by_differences(v: Tensor, J: Tensor = J, d: Tensor = d) -> Tensor:
            """Of a gradient, which is not linear."""

            def gradient(x: Tensor) -> Tensor:
                return J.T @ (d * torch.sinh(J @ x))

            h = 1e-4
            return (gradient(h * v.double()) - gradient(-h * v.double())) / (2 * h)

        function = {"factors": by_factors, "Gram": by_gram, "differences": by_differences}[form]
        FunctionOperator(n, function, dtype=outer).check_symmetry()


def test_the_check_is_made_once_and_not_counted() -> None:
    A, calls = matrix(), [0]

    def multiply(v: Tensor) -> Tensor:
        calls[0] += 1
        return A @ v

    operator = FunctionOperator(N, multiply)
    estimate = hvpspec.trace(operator, 9, generator=torch.Generator().manual_seed(0))
    assert calls[0] == operator.num_matvecs + 4 == estimate.num_matvecs + 4 == 13
    hvpspec.eigsh(operator, 2)
    assert calls[0] == operator.num_matvecs + 4


def test_round_off_of_half_precision_enters_the_floor() -> None:
    """Products in half precision are symmetric as far as they go, and the floor says how far."""
    values = torch.cat([torch.linspace(-1, -0.5, 7), torch.linspace(0.5, 1, 43)])
    exact = rotated(values)
    narrow = exact.half()
    A = FunctionOperator(50, lambda v: (narrow @ v.half()).float(), dtype=torch.float32)
    error = float(torch.linalg.matrix_norm(narrow.double() - exact, 2))
    for method in ("exact", "certified"):
        result = hvpspec.index(A, tau=0.2, method=method)  # type: ignore[arg-type]
        assert result.index == 7
        assert error / 4 < result.noise_floor < 0.2
