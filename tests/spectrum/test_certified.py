"""The certificate: never wrong, an interval where it cannot tell, and cheap where it can."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hvpspec
from hvpspec import DenseOperator, FunctionOperator, HessianOperator, IndexResult, index
from hvpspec.spectrum.certified import Interval
from hvpspec.zoo import TrainingSettings, cnn, load_data, train
from hvpspec.zoo.networks import seeded
from tests.linalg.test_dense import HOSTILE, rotated


def diagonal(values: Tensor) -> FunctionOperator:
    values = values.double()
    return FunctionOperator(len(values), lambda v: values * v)


def certified(
    A: object, tau: float | None = None, *, seed: int = 0, **options: object
) -> IndexResult:
    generator = torch.Generator().manual_seed(seed)
    return index(A, tau, method="certified", generator=generator, **options)


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_spectra(name: str, scale: float, num_probes: int) -> None:
    values = HOSTILE[name].double() * scale
    # Off the eigenvalues; for the zero matrix any positive tau.
    tau = 0.3 * float(values.abs().max()) or 1.0
    result = certified(rotated(values), tau, num_probes=num_probes)
    assert result.index == int((values < -tau).sum())


@pytest.mark.parametrize("num_probes", [1, 2, 4])
def test_a_bulk_with_outliers(num_probes: int) -> None:
    bulk = 1e-3 * torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    values = torch.cat([bulk, -torch.logspace(-1.5, 0, 25), torch.logspace(-1, 1, 40)])
    operator = diagonal(values)
    result = certified(operator, 0.02, num_probes=num_probes)
    assert result.index == 25
    assert result.certified
    assert result.num_matvecs == operator.num_matvecs < 700


def test_multiple_eigenvalues_need_several_harvests() -> None:
    values = torch.cat([torch.full((12,), -1.0), torch.linspace(0, 2, 300)])
    for num_probes in (1, 4):
        assert certified(diagonal(values), 0.5, num_probes=num_probes).index == 12


@pytest.mark.parametrize("num_probes", [1, 3])
def test_four_eigenvalues_of_multiplicity_32(num_probes: int) -> None:
    """The Krylov space is soon exhausted, and both ends of the bracket are round-off."""
    values = torch.tensor([-1.001, -0.999, 0.999, 1.001]).double().repeat_interleave(32)
    for scale in (1e-8, 1.0, 1e8):
        for seed in range(3):
            A = rotated(values, seed) * scale
            result = certified(A, scale, seed=seed, num_probes=num_probes)
            assert result.lower <= 32 <= result.upper
            assert result.index == 32


@settings(max_examples=8)
@given(
    st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 60)), min_size=1, max_size=6),
    st.sampled_from([1.0, 1e-3, 1e-6]),
    st.sampled_from([1e-8, 1.0, 1e8]),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
def test_few_eigenvalues_of_high_multiplicity(
    clusters: list[tuple[int, int]], gap: float, scale: float, num_probes: int, seed: int
) -> None:
    """With the resolution between two of them, wide apart or hardly so; n up to 300."""
    values = torch.cat([torch.full((1 + m,), -1 - gap * x).double() for x, m in clusters])
    A = rotated(values, seed) * scale
    for x in (-7, -1, 0, 3):
        tau = 1 + gap * (x + 0.5)
        if tau > 0:
            right = int((values < -tau).sum())
            result = certified(A, tau * scale, seed=seed, num_probes=num_probes, max_matvecs=600)
            assert result.lower <= right <= result.upper


@pytest.mark.parametrize("seed", range(3))
def test_an_eigenvalue_at_the_resolution_may_be_counted_or_not(seed: int) -> None:
    """To round-off it is on either side, and both may be proven: an interval, and an end."""
    values = torch.tensor([s * 10 ** (-k / 10) for k in range(-20, 20) for s in (-1, 1)])
    result = certified(diagonal(values), 1.0, seed=seed)
    assert 20 <= result.lower <= result.upper <= 21
    assert result.num_matvecs < 300


def test_too_many_to_harvest_gives_an_interval() -> None:
    values = torch.linspace(-1, 1, 1500)
    for seed in range(3):
        result = certified(diagonal(values), 1e-3, seed=seed, max_matvecs=150)
        truth = int((values < -1e-3).sum())
        assert result.index is None
        assert not result.certified
        assert result.lower <= truth <= result.upper
        assert result.lower < result.estimate < result.upper
        assert result.num_matvecs <= 150 + 18


def test_a_ladder_is_certified_above_and_bracketed_below() -> None:
    bulk = 1e-3 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    values = torch.cat([bulk, -torch.logspace(-1.5, 0, 25), torch.logspace(-1, 1, 40)])
    taus = [0.5, 0.02, 1e-4]
    result = certified(diagonal(values), tau_ladder=taus, max_matvecs=500)
    assert [rung.tau for rung in result.ladder] == taus
    for rung in result.ladder:
        assert rung.lower <= int((values < -rung.tau).sum()) <= rung.upper
    assert [rung.index is not None for rung in result.ladder] == [True, True, False]
    assert result.tau == 1e-4
    assert result.index is None


def test_without_tau_it_leads_down_to_the_noise_floor() -> None:
    values = torch.cat([torch.full((60,), 0.5), torch.tensor([-1.0, -1e-3]), torch.zeros(100)])
    result = certified(rotated(values))
    assert result.tau == result.noise_floor
    assert result.ladder[0].tau == pytest.approx(0.1, rel=0.05)
    assert result.index == 2


def test_the_positive_side_and_shifts() -> None:
    values = torch.cat([torch.linspace(-3, -1, 10), torch.linspace(1, 2, 7), torch.zeros(200)])
    A = DenseOperator(rotated(values))
    for method in ("exact", "inertia", "certified"):
        assert index(A, 0.5, method=method).index == 10
        assert index(A, 0.5, method=method, side="positive").index == 7
        assert index(-A, 0.5, method=method).index == 7
        # Below -2: A + 2 I has them below zero.
        below = int((values < -2.05).sum())
        assert index(A.shifted(2.0), 0.05, method=method).index == below


def test_scaling_and_generators() -> None:
    values = torch.cat(
        [torch.randn(300, generator=torch.Generator().manual_seed(9)), torch.zeros(90)]
    )
    A = rotated(values)
    plain = certified(A, 0.5, max_matvecs=100)
    again = certified(A, 0.5, max_matvecs=100)
    assert plain.ladder == again.ladder
    scaled = certified(2.0**-26 * A, 0.5 * 2.0**-26, max_matvecs=100)
    assert (scaled.lower, scaled.upper) == (plain.lower, plain.upper)
    assert scaled.num_matvecs == plain.num_matvecs


@pytest.mark.parametrize("method", ["quadrature", "filtered"])
def test_intervals_of_the_plain_methods(method: str) -> None:
    values = torch.cat([torch.linspace(-1, -0.5, 40), torch.linspace(-0.01, 2, 400)])
    truth = int((values < -0.25).sum())
    for seed in range(4):
        result = index(
            diagonal(values),
            0.25,
            method=method,
            generator=torch.Generator().manual_seed(seed),
            confidence=0.999,
        )
        assert result.lower <= truth <= result.upper
        assert result.upper - result.lower < 60
        assert result.index is None
        assert (result.resolution > 0) == (method == "filtered")


@pytest.mark.parametrize("method", ["certified", "quadrature", "filtered"])
def test_below_the_noise_floor_only_an_interval_is_certain(method: str) -> None:
    """Zeros that float32 leaves at 1e-8 have signs that products in float32 cannot show."""
    A = rotated(torch.tensor([0.0] * 150 + [1.0] * 49 + [-1.0])).float()
    tau = 1e-8
    truth = index(A, tau, method="exact").index
    assert truth is not None
    assert 10 < truth < 100
    result = index(A, method=method, tau_ladder=[0.5, tau, tau / 2])
    assert tau < result.noise_floor
    assert result.index is None
    assert not result.certified
    assert result.lower <= truth <= result.upper
    if method == "certified":
        assert [(rung.lower, rung.upper) for rung in result.ladder] == [(1, 1), (1, 200), (1, 200)]


@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_error_bars_are_rounded_outwards(scale: float) -> None:
    result = index(torch.zeros(5, 5).double(), scale, method="filtered")
    assert result.lower == 0
    values = torch.tensor([-1.0] * 7) * scale
    assert index(diagonal(values), 0.1 * scale, method="filtered").upper == 7


def test_the_structural_bound_is_used() -> None:
    X, y = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(40).long()
    H = HessianOperator(nn.Linear(5, 3).double(), nn.CrossEntropyLoss(), (X, y))
    operator = H.in_float64()
    result = certified(operator)
    assert result.index == 0
    # A convex problem has nothing to look for: the bound is 0 before the first probe.
    assert result.num_matvecs < 25


def test_watchers_see_the_interval_shrink() -> None:
    values = torch.cat([torch.linspace(-1, -0.5, 9), torch.linspace(-0.01, 2, 400)])
    seen: list[tuple[int, int]] = []
    products: list[int] = []
    certified(
        diagonal(values),
        0.25,
        watch=lambda rung: seen.append((rung.lower, rung.upper)),
        progress=lambda done, total: products.append(done),
    )
    assert seen[-1] == (9, 9)
    assert products == sorted(products)
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(seen))


def test_errors() -> None:
    A = torch.eye(3)
    for options, message in (
        ({"tau": 0.0}, "tau must be above 0 for a matrix-free method"),
        ({"tau": 0.1, "confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
        ({"tau": 0.1, "num_probes": 0}, "num_probes must be a whole number of at least 1, got 0"),
        ({"tau": 0.1, "num_probes": 2.5}, "num_probes must be a whole number .* got 2.5"),
        ({"tau": 0.1, "num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ({"tau": 0.1, "max_matvecs": 0}, "max_matvecs must be a whole number of at least 1"),
        ({"tau_ladder": [0.1, -1.0]}, "tau must be a finite number"),
        ({"tau": 0.1, "side": "both"}, "side must be"),
    ):
        with pytest.raises(hvpspec.InputError, match=message):
            index(A, method="certified", **options)


def dense(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The float64 Hessian by batched double backward, which takes a tenth of the products' time."""
    wide = copy.deepcopy(model).double()
    parameters = list(wide.parameters())
    loss = nn.functional.cross_entropy(wide(images.double()), labels)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = []
    for units in torch.eye(len(flat), dtype=torch.float64).split(256):
        parts = torch.autograd.grad(
            flat, parameters, units, retain_graph=True, is_grads_batched=True
        )
        rows.append(torch.cat([part.flatten(1) for part in parts], 1))
    matrix = torch.cat(rows)
    return (matrix + matrix.T) / 2


def small_mlp2() -> nn.Module:
    """The paper's mlp2 on images of 14 x 14 pixels: 2,080 parameters instead of 7,960."""
    with seeded(0):
        return nn.Sequential(
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 10), nn.ReLU(), nn.Linear(10, 10)
        )


@pytest.mark.parametrize(("network", "optimizer"), [(small_mlp2, "sgd"), (cnn, "adam")])
def test_the_networks_of_the_paper(network: Callable[[], nn.Module], optimizer: str) -> None:
    """Against all eigenvalues, through products in float64 and in float32.

    ``benchmarks/paper_networks.py`` is the long form, on 2,000 images and at full size.
    """
    data = load_data("mnist-sample", subset=10)
    model = network()
    train(model, data, TrainingSettings(optimizer=optimizer, epochs=3))
    narrow = HessianOperator(model, nn.CrossEntropyLoss(), data.tensors)
    values = hvpspec.eigvalsh(dense(model, *data.tensors))
    norm = float(values.abs().max())
    taus = [1e-3 * norm, 1e-4 * norm, 1e-5 * norm]
    for operator in (narrow.in_float64(), narrow):
        result = certified(operator, tau_ladder=taus, max_matvecs=1500)
        for rung in result.ladder:
            # What products in float32 say is true up to their noise.
            least = int((values < -rung.tau - result.noise_floor).sum())
            most = int((values < -rung.tau + result.noise_floor).sum())
            assert rung.lower <= most
            assert least <= rung.upper
        certain = [rung.index is not None for rung in result.ladder]
        assert certain[:2] == [True, True]
        assert result.num_matvecs <= 1500 + 21


def test_hundreds_of_short_rounds_spend_their_confidence_without_end() -> None:
    values = torch.linspace(-1, 1, 300)
    result = certified(diagonal(values), 1e-3, num_steps=1, max_matvecs=400)
    assert result.lower <= 150 <= result.upper


def test_deflation_is_right_where_harvests_are_rough() -> None:
    """Random spectra and coarse-to-fine ladders, where Q is let go of and W couples to it."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(100 + seed)
        values = torch.randn(80, dtype=torch.float64, generator=generator)
        values *= 10 ** (-4 * torch.rand(80, dtype=torch.float64, generator=generator))
        taus = [0.3, 0.03, 0.003]
        result = certified(rotated(values, seed), tau_ladder=taus, num_steps=25, seed=seed)
        for rung in result.ladder:
            assert rung.lower <= int((values < -rung.tau).sum()) <= rung.upper


def test_a_rougher_look_leaves_the_guess() -> None:
    bracket = Interval(1e-3, least=0, most=100, lower=0, upper=100, estimate=50.0)
    bracket.narrow(10, 20, 12.0)
    bracket.narrow(0, 90, 45.0)
    assert (bracket.lower, bracket.upper, bracket.estimate) == (10, 20, 12.0)
    bracket.narrow(11, 15, 14.0)
    assert (bracket.lower, bracket.upper, bracket.estimate) == (11, 15, 14.0)
