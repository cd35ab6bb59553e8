"""Small networks, losses and data on which an operator is compared with its matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev


@dataclass(frozen=True)
class Case:
    """A network with a loss on data, all in float64, built anew for each use."""

    name: str
    model: Callable[[], nn.Module]
    loss: Any
    inputs: Callable[[], tuple[Tensor, ...]]
    targets: Callable[[], Tensor]

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
        """Return the network and its data, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model, inputs, targets = self.model(), self.inputs(), self.targets()
        return model.double().eval(), inputs, targets

    def __str__(self) -> str:
        return self.name


_KNOWN: dict[str, Tensor] = {}


def dense_hessian(
    case: Case, model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor, names: list[str]
) -> Tensor:
    """The Hessian of the loss on all the data at once, by torch.func.hessian; shape (n, n).

    It is slow, so that of each case, which is built the same every time, is computed once.
    """
    if case.name not in _KNOWN:
        _KNOWN[case.name] = _dense_hessian(case, model, inputs, targets, names)
    return _KNOWN[case.name]


def _dense_hessian(
    case: Case, model: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor, names: list[str]
) -> Tensor:
    network, theta = as_function(model, inputs, names)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return hessian(lambda vector: case.loss(network(vector), targets))(theta)


def as_function(
    model: nn.Module, inputs: tuple[Tensor, ...], names: list[str]
) -> tuple[Callable[[Tensor], Any], Tensor]:
    """A network's outputs as a function of some parameters in a vector, and that vector."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [parameters[name].numel() for name in names]

    def network(vector: Tensor) -> Any:
        parts = vector.split(sizes)
        changed = {n: p.view_as(parameters[n]) for n, p in zip(names, parts, strict=True)}
        return functional_call(model, {**parameters, **changed}, inputs)

    return network, torch.cat([parameters[name].reshape(-1) for name in names])


def dense_gauss_newton(
    network: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], theta: Tensor
) -> Tensor:
    """``J^T H J`` with H the Hessian of the loss by the outputs, by torch.func; shape (n, n)."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        z, J = network(theta), jacrev(network)(theta)
        J = J.reshape(z.numel(), -1)
        return J.T @ hessian(loss)(z).reshape(z.numel(), -1) @ J


class Tied(nn.Module):
    """An embedding whose weight is also the output head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens))).mean(1))


class Frozen(nn.Module):
    """A frozen first layer, a used second and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.first.requires_grad_(False)
        self.second = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    """One block of self-attention with LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(F.scaled_dot_product_attention(y, y, y, is_causal=True).mean(1))


class TwoInputs(nn.Module):
    """Two inputs, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) * torch.sigmoid(self.right(b))


class Recurrent(nn.Module):
    """An LSTM whose last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tokens(nn.Module):
    """A per-position classifier of tokens, outputs (batch, classes, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens))).mT


def normalised() -> nn.Module:
    """A convolution with BatchNorm whose running statistics are not the initial ones."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3),
    )  # fmt: skip
    model(torch.randn(20, 1, 4, 4))
    return model


def mlp(activation: type[nn.Module]) -> Callable[[], nn.Module]:
    """A perceptron 5-4-3 with the given activation."""
    return lambda: nn.Sequential(nn.Linear(5, 4), activation(), nn.Linear(4, 3))


N = 11


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """One input of N examples."""
    return lambda: (torch.randn(N, *shape, dtype=torch.float64),)


def integers(high: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """One input of N examples of tokens."""
    return lambda: (torch.randint(high, (N, *shape)),)


def labels(classes: int, *shape: int) -> Callable[[], Tensor]:
    """Targets for N examples."""
    return lambda: torch.randint(classes, (N, *shape))


def ignored() -> Tensor:
    """Token targets of which many, and a whole example's, are ignored."""
    targets = torch.randint(5, (N, 6))
    targets[torch.rand(N, 6) < 0.4] = -100
    targets[3] = -100
    return targets


CLASS_WEIGHTS = torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)


def plain_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of the user's own: the mean over examples of a quartic."""
    return ((outputs.softmax(1) - F.one_hot(targets, 3)) ** 4).sum(1).mean()


CASES = [
    Case("relu-mlp", mlp(nn.ReLU), nn.CrossEntropyLoss(), floats(5), labels(3)),
    Case("tanh-mlp", mlp(nn.Tanh), F.cross_entropy, floats(5), labels(3)),
    Case("gelu-mlp-sum", mlp(nn.GELU), nn.CrossEntropyLoss(reduction="sum"), floats(5), labels(3)),
    Case("class-weights", mlp(nn.Tanh), nn.CrossEntropyLoss(CLASS_WEIGHTS), floats(5), labels(3)),
    Case(
        "label-smoothing",
        mlp(nn.Tanh),
        nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1),
        floats(5),
        labels(3),
    ),
    Case(
        "class-probabilities",
        mlp(nn.Tanh),
        nn.CrossEntropyLoss(CLASS_WEIGHTS),
        floats(5),
        lambda: torch.randn(N, 3, dtype=torch.float64).softmax(1),
    ),
    Case(
        "regression",
        lambda: nn.Linear(5, 2),
        nn.MSELoss(),
        floats(5),
        lambda: torch.randn(N, 2, dtype=torch.float64),
    ),
    Case(
        "binary",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1), nn.Flatten(0)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0, dtype=torch.float64)),
        floats(5),
        lambda: torch.randint(2, (N,)).double(),
    ),
    Case("own-loss", mlp(nn.Tanh), plain_mean, floats(5), labels(3)),
    Case("convolution", normalised, nn.CrossEntropyLoss(), floats(1, 4, 4), labels(3)),
    Case("tied", Tied, nn.CrossEntropyLoss(), integers(7, 3), labels(7)),
    Case("frozen-unused", Frozen, nn.CrossEntropyLoss(), floats(5), labels(3)),
    Case("attention", Attention, nn.CrossEntropyLoss(), floats(3, 4), labels(3)),
    Case("recurrent", Recurrent, nn.CrossEntropyLoss(), floats(3, 3), labels(3)),
    Case("ignored-tokens", Tokens, nn.CrossEntropyLoss(), integers(6, 6), ignored),
    Case(
        "two-inputs",
        TwoInputs,
        nn.SmoothL1Loss(),
        lambda: (
            torch.randn(N, 3, dtype=torch.float64),
            torch.randn(N, 4, dtype=torch.float64),
        ),
        lambda: torch.randn(N, 2, dtype=torch.float64),
    ),
]
