"""Spectral measures: densities, counts with proven intervals, traces of functions, files."""

from __future__ import annotations

import gc
import io
import math
import pickle
import zipfile
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from hvpspec import DenseOperator, FunctionOperator, InputError
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import ProbeKind
from hvpspec.spectrum.measure import spectral_measure
from hvpspec.spectrum.slq import SpectralMeasure
from tests.linalg.test_dense import HOSTILE, rotated


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def diagonal(values: Tensor) -> SymmetricOperator:
    """An operator as good as any other for Gaussian probes, whose law no rotation changes."""
    values = values.double()
    return FunctionOperator(len(values), lambda v: values * v)


def spread(n: int = 120, seed: int = 0) -> Tensor:
    """A bulk of eigenvalues, from other seeds than those of the probes."""
    return torch.randn(n, dtype=torch.float64, generator=generator(10**6 + seed))


def trapezoid(y: Tensor, x: Tensor) -> float:
    return float(torch.trapezoid(y, x))


# --- what a measure is


def test_products_memory_and_progress() -> None:
    A = diagonal(spread())
    seen: list[tuple[int, int]] = []
    measure = spectral_measure(
        A, 5, 7, generator=generator(), block_size=2, progress=lambda *done: seen.append(done)
    )
    assert measure.num_matvecs == A.num_matvecs == 35
    assert seen[0] == (2, 35)
    assert seen[-1] == (35, 35)
    assert len(measure.runs) == 5
    assert all(run.basis is None and run.next_vector is None for run in measure.runs)
    measure.density()
    measure.count(0.0)
    measure.expectation(torch.exp)
    measure.outliers()
    assert A.num_matvecs == 35
    with pytest.raises(FrozenInstanceError):
        measure.dim = 3  # type: ignore[misc]


def test_the_bases_of_one_block_are_gone_before_the_next() -> None:
    n, num_steps = 10_000, 8
    most = 0

    def multiply(v: Tensor) -> Tensor:
        nonlocal most
        alive = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.float64]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        most = max(most, sum(storages.values()) // (8 * n) - before)
        return 2 * v

    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.float64]
    before = sum(t.untyped_storage().nbytes() for t in alive) // (8 * n)
    A = FunctionOperator(n, multiply)
    spectral_measure(A, 3, num_steps, generator=generator(), block_size=1)
    # Three start vectors, a basis, and a few vectors that come and go; two bases would be 18.
    assert num_steps + 1 <= most < 3 + (num_steps + 1) + 5


def test_block_size_changes_round_off_only() -> None:
    A = rotated(spread(40))
    whole = spectral_measure(A, 4, 10, generator=generator())
    parts = spectral_measure(A, 4, 10, generator=generator(), block_size=1)
    for one, other in zip(whole.nodes, parts.nodes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_same_generator_same_bits() -> None:
    A = rotated(spread(40))
    one, other = (spectral_measure(A, 4, 10, generator=generator(3)) for _ in range(2))
    for a, b in zip(one.nodes + one.weights, other.nodes + other.weights, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(
        one.nodes[0], spectral_measure(A, 4, 10, generator=generator(4)).nodes[0]
    )


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sphere"])
def test_every_question_has_an_answer_on_hostile_spectra(name: str, kind: ProbeKind) -> None:
    values = HOSTILE[name].double()
    measure = spectral_measure(rotated(values), 4, generator=generator(), probes=kind)
    norm = float(values.abs().max())
    density = measure.density()
    assert trapezoid(density.values, density.grid) == pytest.approx(1, abs=1e-5)
    assert bool(torch.isfinite(density.sem).all())
    log_density = measure.log_density()
    assert trapezoid(log_density.values, log_density.t) == pytest.approx(1, abs=1e-5)
    for x in (-2 * norm - 1, -1e-6 * norm, 0.3 * norm, 2 * norm + 1):
        count = measure.count(x)
        true = int((values < x).sum())
        distribution = measure.cdf(x)
        assert float(distribution.lower) <= float(distribution.values) <= float(distribution.upper)
        if kind == "gaussian":
            assert count.lower is not None
            assert count.upper is not None
            assert count.lower <= true <= count.upper
    # Quadrature is exact on polynomials, and every run here is exhausted anyway.
    for probe_nodes, weights in zip(measure.nodes, measure.weights, strict=True):
        assert float(probe_nodes.abs().max()) <= norm * (1 + 1e-12)
        assert float(weights.sum()) == pytest.approx(1)
    assert measure.expectation(torch.ones_like).value == pytest.approx(len(values))


@pytest.mark.parametrize("scale", [2.0**-30, 1e-8, 1e8])
def test_scaling_scales_the_nodes(scale: float) -> None:
    A = rotated(spread(60))
    one = spectral_measure(A, 3, 20, generator=generator())
    other = spectral_measure(A * scale, 3, 20, generator=generator())
    for a, b in zip(one.nodes, other.nodes, strict=True):
        torch.testing.assert_close(b / scale, a, rtol=0, atol=1e-10)
    for a, b in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    a, b = one.count(0.3), other.count(0.3 * scale)
    assert (a.lower, a.upper) == (b.lower, b.upper)
    assert b.estimate == pytest.approx(a.estimate, abs=1e-6)
    one_density, other_density = one.density(), other.density()
    assert other_density.sigma == pytest.approx(scale * one_density.sigma)
    torch.testing.assert_close(other_density.values * scale, one_density.values, rtol=1e-6, atol=0)


def test_negation_mirrors_counts() -> None:
    A = rotated(spread(60))
    one = spectral_measure(A, 3, 20, generator=generator())
    other = spectral_measure(-A, 3, 20, generator=generator())
    for x in (-1.1, 0.0, 0.4):
        below, above = one.count(x), other.count(-x)
        assert below.lower is not None
        assert below.upper is not None
        assert (above.lower, above.upper) == (60 - below.upper, 60 - below.lower)
        assert above.estimate == pytest.approx(60 - below.estimate, abs=1e-6)


# --- densities


def test_density_is_the_smoothed_spectrum() -> None:
    values = spread(200)
    measure = spectral_measure(diagonal(values), 30, 60, generator=generator())
    grid = torch.linspace(-3, 3, 50, dtype=torch.float64)
    density = measure.density(grid, 0.3)
    kernels = torch.exp(-(((grid[:, None] - values) / 0.3) ** 2) / 2).mean(1)
    exact = kernels / (0.3 * math.sqrt(2 * math.pi))
    # 60 nodes integrate kernels this wide to far below the error of the probes: 5 standard errors.
    assert bool(((density.values - exact).abs() <= 5 * density.sem + 1e-9).all())
    assert density.sigma == 0.3
    # Var z^T f z / |z|^2 is about 2 var(f) / n per probe, so this is what the errors should be.
    expected = float(exact.max()) * (2 / 200 / 30) ** 0.5
    assert 0 < float(density.sem.max()) < 3 * expected


def test_density_needs_a_usable_grid() -> None:
    measure = spectral_measure(diagonal(spread()), 2, 5, generator=generator())
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="sigma must be positive and finite"):
            measure.density(torch.zeros(1), sigma)
    with pytest.raises(InputError, match="pass a wider sigma"):
        measure.density(sigma=1e-9)
    with pytest.raises(InputError, match="grid must be finite"):
        measure.density(torch.tensor([0.0, math.nan]), 1.0)
    with pytest.raises(InputError, match="linthresh must be positive"):
        measure.log_density(linthresh=0.0)


def test_one_probe_has_no_standard_error() -> None:
    measure = spectral_measure(diagonal(spread()), 1, 5, generator=generator())
    assert bool(measure.density().sem.isnan().all())
    assert math.isnan(measure.count(0.0).sem)
    assert math.isnan(measure.expectation(torch.exp).sem)


def test_log_density_keeps_the_mass_of_every_decade() -> None:
    """Peaks at -1, 1e-4 and 1e-8 are found where they are, with the mass they have."""
    values = torch.tensor([-1.0] * 30 + [1e-4] * 50 + [1e-8] * 20, dtype=torch.float64)
    measure = spectral_measure(rotated(values), 40, 10, generator=generator())
    density = measure.log_density(linthresh=1e-6)
    torch.testing.assert_close(density.grid, 1e-6 * density.t.sinh())
    assert trapezoid(density.values, density.t) == pytest.approx(1, abs=1e-6)
    for low, high, mass in ((-2, -0.1, 0.3), (1e-5, 1e-3, 0.5), (-1e-6, 1e-6, 0.2)):
        part = (density.grid > low) & (density.grid < high)
        # Var of a Beta share of mass p: 2 p (1 - p) / n per probe; 5 sigma.
        error = 5 * (2 * mass * (1 - mass) / 100 / 40) ** 0.5
        assert trapezoid(density.values[part], density.t[part]) == pytest.approx(mass, abs=error)


# --- counts


def test_distribution_brackets_the_share() -> None:
    values = spread(80)
    A = diagonal(values)
    measure = spectral_measure(A, 400, 12, generator=generator())
    x = torch.linspace(-4, 4, 41)
    distribution = measure.cdf(x)
    exact = (values < x[:, None]).double().mean(1)
    # Bracket means hold the share up to the error of 400 probes of variance 2 p (1 - p) / n.
    slack = 5 * (2 * exact * (1 - exact) / 80 / 400) ** 0.5 + 1e-9
    assert bool((distribution.lower <= exact + slack).all())
    assert bool((distribution.upper >= exact - slack).all())
    assert bool((distribution.values.diff() >= -1e-12).all())
    assert float(distribution.lower[0]) == 0
    assert float(distribution.upper[-1]) == 1
    with pytest.raises(InputError, match="x must be finite"):
        measure.cdf(math.nan)


def test_count_is_sharper_than_the_distribution() -> None:
    measure = spectral_measure(diagonal(spread()), 5, 15, generator=generator())
    for x in (-1.0, 0.1, 0.9):
        lower, upper = measure.count(x).bracket
        distribution = measure.cdf(x)
        assert 120 * float(distribution.lower) <= lower + 1e-9
        assert upper <= 120 * float(distribution.upper) + 1e-9


def test_full_depth_counts_exactly() -> None:
    values = spread(30)
    measure = spectral_measure(rotated(values), 2, generator=generator())
    for x in (-1.5, 0.0, 0.7):
        count = measure.count(x)
        assert count.lower == count.upper == int((values < x).sum())


def test_round_off_around_zero_is_not_counted_as_negative() -> None:
    """A singular matrix: below 0 lie the negative ones for certain, and the zeros perhaps."""
    values = torch.tensor([-1.0] * 3 + [0.0] * 20 + [1.0] * 7)
    measure = spectral_measure(rotated(values), 8, generator=generator())
    count = measure.count(0.0)
    assert count.lower is not None
    assert count.upper is not None
    assert count.lower <= 3
    assert count.upper >= 23
    assert count.resolution > 0
    sharp = measure.count(-1e-6)
    assert sharp.lower is not None
    assert sharp.upper is not None
    assert 1 <= sharp.lower <= 3 <= sharp.upper < 10


@pytest.mark.parametrize("options", [{"probes": "rademacher"}, {"probes": "sphere"}])
def test_no_interval_without_its_law(options: dict[str, ProbeKind]) -> None:
    measure = spectral_measure(rotated(spread(50)), 4, 10, generator=generator(), **options)
    count = measure.count(0.0)
    assert (count.lower, count.upper, count.confidence) == (None, None, None)
    assert count.bracket[0] <= count.estimate <= count.bracket[1]


def test_no_interval_without_reorthogonalisation() -> None:
    measure = spectral_measure(
        rotated(spread(50)), 4, 10, generator=generator(), reorthogonalize=False
    )
    assert measure.count(0.0).lower is None
    with pytest.raises(InputError, match="reorthogonalize=True"):
        measure.outliers()


def test_count_errors() -> None:
    measure = spectral_measure(diagonal(spread()), 2, 5, generator=generator())
    with pytest.raises(InputError, match="below must be finite, got nan"):
        measure.count(math.nan)
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        measure.count(0.0, confidence=1.0)
    with pytest.raises(InputError, match="at least 0, got -1"):
        measure.count(0.0, resolution=-1.0)


CLUSTERS = torch.cat([torch.full((10,), c) + 1e-5 * torch.arange(10) for c in (-1.0, 0.2, 1.0)])
COVERAGE = {
    "inside the bulk": (torch.cat([spread(70) * 0.1, torch.tensor([-1.0, 2.0, 3.0])]), 0.02),
    "at the edge of the bulk": (torch.cat([torch.linspace(-0.1, 0.1, 60), torch.ones(5)]), -0.0999),
    "outside the bulk": (torch.cat([spread(70) * 0.01, torch.tensor([-1.0, -0.5, 2.0])]), -0.2),
    "clusters": (CLUSTERS, -0.99995),
    "multiplicity": (torch.tensor([-1.0] * 25 + [0.0] * 25 + [1.0] * 10), -0.5),
    "all negative": (-torch.linspace(0.1, 1, 40), -0.05),
    "none negative": (torch.linspace(0.1, 1, 40), 0.05),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_coverage(name: str) -> None:
    """Of 100 generators, no more miss than 5% misses make likely."""
    values, x = COVERAGE[name]
    true = int((values.double() < x).sum())
    A = diagonal(values)
    missed = 0
    for seed in range(100):
        count = spectral_measure(A, 3, 6, generator=generator(seed)).count(x)
        assert count.confidence == 0.95
        assert count.lower is not None
        assert count.upper is not None
        missed += not count.lower <= true <= count.upper
    assert binom.sf(missed - 1, 100, 0.05) > 1e-3


def test_the_interval_is_worth_having() -> None:
    """With enough steps it is about as wide as the randomness of the probes makes it."""
    values = spread(300)
    count = spectral_measure(diagonal(values), 10, 100, generator=generator()).count(-1.0)
    true = int((values < -1).sum())
    assert count.lower is not None
    assert count.upper is not None
    width = 2 * 1.96 * (2 * true * (1 - true / 300) / 10) ** 0.5
    assert count.lower <= true <= count.upper
    assert count.upper - count.lower < 2 * width


# --- functions


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sphere"])
def test_expectations_within_their_error(kind: ProbeKind) -> None:
    values = torch.linspace(0.1, 2, 100, dtype=torch.float64)
    measure = spectral_measure(rotated(values), 30, 25, generator=generator(), probes=kind)

    def log_det(x: Tensor) -> Tensor:
        return torch.log(x + 0.5)

    def effective_dimension(x: Tensor) -> Tensor:
        return x / (x + 0.5)

    def entropy(x: Tensor) -> Tensor:
        return -x / 105 * torch.log(x / 105)

    for f in (log_det, effective_dimension, entropy, torch.square):
        estimate = measure.expectation(f)
        exact = float(f(values).sum())
        assert abs(estimate.value - exact) < 4 * estimate.sem
        assert 0 < estimate.sem < 0.1 * abs(exact)
        assert estimate.num_matvecs == 750


def test_expectation_errors() -> None:
    values = torch.linspace(-1, 1, 20, dtype=torch.float64)
    measure = spectral_measure(rotated(values), 2, 20, generator=generator())
    with pytest.raises(InputError, match=r"f is nan at the node -1; .* finite on \[-1, 1\]"):
        measure.expectation(torch.log)
    with pytest.raises(InputError, match="f must return values of shape"):
        measure.expectation(torch.sum)


# --- files


def same(one: SpectralMeasure, other: SpectralMeasure) -> bool:
    return (
        all(
            torch.equal(a.alphas, b.alphas)
            and torch.equal(a.betas, b.betas)
            and (a.norm, a.exhausted) == (b.norm, b.exhausted)
            for a, b in zip(one.runs, other.runs, strict=True)
        )
        and all(map(torch.equal, one.nodes + one.weights, other.nodes + other.weights))
        and (one.dim, one.probes, one.reorthogonalized, one.dtype, one.num_matvecs)
        == (other.dim, other.probes, other.reorthogonalized, other.dtype, other.num_matvecs)
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "measure.npz"
    spectral_measure(rotated(spread(20)), 3, 5, generator=generator()).save(path)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    A = DenseOperator(rotated(HOSTILE[name]).float())
    measure = spectral_measure(
        A, 3, generator=generator(), probes="sphere", reorthogonalize=name != "wide"
    )
    path = tmp_path / "without suffix"
    measure.save(path)
    assert same(SpectralMeasure.load(path), measure)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_same_measure_same_file(saved: Path) -> None:
    again = saved.with_name("again")
    SpectralMeasure.load(saved).save(again)
    assert again.read_bytes() == saved.read_bytes()


def test_damaged_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    coefficients = SpectralMeasure.load(saved).runs[0].alphas.numpy().tobytes()
    place = content.index(coefficients)
    foreign = io.BytesIO()
    np.savez(foreign, x=np.ones(3))
    lone = io.BytesIO()
    np.save(lone, np.ones(3))
    for broken in (
        b"",
        b"PK\x03\x04",
        content[: len(content) // 2],
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        foreign.getvalue(),
        lone.getvalue(),
        pickle.dumps([1, 2]),
    ):
        saved.write_bytes(broken)
        with pytest.raises(InputError, match=r"measure\.npz is damaged or not a saved"):
            SpectralMeasure.load(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "hvpspec spectral measure 99"),
        ("dim", 2),
        ("probes", "cauchy"),
        ("dtype", "torch.int8"),
        ("lengths", np.array([5, 5])),
        ("lengths", np.array([20, -4, -1])),
        ("alphas", np.full(15, np.nan)),
        ("alphas", np.zeros(15, dtype=np.float32)),
        ("betas", np.full(15, -1.0)),
        ("norms", np.zeros((3, 1))),
        ("exhausted", np.array([object()] * 3)),
    ],
)
def test_false_contents_are_refused(saved: Path, name: str, value: object) -> None:
    with np.load(saved) as archive:
        arrays = dict(archive)
    arrays[name] = np.asarray(value)
    np.savez(saved, **arrays)
    with pytest.raises(InputError, match=r"measure\.npz is damaged or not"):
        SpectralMeasure.load(saved)


@pytest.mark.parametrize("name", ["dim", "num_matvecs"])
def test_infinite_sizes_are_refused(saved: Path, name: str) -> None:
    test_false_contents_are_refused(saved, name, np.inf)


@pytest.mark.parametrize(
    "header",
    [
        "(" * 9000,
        "[" * 5000,
        "-" * 9000 + "1",
        "{'descr':",
        "'",
        "  x\n y\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999,), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }\n",
        "{'descr': 'O', 'fortran_order': False, 'shape': (), }\n",
    ],
    ids=lambda header: f"{header[:9]!r}...{len(header)}",
)
def test_headers_that_are_none_are_refused(saved: Path, header: str) -> None:
    """NumPy reads a header as Python source, which fails in many ways."""
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    encoded = header.encode()
    members["dim.npy"] = b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=r"measure\.npz is damaged or not a saved") as caught:
        SpectralMeasure.load(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(saved))


def test_places_that_cannot_be_used(saved: Path, tmp_path: Path) -> None:
    measure = SpectralMeasure.load(saved)
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        SpectralMeasure.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot read"):
        SpectralMeasure.load(tmp_path)
    with pytest.raises(InputError, match="it is a folder"):
        measure.save(tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        measure.save(tmp_path / "missing" / "measure.npz")


# --- arguments


def test_argument_errors() -> None:
    A = rotated(spread(5))
    with pytest.raises(InputError, match="num_probes must be a whole number of at least 1"):
        spectral_measure(A, 0, generator=generator())
    with pytest.raises(InputError, match="num_steps must be a whole number of at least 1"):
        spectral_measure(A, 2, 0, generator=generator())
    with pytest.raises(InputError, match="block_size must be a whole number of at least 1"):
        spectral_measure(A, generator=generator(), block_size=0)
    with pytest.raises(InputError, match="min_gap must be positive"):
        spectral_measure(A, generator=generator()).outliers(min_gap=0.0)
    with pytest.raises(InputError, match="kind must be"):
        spectral_measure(A, generator=generator(), probes="cauchy")  # type: ignore[arg-type]
