"""The dense Hessian with a linear layer's own block from its inputs, against unit vectors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.utils.data import DataLoader, TensorDataset

import hvpspec
from hvpspec import HessianOperator, index
from hvpspec.curvature.kronecker import NUM_CHECKS, largest_linear
from hvpspec.curvature.losses import Loss
from hvpspec.curvature.parameters import select_parameters

N = 23


def products_alone(H: HessianOperator) -> Tensor:
    """The matrix by unit vectors."""
    A = H @ torch.eye(H.shape[0], dtype=H.dtype)
    return (A + A.T) / 2


def difference(A: Tensor, B: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A - B) / torch.linalg.matrix_norm(B))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build().double()


def random_data(*shape: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(N, *shape, generator=generator, dtype=torch.float64)
    return X, torch.randint(classes, (N,), generator=generator)


def mlp(activation: type[nn.Module] = nn.Tanh, *, bias: bool = True) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(13, 6, bias=bias), activation(), nn.Linear(6, 5, bias=bias))
    )


def frozen(*names: str) -> nn.Module:
    model = mlp()
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def convolutional() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 5)
        )
    )


def ignoring(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The data with every third target ignored, and all of the second chunk of 4."""
    y = y.clone()
    y[::3] = -100
    y[4:8] = -100
    return X, y


def by_oracle(model: nn.Module, loss: Any, X: Tensor, y: Tensor, names: tuple[str, ...]) -> Tensor:
    """The Hessian by torch.func.hessian."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [parameters[name].numel() for name in names]

    def risk(vector: Tensor) -> Tensor:
        parts = zip(names, vector.split(sizes), strict=True)
        changed = {name: part.view_as(parameters[name]) for name, part in parts}
        return loss(functional_call(model, {**parameters, **changed}, (X,)), y)

    return hessian(risk)(torch.cat([parameters[name].reshape(-1) for name in names]))


CE, IMAGES, VECTORS = nn.CrossEntropyLoss(), random_data(1, 8, 8), random_data(13)
ONE_HOT = VECTORS[0], F.one_hot(VECTORS[1], 5).double()
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([0.3, 1.7, 0.9, 2.0, 0.1], dtype=torch.float64))

# Name: model, loss, data, and how many columns are left to products.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[Tensor, Tensor], int]] = {
    "relu": (lambda: mlp(nn.ReLU), CE, VECTORS, 35),
    "tanh": (mlp, CE, VECTORS, 35),
    "convolution": (convolutional, CE, IMAGES, 20),
    "no-bias": (lambda: mlp(bias=False), CE, VECTORS, 30),
    "frozen-bias": (lambda: frozen("0.bias"), CE, VECTORS, 35),
    "frozen-elsewhere": (lambda: frozen("2.weight", "2.bias"), CE, VECTORS, 0),
    "class-weights": (mlp, WEIGHTED, VECTORS, 35),
    "ignored": (mlp, CE, ignoring(*VECTORS), 35),
    "squares-sum": (mlp, nn.MSELoss(reduction="sum"), ONE_HOT, 35),
    "linear-loss": (mlp, lambda o, t: (o * t).sum(1).mean(), ONE_HOT, 35),
    "layer-alone": (lambda: seeded(lambda: nn.Linear(13, 5)), CE, VECTORS, 0),
}


@pytest.mark.parametrize("chunk_size", [4, N], ids=["chunks", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_hessian_and_saves_its_products(name: str, chunk_size: int) -> None:
    build, loss, (X, y), num_others = CASES[name]
    H = HessianOperator(build(), loss, (X, y), chunk_size=chunk_size)
    A = H.to_dense()
    assert H.num_matvecs == num_others + NUM_CHECKS
    expected = by_oracle(build(), loss, X, y, H.space.names)
    assert difference(A, expected) < 1e-12
    assert bool((A == A.T).all())


def test_l2_and_a_parameter_without_path() -> None:
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    H = HessianOperator(model, CE, VECTORS, l2=0.3)
    A = H.to_dense()
    plain = HessianOperator(model, CE, VECTORS).to_dense()
    assert difference(A, products_alone(H)) < 1e-12
    assert difference(A - plain, 0.6 * torch.eye(len(A), dtype=torch.float64)) < 1e-12
    assert not plain[:2].any()


@pytest.mark.parametrize("params", ["0", ["0.weight", "2.bias"], "*.weight", ["2", "0.weight"]])
def test_selected_parameters(params: Any) -> None:
    H = HessianOperator(mlp(), CE, VECTORS, params=params)
    A = H.to_dense()
    assert H.num_matvecs < len(A)
    assert difference(A, products_alone(H)) < 1e-12


def test_a_layer_whose_weight_is_frozen_is_left_to_products() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 8)))
    for params, name in ((None, "0"), (["0.bias", "2"], "2")):
        layer = largest_linear(model, select_parameters(model, params))
        assert layer is not None
        assert layer.name == name
    for params in (["0.bias", "2.bias"], "*.bias"):
        assert largest_linear(model, select_parameters(model, params)) is None
    few = mlp()
    assert largest_linear(few, select_parameters(few, ["0.bias", "2"])) is None  # saves 27


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_ragged_batches_from_a_loader(batch_size: int) -> None:
    loader = DataLoader(TensorDataset(*VECTORS), batch_size=batch_size)
    H = HessianOperator(mlp(nn.ReLU), CE, loader)
    A = H.to_dense()
    assert H.num_matvecs == 35 + NUM_CHECKS
    assert difference(A, products_alone(HessianOperator(mlp(nn.ReLU), CE, VECTORS))) < 1e-12


@pytest.mark.parametrize("chunk_size", [600, 2000])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_many_examples_with_wide_inputs(activation: type[nn.Module], chunk_size: int) -> None:
    """More rows than one piece, more columns than one stripe, and inputs that are dead at first."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(1300, 300, generator=generator, dtype=torch.float64)
    X[:, 200:220] = 0  # on every example
    X[:600, 30:180] = 0  # in the first chunk alone
    X[600:, 250:] = 0  # in all but the first
    y = torch.randint(3, (1300,), generator=generator)
    model = seeded(lambda: nn.Sequential(nn.Linear(300, 2), activation(), nn.Linear(2, 3)))
    H = HessianOperator(model, CE, (X, y), chunk_size=chunk_size)
    A = H.to_dense()
    assert H.num_matvecs == 9 + NUM_CHECKS
    assert difference(A, products_alone(H)) < 1e-12
    assert not A[200:220].any()


def test_either_side_of_the_spectrum_is_as_fast() -> None:
    H = HessianOperator(mlp(), CE, VECTORS)
    positive = index(H, side="positive", method="exact")
    assert positive.num_matvecs == 35 + NUM_CHECKS + 4
    assert positive.index == index(H, method="exact").positive
    shifted = H.shifted(2.0)
    expected = H.to_dense() + 2 * torch.eye(H.shape[0], dtype=torch.float64)
    torch.testing.assert_close(shifted.to_dense(), expected)
    assert shifted.num_matvecs == 35 + NUM_CHECKS


def test_float32() -> None:
    model = mlp(nn.ReLU)
    narrow = HessianOperator(copy.deepcopy(model).float(), CE, VECTORS)
    A = narrow.to_dense()
    assert A.dtype == torch.float32
    assert narrow.num_matvecs == 35 + NUM_CHECKS
    assert difference(A.double(), HessianOperator(model, CE, VECTORS).to_dense()) < 1e-6


class Tied(nn.Module):
    """A linear layer whose weight is that of another, or is used without the layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        if how == "tied":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        if self.how == "twice":
            z = torch.tanh(self.first(z))
        elif self.how == "functional":
            z = torch.tanh(F.linear(z, self.first.weight))
        return self.second(z)


class Slope(nn.Module):
    """The derivative of a network by its inputs, which uses each weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(13, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = self.second(torch.tanh(self.first(x)))
        return torch.autograd.grad(value.sum(), x, create_graph=True)[0] + value


class Sequence(nn.Module):
    """A linear layer at each of three positions, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(4, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.wide(x)).mean(1))


class Rows(nn.Module):
    """The same with all positions of all examples as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sequence()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.inner.wide(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.inner.head(z.mean(1))


class Doubled(nn.Linear):
    """A subclass with another forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Unhooked(nn.Module):
    """A layer that is used, but not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: Tied("tied"), (8,)),
        (lambda: Tied("twice"), (8,)),
        (lambda: Tied("functional"), (8,)),
        (Slope, (13,)),
        (Sequence, (3, 4)),
        (Rows, (3, 4)),
        (lambda: Doubled(13, 5), (13,)),
        (Unhooked, (13,)),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(13, 5)), (13,)),
    ],
    ids=[
        "tied",
        "twice",
        "functional",
        "slope",
        "sequence",
        "rows",
        "subclass",
        "unhooked",
        "parametrised",
    ],
)
def test_other_uses_of_a_layer_are_left_to_products(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    X, y = random_data(*shape, classes=3)
    H = HessianOperator(seeded(build), CE, (X, y), chunk_size=9)
    seen: list[tuple[int, int]] = []
    A = H.to_dense(progress=lambda *done: seen.append(done))
    assert H.num_matvecs == H.shape[0]
    assert seen == [H.shape]
    assert difference(A, products_alone(H)) < 1e-12


class Centred(nn.Module):
    """Subtracts the mean over the batch, in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.01 * x.mean(0)


def centred() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(13, 6), Centred(), nn.Tanh(), nn.Linear(6, 5)))


COUPLED = Loss(lambda o, t: F.cross_entropy(o, t) + 1e-4 * (o.mean(0) ** 2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("build", "loss"), [(centred, CE), (mlp, COUPLED)], ids=["model", "loss"])
def test_examples_that_depend_on_each_other_are_left_to_products(
    build: Callable[[], nn.Module], loss: Any, dtype: torch.dtype
) -> None:
    H = HessianOperator(build(), loss, VECTORS, dtype=dtype)
    A = H.to_dense()
    assert H.num_matvecs == H.shape[0]
    assert difference(A, products_alone(H)) < 30 * torch.finfo(dtype).eps


def test_what_the_products_contradict_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvpspec.curvature.kronecker._are_coupled", lambda *_: False)
    H = HessianOperator(centred(), CE, VECTORS)
    seen: list[tuple[int, int]] = []
    with pytest.warns(UserWarning, match=r"layer '0'.*by \d\.\de-0\d .* 84 products take its"):
        A = H.to_dense(progress=lambda *done: seen.append(done))
    n = H.shape[0]
    assert H.num_matvecs == n + NUM_CHECKS
    assert difference(A, products_alone(H)) < 1e-12
    assert seen == sorted(seen)
    assert seen[-1] == (n, n)


class Autocast(nn.Module):
    """A linear layer computed in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x).float()


def test_a_layer_in_another_dtype_is_left_to_products() -> None:
    X, y = VECTORS
    H = HessianOperator(seeded(Autocast).float(), CE, (X.float(), y))
    H.to_dense()
    assert H.num_matvecs == 70


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(13, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(self.first(x))

        return self.head(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))


def test_checkpointed_layer() -> None:
    H = HessianOperator(seeded(Checkpointed), CE, VECTORS, chunk_size=9)
    assert difference(H.to_dense(), products_alone(H)) < 1e-12


def test_hooks_of_the_caller_stay_and_are_respected() -> None:
    model = mlp()
    handle = model[0].register_forward_hook(lambda module, args, output: output**2)
    H = HessianOperator(model, CE, VECTORS)
    assert difference(H.to_dense(), products_alone(H)) < 1e-12
    assert list(model[0]._forward_hooks) == [handle.id]


class Fragile(nn.Module):
    """Fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.broken = nn.Linear(13, 5), False

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        if self.broken:
            raise ZeroDivisionError("in the model")
        return z


def test_no_hook_stays_behind() -> None:
    model = seeded(Fragile)
    H = HessianOperator(model, CE, VECTORS)
    H.to_dense()
    model.broken = True
    with pytest.raises(ZeroDivisionError, match="in the model"):
        H.to_dense()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs


def test_errors_are_those_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x)

    model = seeded(lambda: nn.Sequential(nn.Linear(13, 5), Layer()))
    with pytest.raises(hvpspec.NotDifferentiableError, match="once_differentiable"):
        HessianOperator(model, CE, VECTORS).to_dense()
    H = HessianOperator(mlp(), CE, VECTORS)
    monkeypatch.setattr("hvpspec.linalg.memory.available_memory", lambda device: 1000)
    with pytest.raises(hvpspec.InputError, match="a dense 119 x 119 matrix needs"):
        H.to_dense()


def test_no_warning_from_round_off() -> None:
    """The check's tolerance holds in both dtypes, for scales of the loss and of the inputs."""
    X, y = VECTORS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64):
            for scale in (1e-4, 1.0, 30.0):
                H = HessianOperator(mlp(nn.GELU), CE, (scale * X, y), dtype=dtype)
                H.to_dense()
                assert H.num_matvecs == 35 + NUM_CHECKS
