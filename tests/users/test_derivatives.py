"""Products that are no derivative of the gradient, and gradients that are not the loss's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import hvpspec
from hvpspec import HessianOperator, Loss
from tests.users.truth import (
    Function,
    all_right,
    check_message,
    every_question,
    hessian,
    refused,
    relative_error,
    right,
    right_or_all_refused,
    right_or_refused,
)

DTYPES = (torch.float64, torch.float32)

#: Products in float32 are sums of some hundred terms, each off by 6e-8.
FLOAT32_ROUNDOFF = 1e-4


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else FLOAT32_ROUNDOFF


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same network every time, its weights in float32, so that a float64 copy is exact."""
    torch.manual_seed(1)
    return build().to(dtype).eval()


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(n: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(5))


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def around(function: Callable[[Tensor], Tensor], width: int = 5) -> nn.Module:
    """A network with the function in it, and parameters on both sides."""
    return nn.Sequential(nn.Linear(4, width), Apply(function), nn.Linear(width, 3))


class SavedIntermediate(torch.autograd.Function):
    """x sigmoid(x), whose backward takes the saved sigmoid for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        return g * (s + x * s * (1 - s))


class NoGraph(SavedIntermediate):
    """The same with a backward that records nothing, as a kernel's."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return SavedIntermediate.backward(ctx, g)


class Numpy(SavedIntermediate):
    """The same with a backward that leaves PyTorch."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        found = SavedIntermediate.backward(ctx, g).detach().numpy().copy()
        return torch.from_numpy(found)


class Once(SavedIntermediate):
    """The same, marked as differentiable once."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return SavedIntermediate.backward(ctx, g)


class SavedInput(SavedIntermediate):
    """The same as it should be: everything is computed from the saved input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Doubled(SavedInput):
    """A backward that is wrong by a factor of two."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * SavedInput.backward(ctx, g)


@pytest.mark.parametrize("dtype", DTYPES)
class TestFunctionsOfOnesOwn:
    """An autograd.Function in the network."""

    def make(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> HessianOperator:
        net = seeded(lambda: around(function), dtype)
        return HessianOperator(net, nn.CrossEntropyLoss(), (inputs(30, 4, dtype=dtype), labels(30)))

    def truth(self) -> Tensor:
        x, y = inputs(30, 4), labels(30)
        return hessian(seeded(lambda: around(F.silu)), lambda call: F.cross_entropy(call(x), y))

    @pytest.mark.parametrize("function", [SavedIntermediate, NoGraph, Numpy, Once, Doubled])
    def test_wrong(self, function: Any, dtype: torch.dtype) -> None:
        make = partial(self.make, function.apply, dtype)
        assert not right_or_all_refused(make, self.truth(), tolerance(dtype))
        for method in ("inertia", "quadrature", "filtered"):
            refused(partial(hvpspec.index, make(), 1e-3, method=method))

    @pytest.mark.parametrize("function", [F.silu, SavedInput.apply])
    def test_right(self, function: Any, dtype: torch.dtype) -> None:
        all_right(partial(self.make, function, dtype), self.truth(), tolerance(dtype))


class TestSmallParts:
    """What is wrong in a small part of a network is wrong."""

    @pytest.mark.parametrize("function", [SavedIntermediate, NoGraph])
    def test_one_unit_of_many(self, function: Any) -> None:
        def mixed(x: Tensor) -> Tensor:
            return torch.cat([F.silu(x[:, 1:]), function.apply(x[:, :1])], 1)

        def plain(x: Tensor) -> Tensor:
            return torch.cat([F.silu(x[:, 1:]), F.silu(x[:, :1])], 1)

        x, y = inputs(30, 4), labels(30)
        truth = hessian(seeded(lambda: around(plain, 12)), lambda call: F.cross_entropy(call(x), y))
        make = partial(
            HessianOperator, seeded(lambda: around(mixed, 12)), nn.CrossEntropyLoss(), (x, y)
        )
        assert not right_or_all_refused(make, truth)

    def test_one_example_of_many(self) -> None:
        """Only in the last batch is the function one's own."""

        def mixed(x: Tensor) -> Tensor:
            return NoGraph.apply(x) if len(x) == 6 else F.silu(x)

        x, y = inputs(30, 4), labels(30)
        truth = hessian(seeded(lambda: around(F.silu)), lambda call: F.cross_entropy(call(x), y))
        batches = list(zip(x.split((12, 12, 6)), y.split((12, 12, 6)), strict=True))
        net = seeded(lambda: around(mixed))
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), batches)
        assert not right_or_all_refused(make, truth)

    def test_in_the_loss(self) -> None:
        def loss(o: Tensor, t: Tensor) -> Tensor:
            return (NoGraph.apply(o).sum(1) - t).square().mean()

        def plain(o: Tensor, t: Tensor) -> Tensor:
            return (F.silu(o).sum(1) - t).square().mean()

        x, y = inputs(30, 4), inputs(30, seed=2)
        net = seeded(lambda: around(torch.tanh))
        truth = hessian(net, lambda call: plain(call(x), y))
        assert not right_or_all_refused(partial(HessianOperator, net, loss, (x, y)), truth)

    def test_in_parameters_that_are_not_selected(self) -> None:
        """The function's input does not depend on what is selected: nothing is wrong."""
        x, y = inputs(30, 4), labels(30)
        net = seeded(lambda: around(NoGraph.apply))
        names = ["2.weight", "2.bias"]
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y), names)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y), params="2.*"), truth)


class Field(nn.Module):
    """The right-hand side of an ordinary differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y)


def runge_kutta(f: Callable[..., tuple[Tensor, ...]], y: tuple[Tensor, ...], h: float) -> Any:
    """One step of the classical method for a tuple of states."""

    def moved(k: tuple[Tensor, ...], by: float) -> tuple[Tensor, ...]:
        return tuple(a + by * b for a, b in zip(y, k, strict=True))

    k1 = f(*y)
    k2 = f(*moved(k1, h / 2))
    k3 = f(*moved(k2, h / 2))
    k4 = f(*moved(k3, h))
    slopes = zip(k1, k2, k3, k4, strict=True)
    return moved(tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in slopes), h)


STEPS = 2


class Adjoint(torch.autograd.Function):
    """Solve forwards without a graph, and the adjoint equation backwards, also without one."""

    @staticmethod
    def forward(ctx: Any, field: nn.Module, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.field = field
        with torch.no_grad():
            for _ in range(STEPS):
                (y,) = runge_kutta(lambda z: (field(z),), (y,), 1 / STEPS)
        ctx.save_for_backward(y, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, *parameters = ctx.saved_tensors

        def augmented(y: Tensor, a: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                z = y.detach().requires_grad_()
                f = ctx.field(z)
                found = torch.autograd.grad(
                    f, (z, *parameters), a.detach(), allow_unused=True, materialize_grads=True
                )
            return (f.detach(), *(-v for v in found))

        with torch.no_grad():
            state = (y, g, *(torch.zeros_like(p) for p in parameters))
            for _ in range(STEPS):
                state = runge_kutta(augmented, state, -1 / STEPS)
        return (None, *state[1:])


class Flow(nn.Module):
    """The solution at time 1, differentiated through the steps or by the adjoint."""

    def __init__(self, adjoint: bool) -> None:
        super().__init__()
        self.field, self.adjoint = Field(), adjoint

    def forward(self, y: Tensor) -> Tensor:
        if self.adjoint:
            return Adjoint.apply(self.field, y, *self.field.parameters())
        for _ in range(STEPS):
            (y,) = runge_kutta(lambda z: (self.field(z),), (y,), 1 / STEPS)
        return y


class TestAdjoint:
    """A neural ODE whose gradient comes from the adjoint equation."""

    def test_alone(self) -> None:
        """The gradient has no graph at all: its derivative is not zero."""
        x, y = inputs(20, 2), inputs(20, 2, seed=3)
        truth = hessian(seeded(lambda: Flow(False)), lambda call: F.mse_loss(call(x), y))
        all_right(lambda: HessianOperator(seeded(lambda: Flow(False)), nn.MSELoss(), (x, y)), truth)
        make: Any = lambda: HessianOperator(seeded(lambda: Flow(True)), nn.MSELoss(), (x, y))  # noqa: E731
        assert not right_or_all_refused(make, truth)

    def test_in_a_classifier(self) -> None:
        def build(adjoint: bool) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 2), Flow(adjoint), nn.Linear(2, 3))

        x, y = inputs(20, 2), labels(20)
        truth = hessian(seeded(lambda: build(False)), lambda call: F.cross_entropy(call(x), y))
        make: Any = lambda: HessianOperator(  # noqa: E731
            seeded(lambda: build(True)), nn.CrossEntropyLoss(), (x, y)
        )
        assert not right_or_all_refused(make, truth)

    def test_allowed(self) -> None:
        """A gradient that is no derivative, and products that are none of it: never certified."""
        x, y = inputs(20, 2), inputs(20, 2, seed=3)
        H = HessianOperator(seeded(lambda: Flow(True)), nn.MSELoss(), (x, y), pseudo_gradient=True)
        try:
            assert not hvpspec.index(H, 1e-3).certified
        except hvpspec.HvpspecError as error:
            check_message(error)


class Bag(nn.Module):
    """The mean of embeddings."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, scale_grad_by_freq=scale)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.embed(tokens)).mean(1))))


class Hooked(nn.Module):
    """A hook on the gradient of the hidden layer."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.hook = nn.Linear(4, 5), nn.Linear(5, 3), hook

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if h.requires_grad:
            h.register_hook(self.hook)
        return self.b(h)


class Reversal(torch.autograd.Function):
    """The identity, through which the gradient comes back negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Adversary(nn.Module):
    """Labels from the features, and domains from the same features after a reversal."""

    def __init__(self, reverse: bool) -> None:
        super().__init__()
        self.body, self.label, self.domain = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.reverse = reverse

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.label(h), self.domain(Reversal.apply(h) if self.reverse else h)


def adversarial(outputs: Any, targets: Any) -> Tensor:
    return sum(F.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True))


class TestGradientsOfSomethingElse:
    """The gradient that comes back is not that of the loss."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scale_grad_by_freq(self, dtype: torch.dtype) -> None:
        tokens = torch.randint(9, (30, 5), generator=torch.Generator().manual_seed(2))
        y = labels(30)
        truth = hessian(seeded(lambda: Bag(False)), lambda call: F.cross_entropy(call(tokens), y))

        def make(scale: bool, **options: Any) -> HessianOperator:
            net = seeded(lambda: Bag(scale), dtype)
            return HessianOperator(net, nn.CrossEntropyLoss(), (tokens, y), **options)

        all_right(lambda: make(False), truth, tolerance(dtype))
        assert not right_or_all_refused(lambda: make(True), truth, tolerance(dtype))
        # Its products are not symmetric, which nothing allows.
        refused(lambda: make(True, pseudo_gradient=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_tensor_hook_that_clamps(self, dtype: torch.dtype) -> None:
        x, y = inputs(30, 4), labels(30)

        def make(hook: Any) -> HessianOperator:
            net = seeded(lambda: Hooked(hook), dtype)
            return HessianOperator(net, nn.CrossEntropyLoss(), (x.to(dtype), y))

        truth = hessian(
            seeded(lambda: Hooked(lambda g: None)), lambda call: F.cross_entropy(call(x), y)
        )
        for hook in (lambda g: g.clamp(-2e-3, 2e-3), lambda g: g / (1e-3 + g.norm())):
            assert not right_or_all_refused(partial(make, hook), truth, tolerance(dtype))
        seen: list[Tensor] = []
        all_right(lambda: make(seen.append), truth, tolerance(dtype))
        # One that clamps nothing changes nothing.
        all_right(lambda: make(lambda g: g.clamp(-1e3, 1e3)), truth, tolerance(dtype))

    def test_a_hook_on_a_parameter(self) -> None:
        """It belongs to training; the loss has nothing of it, and neither has the Hessian."""
        x, y = inputs(30, 4), labels(30)
        net = seeded(lambda: around(torch.tanh))
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        net[0].weight.register_hook(lambda g: torch.zeros_like(g))
        right_or_refused(lambda: HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)

    def test_gradient_reversal(self) -> None:
        x, y = inputs(30, 4), (labels(30), labels(30, 2))
        truth = hessian(seeded(lambda: Adversary(False)), lambda call: adversarial(call(x), y))

        def make(reverse: bool, **options: Any) -> HessianOperator:
            return HessianOperator(
                seeded(lambda: Adversary(reverse)), adversarial, (x, y), **options
            )

        all_right(lambda: make(False), truth)
        assert not right_or_all_refused(lambda: make(True), truth)
        allowed = hvpspec.index(make(True, pseudo_gradient=True), tau=1e-6)
        assert not allowed.certified

    # PyTorch says that no gradient by the data is asked for.
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
    @pytest.mark.parametrize("before", ["0", "1", "2"])
    def test_a_full_backward_hook_that_negates(self, before: str) -> None:
        x, y = inputs(30, 4), labels(30)
        net = seeded(lambda: around(torch.tanh))
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        net.get_submodule(before).register_full_backward_hook(
            lambda module, grad_in, grad_out: tuple(None if g is None else -g for g in grad_in)
        )
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        # Negating what the first layer hands to the data changes no gradient.
        assert right_or_all_refused(make, truth) or before != "0"
        bound = self.bound(make)
        negative = int((torch.linalg.eigvalsh(truth) < -1e-10).sum())
        assert bound is None or bound >= negative

    def bound(self, make: Any) -> int | None:
        """The structural bound, None where it is refused."""
        try:
            found = make().structural_upper_bound()
        except hvpspec.HvpspecError:
            return None
        return None if found is None else found.upper

    def test_the_bound_under_a_hook_that_negates(self) -> None:
        """With the pseudo-gradient allowed there is an index, and no bound that it breaks."""
        x, y = inputs(30, 4), labels(30)
        net = seeded(lambda: around(torch.tanh))
        net.get_submodule("2").register_full_backward_hook(
            lambda module, grad_in, grad_out: tuple(-g for g in grad_in)
        )
        loss = nn.CrossEntropyLoss()
        assert self.bound(partial(HessianOperator, net, loss, (x, y), pseudo_gradient=True)) is None
        try:
            alone = hvpspec.structural_upper_bound(net, loss, (x, y))
        except hvpspec.HvpspecError:
            alone = None
        assert alone is None

    def test_a_full_backward_hook_that_looks(self) -> None:
        x, y = inputs(30, 4), labels(30)
        net = seeded(lambda: around(torch.tanh))
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        seen: list[Any] = []
        net.get_submodule("1").register_full_backward_hook(
            lambda module, grad_in, grad_out: seen.append(grad_out)
        )
        all_right(lambda: HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)

    @pytest.mark.parametrize("kind", ["semi-gradient", "stop-gradient"])
    def test_detached_parts_that_depend_on_parameters(self, kind: str) -> None:
        """Temporal differences and siamese networks: the loss moves with what is detached."""

        def loss(o: Tensor, t: Any) -> Tensor:
            if kind == "semi-gradient":
                return (o[:, 0] - 0.9 * o[:, 1].detach() - t).square().mean()
            return -F.cosine_similarity(o + 0.1, o.flip(1).detach(), dim=1).mean()

        x, y = inputs(30, 4), inputs(30, seed=2)
        net = seeded(lambda: around(torch.tanh))
        f = Function(net, lambda call: loss(call(x), y))
        make = partial(HessianOperator, net, loss, (x, y))
        assert not right_or_all_refused(make, f.second_differences(), 1e-4)


def straight_through(x: Tensor) -> Tensor:
    """Round forwards, the identity backwards."""
    return x + (x.mul(4).round().div(4) - x).detach()


class Spike(torch.autograd.Function):
    """A step forwards, a smooth surrogate backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g / (1 + 4 * x.abs()) ** 2


def spiking(x: Tensor) -> Tensor:
    """Leaky integration over three steps, with soft resets."""
    voltage, spikes = torch.zeros_like(x), []
    for _ in range(3):
        voltage = 0.8 * voltage + x
        spike = Spike.apply(voltage - 0.5)
        voltage = voltage - spike
        spikes.append(spike)
    return torch.stack(spikes).mean(0)


def fake_quantised(x: Tensor) -> Tensor:
    """PyTorch's own operation of quantisation-aware training."""
    return torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -8, 7)


class QuantisedWeights(nn.Module):
    """A layer whose weight is rounded in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(F.linear(x, fake_quantised(self.a.weight), self.a.bias)))


PSEUDO: dict[str, Callable[[], nn.Module]] = {
    "straight-through": lambda: around(straight_through),
    "straight-through after tanh": lambda: around(lambda x: straight_through(torch.tanh(x))),
    "binary weights": lambda: around(lambda x: torch.tanh(x) + (x.sign() - torch.tanh(x)).detach()),
    "spikes": lambda: around(spiking),
    "fake_quantize of activations": lambda: around(fake_quantised),
    "fake_quantize of weights": QuantisedWeights,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PSEUDO)
class TestPseudoGradients:
    """Straight-through estimators, surrogate spikes, quantisation-aware training."""

    def make(self, name: str, dtype: torch.dtype, **options: Any) -> HessianOperator:
        x, y = inputs(30, 4, dtype=dtype), labels(30)
        net = seeded(PSEUDO[name], dtype)
        return HessianOperator(net, nn.CrossEntropyLoss(), (x, y), **options)

    def test_refused(self, name: str, dtype: torch.dtype) -> None:
        # Piecewise constant in part: no tolerance makes a number for it right by chance.
        n = 43
        truth = torch.full((n, n), torch.nan, dtype=torch.float64)
        for question in ("exact", "inertia", "certified", "quadrature"):
            message = refused(
                lambda q=question: hvpspec.index(self.make(name, dtype), 1e-3, method=q)
            )
            assert "pseudo_gradient=True" in message
        generator = torch.Generator().manual_seed(0)
        H = self.make(name, dtype)
        for ask in (
            lambda: hvpspec.eigsh(H, 1),
            lambda: hvpspec.trace(H, 10, generator=generator),
            lambda: hvpspec.diagonal(H, 10, generator=generator),
            lambda: hvpspec.spectral_measure(H, 2, 5, generator=generator),
            lambda: H.to_dense(),
            lambda: right(H, truth),
        ):
            refused(ask)

    def test_allowed_but_not_certified(self, name: str, dtype: torch.dtype) -> None:
        for method in ("exact", "inertia", "certified"):
            H = self.make(name, dtype, pseudo_gradient=True)
            result = hvpspec.index(H, 1e-3, method=method)
            assert not result.certified
            assert any("gradient" in note for note in (*H.notes, *result.facts.notes))
            assert result.bound is None


class Centres(nn.Module):
    """Radial basis functions whose centres start at data points."""

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], at: Tensor) -> None:
        super().__init__()
        self.c, self.o, self.distance = nn.Parameter(at.clone()), nn.Linear(len(at), 1), distance

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.exp(-self.distance(x, self.c)))


SQUARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda x, c: torch.linalg.norm(x[:, None] - c[None], dim=-1) ** 2,
    "vector_norm": lambda x, c: torch.linalg.vector_norm(x[:, None] - c[None], dim=-1).square(),
    "method norm": lambda x, c: (x[:, None] - c[None]).norm(dim=-1) ** 2,
    "cdist": lambda x, c: torch.cdist(x, c) ** 2,
    "cdist without matrices": lambda x, c: (
        torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    ),
    "abs": lambda x, c: ((x[:, None] - c[None]).abs() ** 2).sum(-1),
    "sqrt": lambda x, c: (x[:, None] - c[None]).square().sum(-1).add(1e-300).sqrt() ** 2,
}


class TestAtZero:
    """A smooth function by way of one that is not: ``abs(x)**2`` at 0."""

    def net(self, distance: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> nn.Module:
        return seeded(lambda: Centres(distance, inputs(30, 3)[:6]), dtype)

    def square(self, x: Tensor, c: Tensor) -> Tensor:
        return (x[:, None] - c[None]).square().sum(-1)

    def truth(self) -> Tensor:
        x, y = inputs(30, 3), inputs(30, 1, seed=1)
        return hessian(self.net(self.square, torch.float64), lambda call: F.mse_loss(call(x), y))

    def make(
        self, distance: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
    ) -> HessianOperator:
        data = (inputs(30, 3, dtype=dtype), inputs(30, 1, dtype=dtype, seed=1))
        return HessianOperator(self.net(distance, dtype), nn.MSELoss(), data)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_squares(self, dtype: torch.dtype) -> None:
        all_right(partial(self.make, self.square, dtype), self.truth(), tolerance(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", SQUARED)
    def test_centres_at_data_points(self, name: str, dtype: torch.dtype) -> None:
        make = partial(self.make, SQUARED[name], dtype)
        # Some are right in float64, in which the exact index is found.
        every_question(make, self.truth(), tolerance(dtype))

    def test_pairwise_distance(self) -> None:
        """It adds 1e-6 to each difference, and is smooth: right, up to what cancels there."""
        x, y = inputs(30, 3), inputs(30, 1, seed=1)

        def shifted(x: Tensor, c: Tensor) -> Tensor:
            return (x[:, None] - c[None] + 1e-6).square().sum(-1)

        def pairwise(x: Tensor, c: Tensor) -> Tensor:
            return F.pairwise_distance(x[:, None], c[None]) ** 2

        truth = hessian(
            seeded(lambda: Centres(shifted, x[:6])), lambda call: F.mse_loss(call(x), y)
        )
        net = seeded(lambda: Centres(pairwise, x[:6]))
        every_question(lambda: HessianOperator(net, nn.MSELoss(), (x, y)), truth)

    @pytest.mark.parametrize("penalty", ["norm", "abs", "frobenius"])
    def test_a_penalty_at_zero(self, penalty: str) -> None:
        """An adapter that starts at zero, with a squared norm on it."""

        class Adapter(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.up = nn.Linear(4, 3), nn.Parameter(torch.zeros(3, 2))
                self.down = nn.Parameter(torch.randn(2, 4))

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.a(x) + x @ (self.up @ self.down).T, self.up

        def size(w: Tensor) -> Tensor:
            if penalty == "norm":
                return w.norm() ** 2
            return (w.abs() ** 2).sum() if penalty == "abs" else torch.linalg.matrix_norm(w) ** 2

        x, y = inputs(30, 4), labels(30)
        net = seeded(Adapter)

        def value(o: Any, t: Tensor) -> Tensor:
            return F.cross_entropy(o[0], t) + o[1].square().sum()

        truth = hessian(net, lambda call: value(call(x), y))
        right(HessianOperator(net, Loss(value, whole=True), (x, y)), truth)
        loss = Loss(lambda o, t: F.cross_entropy(o[0], t) + size(o[1]), whole=True)
        every_question(lambda: HessianOperator(net, loss, (x, y)), truth)


class TestSaturated:
    """Binary cross-entropy of probabilities, inside a loss of one's own."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
    @pytest.mark.parametrize("where", ["loss", "network"])
    def test_inside_a_function(self, scale: float, dtype: torch.dtype, where: str) -> None:
        x = inputs(30, 4) * scale
        y = (inputs(30, seed=7) > 0).to(torch.float64)

        def logits(call: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(call(x).squeeze(1), y)

        def build(*last: nn.Module) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1), *last)

        truth = hessian(seeded(build), logits)
        if where == "loss":
            net = seeded(build, dtype)
            loss: Any = lambda o, t: F.binary_cross_entropy(o.sigmoid().squeeze(1), t)  # noqa: E731
        else:
            net = seeded(lambda: build(nn.Sigmoid()), dtype)
            loss = lambda o, t: F.binary_cross_entropy(o.squeeze(1), t)  # noqa: E731
        make = partial(HessianOperator, net, loss, (x.to(dtype), y.to(dtype)))
        # A probability near 1 has lost the digits of its distance from 1.
        every_question(make, truth, 1e-6 if dtype == torch.float64 else 1e-3)

    def test_logs_of_clamped_probabilities(self) -> None:
        """Written out with a clamp, the function is another, and its derivatives are right."""
        x = inputs(30, 4) * 30
        y = (inputs(30, seed=7) > 0).to(torch.float64)

        def loss(o: Tensor, t: Tensor) -> Tensor:
            p = o.sigmoid().squeeze(1).clamp(1e-7, 1 - 1e-7)
            return -(t * p.log() + (1 - t) * (1 - p).log()).mean()

        net = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 1)))
        truth = hessian(net, lambda call: loss(call(x), y))
        assert right_or_refused(lambda: HessianOperator(net, loss, (x, y)), truth)


class Checkpointed(nn.Module):
    """A checkpoint over an input that requires gradients, as adapters' trainers make it."""

    def __init__(self, reentrant: bool | None, *, of: str = "input") -> None:
        super().__init__()
        self.a, self.b, self.reentrant, self.of = nn.Linear(4, 4), nn.Linear(4, 4), reentrant, of

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() if self.of == "input" else self.b(x)
        inner: Callable[[Tensor], Tensor] = lambda z: torch.tanh(self.a(z))  # noqa: E731
        if self.reentrant is None:
            return self.a(inner(x))
        return self.a(checkpoint(inner, x, use_reentrant=self.reentrant))


class TestCheckpoints:
    """Activations that are computed again in the backward pass."""

    @pytest.mark.parametrize("of", ["input", "hidden layer"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_over_an_input(self, reentrant: bool, of: str) -> None:
        x, y = inputs(14, 4), 3 * inputs(14, 4, seed=1)
        net = seeded(lambda: Checkpointed(None, of=of))
        for name, p in net.named_parameters():
            p.requires_grad_(of != "input" or not name.startswith("b"))
        truth = hessian(net, lambda call: F.mse_loss(call(x), y))
        gradient = Function(net, lambda call: F.mse_loss(call(x), y)).gradient()
        net.reentrant = reentrant
        make = partial(HessianOperator, net, nn.MSELoss(), (x, y))
        answered = right_or_all_refused(make, truth)
        assert answered or reentrant
        try:
            found = make().gradient()
        except hvpspec.HvpspecError:
            assert reentrant
        else:
            assert relative_error(found, gradient) < 1e-9
        bound = TestGradientsOfSomethingElse().bound(make)
        assert bound is None or bound >= int((torch.linalg.eigvalsh(truth) < -1e-10).sum())


KINKED: list[Callable[[Tensor], Tensor]] = [
    F.relu, F.leaky_relu, F.relu6, F.hardtanh, F.softshrink, F.hardshrink, torch.abs, F.selu,
    F.hardswish, lambda x: torch.maximum(x, 0.3 * x), lambda x: F.threshold(x, 0.1, 0.1),
    lambda x: x.sort(dim=1).values, lambda x: x.clamp(-0.5, 0.5),
]  # fmt: skip
SMOOTH: list[Callable[[Tensor], Tensor]] = [
    F.elu, F.celu, F.softsign, F.tanhshrink, F.gelu, F.mish, torch.sin, lambda x: F.relu(x) ** 2,
    lambda x: torch.where(x > 0, x, x.exp() - 1),
]  # fmt: skip


class TestNoFalseAlarm:
    """Kinks, flat places and steep ones are no faults."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", [*KINKED, *SMOOTH])
    def test_activations(self, activation: Any, dtype: torch.dtype) -> None:
        self.check(activation, dtype, 30)

    @pytest.mark.parametrize("activation", KINKED)
    def test_many_examples(self, activation: Any) -> None:
        """The more examples, the more of them have a kink near the step of a difference."""
        self.check(activation, torch.float32, 400)

    def check(self, activation: Any, dtype: torch.dtype, n: int) -> None:
        x, y = inputs(n, 4), labels(n)
        net = seeded(lambda: around(activation))
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        H = HessianOperator(
            seeded(lambda: around(activation), dtype), nn.CrossEntropyLoss(), (x.to(dtype), y)
        )
        right(H, truth, tolerance(dtype))

    @pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
    def test_scales_of_the_loss(self, scale: float) -> None:
        x, y = inputs(30, 4), labels(30)
        net = seeded(lambda: around(F.relu))
        loss = Loss(lambda o, t: scale * F.cross_entropy(o, t))
        truth = hessian(net, lambda call: scale * F.cross_entropy(call(x), y))
        all_right(lambda: HessianOperator(net, loss, (x, y)), truth)

    @pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
    def test_scales_of_the_parameters(self, scale: float) -> None:
        """Parameters of very different sizes: one step does not suit them all."""

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
                with torch.no_grad():
                    self.a.weight *= scale

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.tanh(F.linear(x, self.a.weight / scale, self.a.bias)))

        x, y = inputs(30, 4), labels(30)
        net = seeded(Scaled)
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)

    def test_at_a_minimum(self) -> None:
        """The gradient is zero, the products are not."""
        x = inputs(30, 4)
        net = seeded(lambda: around(torch.tanh))
        with torch.no_grad():
            y = net(x).clone()
        truth = hessian(net, lambda call: F.mse_loss(call(x), y))
        all_right(lambda: HessianOperator(net, nn.MSELoss(), (x, y)), truth)

    def test_where_everything_is_flat(self) -> None:
        """Dead units: the gradient and the Hessian are zero, with and without a graph."""
        x, y = inputs(30, 4), inputs(30, 5, seed=2)
        net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
        with torch.no_grad():
            net[0].bias -= 100
        H = HessianOperator(net, nn.MSELoss(), (x, y))
        assert float(H.to_dense().abs().max()) == 0

    def test_a_loss_linear_in_the_parameters(self) -> None:
        """A gradient without a graph is right there: its derivative is zero."""
        x = inputs(30, 4)
        net = seeded(lambda: nn.Linear(4, 1))
        H = HessianOperator(net, lambda o, t: (o * t).mean(), (x, inputs(30, 1, seed=2)))
        assert float(H.to_dense().abs().max()) == 0
