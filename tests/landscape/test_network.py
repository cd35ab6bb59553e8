"""Landscapes of networks: derivatives, refusals, symmetries, and proofs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpspec import HessianOperator
from hvpspec.errors import InputError, NotDifferentiableError
from hvpspec.landscape import (
    NetworkLandscape,
    certify,
    critical_point,
    critical_points,
    morse_check,
    symmetries,
)

DOUBLE = torch.float64


def data(n: int = 30, inputs: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


def network(activation: nn.Module | None = None, hidden: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), activation or nn.Tanh(), nn.Linear(hidden, 3))


def landscape(model: nn.Module, l2: object = 0.02, **options: object) -> NetworkLandscape:
    return NetworkLandscape(model, nn.CrossEntropyLoss(), data(), l2=l2, **options)


def test_the_cost_is_what_was_spent(monkeypatch: pytest.MonkeyPatch):
    L, spent = landscape(network()), 0
    gradient, both, hessian = L.gradient, L.value_and_gradient, L.hessian
    operators = []

    def counted_gradient(theta: Tensor) -> Tensor:
        nonlocal spent
        spent += 1
        return gradient(theta)

    def counted_both(theta: Tensor) -> tuple[float, Tensor]:
        nonlocal spent
        spent += 1
        return both(theta)

    def counted_hessian(theta: Tensor) -> object:
        operators.append(hessian(theta))
        return operators[-1]

    monkeypatch.setattr(L, "gradient", counted_gradient)
    monkeypatch.setattr(L, "value_and_gradient", counted_both)
    monkeypatch.setattr(L, "hessian", counted_hessian)
    p = critical_point(L, L.start, lipschitz=1e3)
    assert p.num_gradients == pytest.approx(spent, abs=1)  # facts take one more
    assert p.num_matvecs == sum(H.num_matvecs for H in operators)


def test_it_is_the_function_of_an_operator():
    model = network()
    L = landscape(model, 0.02)
    H = HessianOperator(model.double(), nn.CrossEntropyLoss(), data(), l2=0.02, dtype=DOUBLE)
    assert L.value(L.start) == pytest.approx(H.loss(), rel=1e-14)
    assert torch.allclose(L.gradient(L.start), H.gradient(), rtol=0, atol=1e-14)
    value, gradient = L.value_and_gradient(L.start)
    assert value == L.value(L.start)
    assert torch.equal(gradient, L.gradient(L.start))
    assert torch.allclose(L.hessian(L.start).to_dense(), H.to_dense(), rtol=0, atol=1e-14)


def test_l2_of_each_parameter_and_a_tilt():
    model, b = network(), torch.linspace(-1, 1, 27, dtype=DOUBLE)
    plain = landscape(model, 0.0)
    L = landscape(model, {"0.weight": 0.5, "2.bias": 2.0}, tilt=b)
    theta = plain.start + 0.1
    lam = torch.cat([torch.full((12,), 0.5), torch.zeros(3 + 9), torch.full((3,), 2.0)]).double()
    assert L.value(theta) == pytest.approx(
        plain.value(theta) + float(lam @ theta**2 + b @ theta), rel=1e-13
    )
    difference = L.gradient(theta) - plain.gradient(theta)
    assert torch.allclose(difference, 2 * lam * theta + b, atol=1e-13)
    difference = L.hessian(theta).to_dense() - plain.hessian(theta).to_dense()
    assert torch.allclose(difference, torch.diag(2 * lam), atol=1e-13)
    assert torch.equal(L.of_the_loss.gradient(theta), plain.gradient(theta))
    v = torch.randn(27, dtype=DOUBLE)
    assert torch.allclose(L.hessian(theta) @ v, L.hessian(theta).to_dense() @ v)


def test_the_network_is_left_alone_until_a_point_is_written():
    model = network()
    before = copy.deepcopy(model.state_dict())
    L = landscape(model)
    p = critical_point(L, L.start)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    L.write(p.theta)
    assert torch.equal(
        torch.cat([q.detach().flatten() for q in model.parameters()]), p.theta.float()
    )


def test_a_minimum_is_proved_whatever_the_chunks():
    model = network()
    p = critical_point(landscape(model), landscape(model).start)
    q = critical_point(landscape(model, chunk_size=7), landscape(model).start)
    for point in (p, q):
        assert point.certified
        assert point.lipschitz_kind == "proved"
        assert point.kind == "minimum"
        assert point.radius < 1e-11
    assert torch.linalg.vector_norm(p.theta - q.theta) <= p.radius + q.radius


def test_copies_with_units_exchanged_and_flipped_are_the_same():
    L = landscape(network())
    p = critical_point(L, L.start)
    parts = L.objective.space.unflatten(p.theta)
    order, signs = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, -1.0], dtype=DOUBLE)
    moved = {
        "0.weight": parts["0.weight"][order] * signs[:, None],
        "0.bias": parts["0.bias"][order] * signs,
        "2.weight": parts["2.weight"][:, order] * signs,
        "2.bias": parts["2.bias"],
    }
    q = certify(L, L.objective.space.flatten(moved))
    assert q.value == pytest.approx(p.value, rel=1e-14)
    assert q.certified
    assert q.index.index == p.index.index
    assert torch.allclose(q.index.eigenvalues, p.index.eigenvalues, rtol=0, atol=1e-12)


def test_an_embedded_network_stays_critical():
    """Zhang et al. 2021: a unit with zero weights in and out changes neither f nor criticality."""
    narrow, wide = landscape(network(hidden=2)), landscape(network(hidden=3))
    p = critical_point(narrow, narrow.start)
    parts = narrow.objective.space.unflatten(p.theta)
    theta = wide.objective.space.flatten(
        {
            "0.weight": F.pad(parts["0.weight"], (0, 0, 0, 1)),
            "0.bias": F.pad(parts["0.bias"], (0, 1)),
            "2.weight": F.pad(parts["2.weight"], (0, 1)),
            "2.bias": parts["2.bias"],
        }
    )
    q = certify(wide, theta)
    assert q.value == pytest.approx(p.value, rel=1e-14)
    assert q.gradient_norm < 1e-14
    assert q.certified


def test_saddles_of_a_network():
    L = landscape(network(hidden=2))
    theta = torch.zeros_like(L.start)
    theta[-3:] = critical_point(landscape(network(hidden=2), params="2.bias"), torch.zeros(3)).theta
    origin = critical_point(L, theta, target="nearest")
    assert origin.kind.startswith("saddle of index")
    assert origin.certified
    lower = critical_point(L, origin.theta)
    assert lower.kind == "minimum"
    assert lower.value < origin.value


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (network(nn.ReLU()), "layer '1' has kinks (ReLU); use Softplus, Tanh or GELU"),
        (network(nn.LeakyReLU()), "layer '1' has kinks (LeakyReLU)"),
        (network(nn.ELU()), "layer '1' has kinks (ELU)"),
        (network(nn.Hardtanh()), "kinks (Hardtanh or ReLU6)"),
        (
            nn.Sequential(nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 3)),
            None,
        ),
        (
            nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(1, 3)),
            "layer '2' has kinks (max-pooling); use average pooling",
        ),
    ],
)  # fmt: skip
def test_kinks_are_refused(model: nn.Module, message: str | None):
    if message is None:  # kinks of the data alone are none of the parameters
        assert landscape(model).kinks == ()
        return
    with pytest.raises(NotDifferentiableError) as caught:
        landscape(model)
    assert message in str(caught.value)


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss()])
def test_losses_with_kinks_are_refused(loss: nn.Module):
    x, _ = data()
    with pytest.raises(NotDifferentiableError, match="has kinks"):
        NetworkLandscape(network(), loss, (x, torch.randn(30, 3)), l2=0.1)


def test_a_network_with_kinks_on_request():
    L = landscape(network(nn.ReLU()), 0.05, allow_kinks=True)
    p = critical_point(L, L.start)
    assert not p.certified
    assert "ReLU" in p.reason
    x, _ = data()
    weight, bias = (L.objective.space.unflatten(p.theta)[name] for name in ("0.weight", "0.bias"))
    assert p.kink_distance == pytest.approx(float((x.double() @ weight.T + bias).abs().min()))


def test_batch_normalisation_by_the_batch_goes_as_given():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    with pytest.raises(InputError, match="train mode"):
        landscape(model)
    p = critical_point(landscape(model.eval()), landscape(model.eval()).start)
    assert p.kind == "minimum"
    assert p.lipschitz_kind == "estimated"
    assert "BatchNorm" in p.reason


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.2)])
def test_what_depends_on_the_batch_or_on_chance_is_refused(layer: nn.Module):
    model = nn.Sequential(nn.Linear(4, 3), layer, nn.Tanh(), nn.Linear(3, 3)).train()
    with pytest.raises(InputError, match="batch statistics and dropout make f depend"):
        landscape(model, mode="as given")
    assert landscape(model.eval(), mode="as given").kinks == ()


def test_a_scale_without_effect_is_degenerate():
    """The paper's remedy, a number for l2, leaves the rotations of a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3))
    flat = critical_point(landscape(model, 0.02), landscape(model).start)
    assert flat.kind == "degenerate"
    L = landscape(model, torch.linspace(0.02, 0.04, 17, dtype=DOUBLE))
    assert critical_point(L, L.start).kind == "minimum"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": -1.0}, "l2 must hold finite numbers of at least 0"),
        ({"l2": math.nan}, "l2 contains NaN|l2 must hold finite numbers"),
        ({"l2": {"3.weight": 0.1}}, "l2 names '3.weight', which is none of 0.weight"),
        ({"l2": torch.ones(3)}, r"must have shape \(27,\), got \(3,\)"),
        ({"tilt": torch.ones(3)}, r"must have shape \(27,\), got \(3,\)"),
    ],
)
def test_bad_input(options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        landscape(network(), **options)


def test_a_float32_network_computes_in_float64():
    model = network().float()
    L = landscape(model)
    p = critical_point(L, L.start)
    assert p.theta.dtype == DOUBLE
    assert p.gradient_norm < 1e-15


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_stacks_of_points(loss: nn.Module):
    x, y = data()
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    L = NetworkLandscape(network(), loss, batches, l2=0.1, tilt=torch.ones(27))
    points = L.start + torch.randn(3, 27, dtype=DOUBLE)
    gradients = torch.stack([L.gradient(p) for p in points])
    hessians = torch.stack([L.hessian(p).to_dense() for p in points])
    assert torch.allclose(L.gradients(points), gradients, rtol=1e-12, atol=1e-12)
    assert torch.allclose(L.hessians(points), hessians, rtol=1e-12, atol=1e-12)


def xor_network(lam: float) -> NetworkLandscape:
    X = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    model = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 1))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.softplus(-targets * outputs).mean()

    return NetworkLandscape(model, loss, (X, -X[:, :1] * X[:, 1:]), l2=lam)


def test_the_points_of_a_network_with_and_without_symmetries():
    L = xor_network(0.02)
    generator = torch.Generator().manual_seed(0)
    starts = 2 * torch.randn(150, 5, generator=generator, dtype=DOUBLE)
    everything = critical_points(L, starts, lipschitz=20.0)
    assert morse_check(everything).counts == (9, 8)
    group = symmetries(L)
    assert group.order == 2
    orbits = critical_points(L, starts, symmetries=group, lipschitz=20.0)
    assert len(orbits) < len(everything)
    assert morse_check(orbits, group).counts == (9, 8)


def test_symmetries_leave_f_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(8, 3), nn.Sigmoid(), nn.Linear(3, 3),
    )  # fmt: skip
    x, y = torch.randn(9, 1, 4, 4), torch.randint(3, (9,))
    L = NetworkLandscape(model, nn.CrossEntropyLoss(), (x, y), l2=0.1)
    group = symmetries(L)
    assert group.order == 2 * 2**2 * 6
    values = torch.tensor([L.value(image) for image in group.images(L.start)])
    assert torch.allclose(values, values[:1], rtol=1e-14)
    assert len(torch.unique(group.images(L.start), dim=0)) == group.order
    tilted = NetworkLandscape(model, nn.CrossEntropyLoss(), (x, y), l2=0.1, tilt=L.start)
    assert symmetries(tilted).order == 1
    uneven = NetworkLandscape(model, nn.CrossEntropyLoss(), (x, y), l2={"0.weight": 0.1})
    assert symmetries(uneven).order == group.order
    some = NetworkLandscape(model, nn.CrossEntropyLoss(), (x, y), l2=0.1, params=["4", "6"])
    assert symmetries(some).order == 6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)), "has 185,794,560 elements"),
        (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)), "'1' is LayerNorm"),
    ],
)
def test_groups_that_are_not_listed(model: nn.Module, message: str):
    with pytest.raises(InputError, match=message):
        symmetries(landscape(model))
