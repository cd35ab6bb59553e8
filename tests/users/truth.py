"""What is right, by plain double backward of the loss over all the data at once, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpspec
from hvpspec import HvpspecError
from hvpspec.linalg import SymmetricOperator

#: Runs the model with the parameters in question.
Call = Callable[..., Any]
Make = Callable[[], SymmetricOperator]

#: Both sides are sums of a few thousand float64 terms, in another order: 1e-13 of the largest entry
#: is usual. A wrong matrix is off by a thousandth or more.
ROUNDOFF = 1e-9


class Whole(nn.Module):
    """A network and a loss with parameters of its own, which is what is to be differentiated."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: tuple[Any, ...], targets: Any) -> Tensor:
        return self.loss(self.model(*inputs), targets)


def as_vector(tensor: Tensor) -> Tensor:
    """A parameter as part of a vector, complex numbers as pairs of reals."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().reshape(-1)


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """Part of a vector in the shape of a parameter."""
    if parameter.is_complex():
        return torch.view_as_complex(part.clone().reshape(*parameter.shape, 2))
    return part.reshape(parameter.shape).clone()  # so that a layer may write into it


class Function:
    """A loss over all the data as a function of a vector of a network's parameters.

    Args:
        model: the network, in the mode that is meant.
        loss: from a function that runs the network, the loss over all the data.
        names: the parameters that move; None for all that require gradients, in their order.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[Call], Tensor], names: list[str] | None = None
    ) -> None:
        self._model, self._loss = model, loss
        self._parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._names = names or [name for name, p in model.named_parameters() if p.requires_grad]
        vectors = [as_vector(self._parameters[name]) for name in self._names]
        self._sizes = [len(vector) for vector in vectors]
        self.theta = torch.cat(vectors)

    def __call__(self, theta: Tensor) -> Tensor:
        parts = zip(self._names, theta.split(self._sizes), strict=True)
        moved = {name: like(part, self._parameters[name]) for name, part in parts}
        # A copy: what a network keeps from a pass is not to reach the next.
        fixed = {name: p.clone() for name, p in self._parameters.items()}
        # Flash attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return self._loss(
                lambda *args, **kwargs: functional_call(
                    self._model, {**fixed, **moved}, args, kwargs
                )
            )

    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """The gradient, shape (n,)."""
        theta = (self.theta if theta is None else theta).detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(self(theta), theta)
        return g

    def products(self, V: Tensor) -> Tensor:
        """The Hessian times the columns of V, shape (n, k)."""
        theta = self.theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(self(theta), theta, create_graph=True)
        columns = []
        for v in V.T:
            columns.append(
                torch.autograd.grad(g, theta, v, retain_graph=True, materialize_grads=True)[0]
                if g.requires_grad
                else torch.zeros_like(theta)
            )
        return torch.stack(columns, 1)

    def hessian(self) -> Tensor:
        """The Hessian by double backward, shape (n, n)."""
        return self.products(torch.eye(len(self.theta), dtype=self.theta.dtype))

    def differences(self, step: float = 1e-5) -> Tensor:
        """The Hessian by central differences of the gradient, good to about 1e-9, shape (n, n)."""
        moves = step * torch.eye(len(self.theta), dtype=self.theta.dtype)
        columns = [self.gradient(self.theta + e) - self.gradient(self.theta - e) for e in moves]
        H = torch.stack(columns, 1) / (2 * step)
        return (H + H.T) / 2

    def second_differences(self, step: float = 1e-3) -> Tensor:
        """The Hessian from values alone, good to about 1e-6, shape (n, n)."""
        n = len(self.theta)
        moves = step * torch.eye(n, dtype=self.theta.dtype)
        H = torch.zeros(n, n, dtype=self.theta.dtype)
        with torch.no_grad():
            for i in range(n):
                for j in range(i + 1):
                    corners = [
                        sign * self(self.theta + moves[i] + sign * moves[j])
                        - sign * self(self.theta - moves[i] + sign * moves[j])
                        for sign in (1, -1)
                    ]
                    H[i, j] = H[j, i] = sum(corners) / (4 * step**2)
        return H


def hessian(
    model: nn.Module, loss: Callable[[Call], Tensor], names: list[str] | None = None
) -> Tensor:
    """The Hessian of a loss over all the data at once; see :class:`Function`."""
    return Function(model, loss, names).hessian()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error in units of the largest entry."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(expected.abs().max())
    return float((actual.double() - expected).abs().max()) / (scale or 1.0)


def check_message(error: BaseException) -> str:
    """Check that a refusal can be read: at most two sentences and 400 characters."""
    message = str(error)
    assert message
    assert len(message) <= 400, message
    assert len(re.split(r"(?<=[.!?])\s+(?=[A-Z])", message.strip())) <= 2, message
    assert message.count("\n") <= 1, message
    return message


def refused(make: Callable[[], Any]) -> str:
    """Require a refusal that can be read; return what it says.

    Args:
        make: makes an operator, of which the matrix is then asked, or anything else.
    """
    with pytest.raises(HvpspecError) as caught:
        _ask_for_the_matrix(make)
    return check_message(caught.value)


def _ask_for_the_matrix(make: Callable[[], Any]) -> None:
    made = make()
    if isinstance(made, SymmetricOperator):
        made.to_dense()


def right(operator: SymmetricOperator, truth: Tensor, tolerance: float = ROUNDOFF) -> None:
    """Require the right products and the right matrix."""
    V = torch.randn(len(truth), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = operator @ V.to(operator.dtype)
    scale = float(truth.abs().max()) or 1.0
    error = float((products.double() - truth @ V).abs().max()) / (scale * len(truth) ** 0.5)
    assert error < tolerance, f"products are off by {error:.1e}"
    error = relative_error(operator.to_dense(), truth)
    assert error < tolerance, f"the matrix is off by {error:.1e}"


def right_or_refused(make: Make, truth: Tensor, tolerance: float = ROUNDOFF) -> bool:
    """Require the right matrix, or a refusal that can be read; return whether there is an answer.

    Args:
        make: makes the operator; what it raises counts, too.
        truth: the Hessian of the loss over all the data, shape (n, n).
        tolerance: of the entries, in units of the largest.
    """
    try:
        right(make(), truth, tolerance)
    except HvpspecError as error:
        check_message(error)
        return False
    return True


def gap(values: Tensor) -> float:
    """A resolution far from every eigenvalue, at which some count as negative if any are.

    Args:
        values: the eigenvalues.
    """
    norm = float(values.abs().max())
    # Not among those that are 0 up to round-off.
    sizes = values.abs().clamp(1e-4 * norm, norm).unique()
    edges = torch.cat([sizes.new_tensor([1e-4 * norm]), sizes]).log().unique()
    k = int(edges.diff().argmax())
    return float(((edges[k] + edges[k + 1]) / 2).exp())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Questions:
    """Everything that is asked of an operator, each with the answer that is right.

    Args:
        truth: the Hessian, shape (n, n).
        tolerance: of the entries, in units of the largest.
    """

    def __init__(self, truth: Tensor, tolerance: float = ROUNDOFF) -> None:
        self.truth, self.tolerance = truth, tolerance
        self.values = torch.linalg.eigvalsh(truth)
        self.norm = float(self.values.abs().max())
        self.tau = gap(self.values)
        self.index = int((self.values < -self.tau).sum())
        self.all: dict[str, Callable[[SymmetricOperator], None]] = {
            "matrix": lambda H: right(H, truth, tolerance),
            "exact index": self._exact,
            "certified index": self._certified,
            "eigsh": self._extreme,
            "trace": self._trace,
            "diagonal": self._diagonal,
            "density": self._density,
        }

    def _exact(self, H: SymmetricOperator) -> None:
        assert hvpspec.index(H, self.tau, method="exact").index == self.index

    def _certified(self, H: SymmetricOperator) -> None:
        result = hvpspec.index(H, self.tau, method="certified", max_matvecs=600)
        assert result.lower <= self.index <= result.upper, result
        assert result.index in (None, self.index)

    def _extreme(self, H: SymmetricOperator) -> None:
        found = float(hvpspec.eigsh(H, 1, "LA", generator=_generator()).values[0])
        assert abs(found - float(self.values[-1])) <= 10 * self.tolerance * self.norm

    def _trace(self, H: SymmetricOperator) -> None:
        n = len(self.truth)
        # As many products as there are columns: the exact trace.
        found = hvpspec.trace(H, max(4, n), generator=_generator()).value
        assert abs(found - float(self.truth.trace())) <= 10 * self.tolerance * n * self.norm

    def _diagonal(self, H: SymmetricOperator) -> None:
        n = len(self.truth)
        found = hvpspec.diagonal(H, max(4, n), generator=_generator()).value
        assert float((found - self.truth.diagonal()).abs().max()) <= 10 * self.tolerance * self.norm

    def _density(self, H: SymmetricOperator) -> None:
        measure = hvpspec.spectral_measure(H, 2, 10, generator=_generator())
        # The same probes on the true matrix see the same measure, whose second moment is compared.
        true = hvpspec.spectral_measure(self.truth.to(H.dtype), 2, 10, generator=_generator())
        found, expected = (float(m.expectation(torch.square).value) for m in (measure, true))
        assert abs(found - expected) <= 100 * self.tolerance * self.norm**2


def every_question(make: Make, truth: Tensor, tolerance: float = ROUNDOFF) -> dict[str, bool]:
    """Require of every question a right answer or a refusal, each asked of a new operator.

    What is refused must be refused again: an error is no warning to be given once.

    Returns:
        Which questions were answered.
    """
    answered: dict[str, bool] = {}
    for name, ask in Questions(truth, tolerance).all.items():
        try:
            H = make()
        except HvpspecError as error:
            check_message(error)
            answered[name] = False
            continue
        answered[name] = _answers(ask, H)
        if not answered[name]:
            assert not _answers(ask, H), f"{name}: refused, and answered when asked again"
    return answered


def _answers(ask: Callable[[SymmetricOperator], None], H: SymmetricOperator) -> bool:
    try:
        ask(H)
    except HvpspecError as error:
        check_message(error)
        return False
    return True


def all_right(make: Make, truth: Tensor, tolerance: float = ROUNDOFF) -> None:
    """Require the right answer to every question."""
    assert all(every_question(make, truth, tolerance).values())


def right_or_all_refused(make: Make, truth: Tensor, tolerance: float = ROUNDOFF) -> bool:
    """Require that all questions are answered rightly or that all are refused; which it was."""
    answered = every_question(make, truth, tolerance)
    assert len(set(answered.values())) == 1, answered
    return all(answered.values())


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested attributes of a module."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, list | tuple | set):
        return [t for v in value for t in tensors_of(v)]
    return []


class AsFound:
    """Check that a model is left as it was.

    Attributes, state, flags and gradients are compared by identity and value.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._look()
        self.values = {k: v.clone() for k, v in model.state_dict().items()}

    def _look(self) -> list[Any]:
        seen: list[Any] = []
        for name, module in self.model.named_modules():
            seen.append((name, module.training))
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    seen.append((name, key, [id(t) for t in tensors_of(value)]))
            for key, p in module.named_parameters(recurse=False):
                seen.append((name, key, id(p), p.requires_grad, id(p.grad)))
        return seen

    def check(self) -> None:
        """Compare."""
        for name, module in self.model.named_modules():
            for key, value in vars(module).items():
                if key not in ("_parameters", "_buffers", "_modules"):
                    ours = [t for t in tensors_of(value) if t.requires_grad]
                    assert not ours, f"{name}.{key} holds a tensor that requires gradients"
        assert self._look() == self.before
        after = self.model.state_dict()
        assert after.keys() == self.values.keys()
        for name, value in self.values.items():
            assert torch.equal(after[name], value), name
