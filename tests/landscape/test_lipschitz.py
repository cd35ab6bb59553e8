"""Lipschitz constants of the Hessian: proved ones are never too small, and refusals say why."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpspec.curvature.objective import Objective
from hvpspec.errors import InputError
from hvpspec.landscape.landscapes import FunctionLandscape, NetworkLandscape
from hvpspec.landscape.lipschitz import (
    ESTIMATE_SAFETY,
    derivative_bounds,
    estimated_lipschitz,
    proved_lipschitz,
    third_derivative,
)
from hvpspec.zoo.networks import build_network

# A threshold that no test crosses; PyTorch's softplus jumps by 2e-9 at its own, 20.
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh,
    nn.Sigmoid,
    lambda: nn.Softplus(threshold=1e4),
    lambda: nn.Softplus(beta=3, threshold=1e4),
    nn.LogSigmoid,
    nn.GELU,
    lambda: nn.GELU(approximate="tanh"),
    nn.SiLU,
]


def why_unproved(objective: Objective) -> str:
    """Why no constant is proved; empty where one is."""
    try:
        proved_lipschitz(objective, torch.zeros(objective.space.dim), 0.1)
    except InputError as error:
        return str(error)
    return ""


class Case:
    """A random network with a random loss and data, all in float64."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)
        images = self.integer(2) == 1
        self.net, outputs = self.network(images)
        num_examples = 1 + self.integer(5)
        shape = (self.channels, 4, 3) if images else (self.channels,)
        self.x = self.normal(num_examples, *shape) * 3 ** self.uniform(-1, 1)
        reduction = "mean" if self.integer(2) else "sum"
        if self.integer(3) == 0:
            self.loss: nn.Module = nn.MSELoss(reduction=reduction)
            self.y = self.normal(num_examples, outputs)
        else:
            self.loss, self.y = self.cross_entropy(num_examples, outputs, reduction)
        names = [name for name, _ in self.net.named_parameters()]
        chosen = [name for name in names if self.integer(3)] or names[:1]
        self.objective = Objective(
            self.net,
            self.loss,
            (self.x, self.y),
            params=names if self.integer(2) else chosen,
            chunk_size=2,
            l2=0.1,
        )
        self.space = self.objective.space
        self.theta = self.space.flatten(dict(self.net.named_parameters())).detach()
        self.radius = 10 ** self.uniform(-6, 0)

    def integer(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.g))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.g))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g, dtype=torch.float64)

    def network(self, images: bool) -> tuple[nn.Module, int]:
        depth = 1 + self.integer(4)
        self.channels = 1 + self.integer(3 if images else 6)
        x = torch.ones(2, self.channels, 4, 3) if images else torch.ones(2, self.channels)
        layers: list[nn.Module] = []
        for k in range(depth):
            added: list[nn.Module] = []
            if x.ndim == 4 and k < max(1, depth - 1):
                added.append(self.convolution(x.shape[1]))
            else:
                width = 1 + self.integer(6)
                added += [nn.Flatten(), nn.Linear(x[0].numel(), width, bias=self.integer(3) > 0)]
            if k < depth - 1:
                added.append(ACTIVATIONS[self.integer(len(ACTIVATIONS))]())
                added.append(nn.Dropout(0.5) if self.integer(2) else nn.Identity())
            if isinstance(added[0], nn.Conv2d) and self.integer(2):
                inside = self.integer(2) == 1
                added.append(nn.AvgPool2d(2, padding=1, ceil_mode=True, count_include_pad=inside))
            x = nn.Sequential(*added).eval()(x)
            layers += added
        if x.ndim == 4:
            layers += [nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten()]
        net = nn.Sequential(*layers).double().eval()
        scale = 0.1 * 30 ** self.uniform(0, 1)
        with torch.no_grad():
            for p in net.parameters():
                fan = p[0].numel() if p.ndim > 1 else 1
                p.copy_(self.normal(*p.shape) * scale / fan**0.5)
        return net, x.shape[1] * (2 if x.ndim == 4 else 1)

    def convolution(self, width: int) -> nn.Module:
        groups = width if self.integer(3) == 0 else 1
        out = groups * (1 + self.integer(2))
        return nn.Conv2d(
            width,
            out,
            (1 + self.integer(3), 1 + self.integer(2)),
            stride=1 + self.integer(2),
            padding=(2, 1 + self.integer(2)),  # the window fits into one pixel
            dilation=1 + self.integer(2),
            groups=groups,
            bias=self.integer(3) > 0,
        )

    def cross_entropy(self, n: int, classes: int, reduction: str) -> tuple[nn.Module, Tensor]:
        weight = torch.rand(classes, generator=self.g, dtype=torch.float64) + 0.1
        loss = nn.CrossEntropyLoss(
            weight=weight if self.integer(3) == 0 else None,
            label_smoothing=0.3 * self.integer(2),
            reduction=reduction,
        )
        if self.integer(4) == 0:
            return loss, self.normal(n, classes).softmax(1)
        y = torch.randint(classes, (n,), generator=self.g)
        if n > 1 and self.integer(3) == 0:
            y[-1] = -100
        return loss, y

    def value(self, theta: Tensor) -> Tensor:
        """The loss without l2, independently of Objective."""
        parts = self.space.unflatten(theta)
        return self.loss(torch.func.functional_call(self.net, parts, self.x), self.y)

    def third(self, theta: Tensor, v: Tensor) -> Tensor:
        """D^3 L[v, v, .] by three backward passes."""
        theta = theta.clone().requires_grad_()
        f = self.value(theta)
        for _ in range(2):
            (slope,) = torch.autograd.grad(
                f, theta, create_graph=True, allow_unused=True, materialize_grads=True
            )
            f = slope @ v
        if not f.requires_grad:
            return torch.zeros_like(theta)
        (third,) = torch.autograd.grad(f, theta, allow_unused=True, materialize_grads=True)
        return third

    def direction(self) -> Tensor:
        v = self.normal(len(self.theta))
        return v / v.norm()

    def in_ball(self) -> Tensor:
        return self.theta + self.radius * self.uniform(0, 1) ** 0.1 * self.direction()

    def largest_third(self, theta: Tensor) -> float:
        """The largest |D^3 L[v, v, v]| from random directions on, by the power method."""
        largest = 0.0
        for _ in range(2):
            v = self.direction()
            for _ in range(4):
                third = self.third(theta, v)
                largest = max(largest, abs(float(third @ v)))
                if float(third.norm()) == 0:
                    break
                v = third / third.norm()
        return largest


@pytest.mark.parametrize("seed", range(50))
def test_the_proved_constant_is_never_too_small(seed: int) -> None:
    case = Case(seed)
    assert why_unproved(case.objective) == ""
    K = proved_lipschitz(case.objective, case.theta, case.radius)
    for theta in (case.theta, case.in_ball(), case.in_ball()):
        # What autograd computes of a third derivative that is zero is round-off.
        assert case.largest_third(theta) <= K + 1e-12 * (1 + K)
    for _ in range(2):
        x, y = case.in_ball(), case.in_ball()
        H = torch.autograd.functional.hessian(case.value, x)
        change = torch.linalg.matrix_norm(H - torch.autograd.functional.hessian(case.value, y), 2)
        assert change <= K * (x - y).norm() + 1e-13 * H.norm()


def test_the_random_networks_are_of_all_kinds() -> None:
    cases = [Case(seed) for seed in range(50)]
    kinds = {type(module).__name__ for case in cases for module in case.net.modules()}
    assert {"Linear", "Conv2d", "AvgPool2d", "Tanh", "Sigmoid", "Softplus"} <= kinds
    assert {"LogSigmoid", "GELU", "SiLU", "Dropout", "Identity"} <= kinds
    assert len({(type(case.loss), case.loss.reduction) for case in cases}) == 4
    assert any(len(case.space.names) < len(list(case.net.parameters())) for case in cases)
    assert any(case.y.dtype == torch.long and bool((case.y == -100).any()) for case in cases)


@pytest.mark.parametrize("make", ACTIVATIONS)
def test_bounds_of_activations_are_attained_and_never_exceeded(
    make: Callable[[], nn.Module],
) -> None:
    # Points 1e-4 apart meet a maximum to (1e-4)^2 / 8 times the next but one derivative, and bounds
    # are rounded up by 1e-8 at most. Beyond 20 all derivatives are constant.
    x = torch.linspace(-20, 20, 400_000, dtype=torch.float64, requires_grad=True)  # 0 is left out
    y = make()(x)
    for bound in derivative_bounds(make()):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        largest = float(y.detach().abs().max())
        assert (1 - 1e-7) * bound < largest <= bound * (1 + 1e-14)


@pytest.mark.parametrize("make", ACTIVATIONS)
def test_the_bound_is_attained_where_all_units_agree(make: Callable[[], nn.Module]) -> None:
    # Nine units phi(k + b) have along (1, 1) the third derivative 2 * 9 * sqrt(8) (3 D1 D2 + (phi -
    # y) D3), with Dk = phi^(k); y is chosen such that both terms have the same sign.
    net = nn.Sequential(nn.Conv2d(1, 1, 1), make()).double()
    theta = torch.tensor([0.3, 0.4], dtype=torch.float64)
    z = theta.sum().requires_grad_()
    slopes = [net[1](z)]
    for _ in range(3):
        slopes += torch.autograd.grad(slopes[-1], z, create_graph=True)
    value, first, second, third = (float(slope.detach()) for slope in slopes)
    sign = math.copysign(1, first * second * third)
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    objective = Objective(net, nn.MSELoss(reduction="sum"), (ones, (value - sign) * ones))
    exact = 18 * 8**0.5 * (3 * abs(first * second) + abs(third))
    assert math.isclose(proved_lipschitz(objective, theta, 0.0), exact, rel_tol=1e-5)


def test_the_bound_of_two_layers_is_not_far_off() -> None:
    # L = (u w)^2 at u = w = 1: along (cos t, sin t) the third derivative is 12 cos t sin t (cos t +
    # sin t), at most 12 / sqrt(2).
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    data = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    K = proved_lipschitz(Objective(net, nn.MSELoss(), data), torch.ones(2).double(), 0.0)
    # z1 = sqrt(2) and z2 = 1 are attained together, z3 is 0.
    assert math.isclose(K, 12 / 2**0.5, rel_tol=1e-5)


def test_a_loss_of_a_linear_network_is_bounded_by_the_loss_alone() -> None:
    x, y = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([0])
    net = nn.Linear(2, 2, bias=False).double()
    theta = torch.zeros(4, dtype=torch.float64)
    # |x|^3 times the largest third central moment; sqrt(2) times 1/2 would be more.
    K = proved_lipschitz(Objective(net, nn.CrossEntropyLoss(), (x, y)), theta, 1.0)
    assert math.isclose(K, 125 * 2**1.5 / (6 * 3**0.5), rel_tol=1e-5)
    squared = Objective(net, nn.MSELoss(), (x, x))
    assert proved_lipschitz(squared, theta, 1.0) == 0


def test_the_hessian_by_the_last_layer_alone_is_constant_for_a_squared_error() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.ones(5, 3).double(), torch.ones(5, 2).double()
    last = Objective(net, nn.MSELoss(), data, params="2")
    assert proved_lipschitz(last, torch.ones(last.space.dim).double(), 1.0) == 0
    assert proved_lipschitz(Objective(net, nn.MSELoss(), data), torch.ones(26).double(), 1.0) > 0


def test_less_can_happen_in_a_smaller_ball_and_with_fewer_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.ones(5, 3).double(), torch.zeros(5, dtype=torch.long)
    whole = Objective(net, nn.CrossEntropyLoss(), data)
    theta = whole.space.flatten(whole.leaves()).detach()
    found = [proved_lipschitz(whole, theta, r) for r in (0.0, 1e-3, 0.1, 10.0)]
    assert found == sorted(found)
    part = Objective(net, nn.CrossEntropyLoss(), data, params=["0.weight", "2.bias"])
    centre = part.space.flatten(part.leaves()).detach()
    assert proved_lipschitz(part, centre, 0.0) < found[0]


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_examples_count_as_they_do_in_the_loss(reduction: str, chunk_size: int | None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, -100, 2, 1, 0])
    weight = torch.tensor([1.0, 2.0, 0.5])
    loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.2)
    whole = Objective(net, loss, (x, y), chunk_size=chunk_size)
    theta = whole.space.flatten(whole.leaves()).detach()
    each = [
        proved_lipschitz(
            Objective(net, nn.CrossEntropyLoss(weight, reduction="sum", label_smoothing=0.2), pair),
            theta,
            0.1,
        )
        for pair in ((x[i : i + 1], y[i : i + 1]) for i in range(7))
    ]
    assert each[3] == 0
    total = sum(each) / (float(weight[y[y >= 0]].sum()) if reduction == "mean" else 1)
    assert math.isclose(proved_lipschitz(whole, theta, 0.1), total, rel_tol=1e-9)


def test_logits_in_several_rows_per_example() -> None:
    net = nn.Conv2d(2, 3, 1).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 2, 2, generator=g, dtype=torch.float64)
    objective = Objective(net, nn.CrossEntropyLoss(), (x, torch.ones(2, 2, 2, dtype=torch.long)))
    theta = objective.space.flatten(objective.leaves()).detach()
    K = proved_lipschitz(objective, theta, 0.0)
    F = NetworkLandscape(net, nn.CrossEntropyLoss(), (x, torch.ones(2, 2, 2, dtype=torch.long)))
    assert 0 < estimated_lipschitz(F, theta, generator=g) / ESTIMATE_SAFETY <= K


class Functional(nn.Module):
    """A chain by calls of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.conv(x)), 2)
        x = F.dropout(F.gelu(F.softplus(x)), 0.5, self.training)
        x = F.adaptive_avg_pool2d(x, (2, 2)).flatten(1)
        x = torch.flatten(F.tanh(x), 1).view(-1, 8).sigmoid()
        return self.head(F.silu(F.logsigmoid(x)))


def test_functions_count_as_the_modules_that_do_the_same() -> None:
    functions = Functional().double()
    modules = nn.Sequential(
        functions.conv, nn.Tanh(), nn.AvgPool2d(2), nn.Softplus(), nn.GELU(), nn.Dropout(),
        nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(),
        nn.SiLU(), functions.head,
    )  # fmt: skip
    data = torch.ones(2, 1, 8, 8).double(), torch.tensor([0, 2])
    found = []
    for net in (functions, modules):
        objective = Objective(net, nn.CrossEntropyLoss(), data)
        assert why_unproved(objective) == ""
        theta = objective.space.flatten(objective.leaves()).detach()
        found.append(proved_lipschitz(objective, theta, 1e-3))
    assert found[0] == found[1] > 0


class TwoPaths(nn.Module):
    """A residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def _shared() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].register_forward_hook(lambda module, args, out: out**2)
    return net


_layer = nn.Linear(3, 3)
REFUSED: list[tuple[nn.Module, nn.Module | Callable[[Tensor, Tensor], Tensor], str]] = [
    (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.MSELoss(), "layer '1' (ReLU)"),
    (nn.Sequential(nn.Linear(3, 3), nn.Softsign()), nn.MSELoss(), "layer '1' (Softsign)"),
    (nn.Sequential(nn.Linear(3, 3), nn.ELU()), nn.MSELoss(), "layer '1' (ELU)"),
    (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval()), nn.MSELoss(), "(BatchNorm1d)"),
    (nn.Sequential(_layer, nn.Tanh(), _layer), nn.MSELoss(), "layer '0' (Linear) has parameters"),
    (_shared(), nn.MSELoss(), "layer '2' (Linear) has parameters that are shared"),
    (_hooked(), nn.MSELoss(), "'0' (Linear) has hooks"),
    (nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.MSELoss(), "ParametrizedLinear"),
    (TwoPaths(), nn.MSELoss(), "the call of add()"),
    (Branching(), nn.MSELoss(), "torch.fx cannot trace"),
    (nn.Linear(3, 3), nn.SoftMarginLoss(), "the loss SoftMarginLoss"),
    (nn.Linear(3, 3), lambda out, y: (out - y).square().mean(), "the loss <lambda>"),
    (nn.Sequential(nn.Linear(3, 3), nn.Flatten(0)), nn.MSELoss(), "does not keep the examples"),
]


@pytest.mark.parametrize(("net", "loss", "message"), REFUSED)
def test_what_is_not_proved_is_named(
    net: nn.Module, loss: nn.Module | Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    y = torch.ones(4, 3)
    if isinstance(net, nn.Sequential) and isinstance(net[-1], nn.Flatten):
        y = torch.ones(12)
    objective = Objective(net, loss, [(torch.ones(4, 3), y)])
    assert message in why_unproved(objective)
    with pytest.raises(InputError, match=r"bound is proved|has|cannot trace|does not keep"):
        proved_lipschitz(objective, torch.zeros(objective.space.dim), 1e-3)


def test_convolutions_with_other_padding_than_zeros_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.Flatten())
    objective = Objective(net, nn.MSELoss(), (torch.ones(2, 1, 4, 4), torch.ones(2, 16)))
    assert "'0' (Conv2d) with padding_mode" in why_unproved(objective)


def test_dropout_counts_by_the_mode_it_is_evaluated_in() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    data = torch.ones(4, 3), torch.ones(4, 3)
    assert why_unproved(Objective(net, nn.MSELoss(), data)) == ""
    assert net.training
    as_given = Objective(net, nn.MSELoss(), data, mode="as given")
    assert "layer '1' (Dropout) is in training mode" in why_unproved(as_given)


def test_the_jump_of_pytorchs_softplus_is_no_smooth_point() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Softplus())
    objective = Objective(net, nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1)))
    with pytest.raises(InputError, match="threshold"):
        proved_lipschitz(objective, torch.tensor([19.5]), 1.0)
    assert proved_lipschitz(objective, torch.tensor([19.5]), 0.1) > 0


@pytest.mark.parametrize("radius", [-1.0, math.inf, math.nan])
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1)))
    with pytest.raises(InputError, match="radius"):
        proved_lipschitz(objective, torch.zeros(2), radius)


def _paper_network(name: str) -> nn.Module:
    net = build_network(name, {"activation": "tanh"})
    for part in ("pool1", "pool2"):
        if hasattr(net, part):
            setattr(net, part, nn.AvgPool2d(2))
    return net


@pytest.mark.parametrize("name", ["mlp2", "mlp3", "cnn"])
def test_the_papers_networks_have_proved_constants(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    # Strokes on a black ground, of about the norm that MNIST's images have.
    x = (F.avg_pool2d(torch.rand(200, 1, 28, 28, generator=g), 5, 1, 2) - 0.5).clamp(min=0) * 5
    y = torch.randint(10, (200,), generator=g)
    landscape = NetworkLandscape(_paper_network(name), nn.CrossEntropyLoss(), (x, y), l2=1e-3)
    assert landscape.proved_lipschitz(landscape.start, 0.1) > 0
    K = landscape.proved_lipschitz(landscape.start, 1e-9)
    found = (
        estimated_lipschitz(landscape, landscape.start, generator=g, num_starts=1, num_steps=4)
        / ESTIMATE_SAFETY
    )
    print(f"{name}: proved {K:.4g}, found {found:.4g}, ratio {K / found:.4g}")
    assert found < K < math.inf


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_third_derivative_of_a_polynomial(length: float) -> None:
    # D^3 of sum x_i^4 along v, v is 24 x_i v_i^2.
    landscape = FunctionLandscape(3, lambda x: (x**4).sum())
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    v = length * torch.tensor([1.0, 0.3, -0.7], dtype=torch.float64)
    torch.testing.assert_close(third_derivative(landscape, x, v), 24 * x * v**2, rtol=1e-8, atol=0)
    assert bool((third_derivative(landscape, x, 0 * v) == 0).all())


def test_third_derivative_of_a_network() -> None:
    case = next(case for case in map(Case, itertools.count()) if len(case.theta) > 20)
    landscape = NetworkLandscape(case.net, case.loss, (case.x, case.y), params=case.space.names)
    v = case.direction()
    exact = case.third(case.theta, v)
    # eps^(2/3) = 4e-11 of the size of H and of the fifth derivative.
    error = (third_derivative(landscape, case.theta, v) - exact).norm()
    assert error < 1e-7 * exact.norm()


def test_the_estimate_finds_the_monkey_saddle() -> None:
    monkey = FunctionLandscape(
        2, lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2 + (x[0] ** 2 + x[1] ** 2) ** 2
    )
    g = torch.Generator().manual_seed(1)
    zero = torch.zeros(2, dtype=torch.float64)
    K = estimated_lipschitz(monkey, zero, generator=g)
    # 6 cos(3 a) is largest in six directions. A start is at most pi / 6 off, which a step halves:
    # after nine, (3 pi / 6 / 2^9)^2 / 2 = 4.7e-6.
    assert math.isclose(K, ESTIMATE_SAFETY * 6, rel_tol=5e-6)


def test_the_estimate_of_a_quadratic_is_round_off() -> None:
    bowl = FunctionLandscape(2, lambda x: x @ x)
    zero, g = torch.zeros(2, dtype=torch.float64), torch.Generator().manual_seed(0)
    assert estimated_lipschitz(bowl, zero, generator=g) < 1e-8
