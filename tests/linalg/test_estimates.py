"""Traces, norms and diagonals: known variances, exact ends, targets and hostile matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvpspec import ComputationError, DenseOperator, FunctionOperator, InputError
from hvpspec.linalg.estimates import Estimate, diagonal, frobenius_norm, trace
from hvpspec.linalg.probes import ProbeKind, draw_probes
from tests.linalg.test_dense import HOSTILE, rotated

TRACE_METHODS = ["hutchinson", "hutch++", "xtrace"]
#: Every estimator, as a function of operator, budget and options.
ESTIMATORS: dict[str, Callable[..., Estimate[Any]]] = {
    **{m: lambda *a, m=m, **k: trace(*a, method=m, **k) for m in TRACE_METHODS},
    **{f"diagonal {m}": lambda *a, m=m, **k: diagonal(*a, method=m, **k) for m in ["hutchinson"]},
    "xdiag": lambda *a, **k: diagonal(*a, method="xdiag", **k),
    "frobenius": frobenius_norm,
}
TRUTH: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(TRACE_METHODS, torch.trace),
    **dict.fromkeys(["diagonal hutchinson", "xdiag"], torch.diagonal),
    "frobenius": torch.linalg.matrix_norm,
}
FLAT = torch.linspace(-1, 1, 60)
DECAYING = torch.tensor([(-0.7) ** i for i in range(60)])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of tiny products, on which threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def number(x: float | Tensor) -> Tensor:
    """A value or standard error as a float64 tensor; anything but float64 is refused."""
    assert isinstance(x, float) or x.dtype == torch.float64
    return torch.as_tensor(x, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def repeat(name: str, A: Tensor, budget: int, runs: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Errors and standard errors of independent runs, each (runs,) or (runs, n)."""
    operator = DenseOperator(A)
    estimates = [
        ESTIMATORS[name](operator, budget, generator=seeded(s), **options) for s in range(runs)
    ]
    values = torch.stack([number(e.value) for e in estimates])
    sems = torch.stack([number(e.sem) for e in estimates])
    return values - TRUTH[name](A), sems


@pytest.mark.parametrize("values", [FLAT, DECAYING], ids=["flat", "decaying"])
def test_hutchinson_has_the_known_variance(values: Tensor) -> None:
    A, k, runs = rotated(values), 20, 300
    errors, sems = repeat("hutchinson", A, k, runs)
    variance = 2 * float(A.square().sum() - A.diagonal().square().sum()) / k
    # A quadratic form of Rademacher variables has an excess kurtosis of at most 12, as one Gaussian
    # squared has; a mean of k of them, 12 / k.
    assert abs(errors.mean()) < 5 * math.sqrt(variance / runs)
    assert abs(errors.var() / variance - 1) < 5 * math.sqrt((2 + 12 / k) / runs)
    assert abs(sems.square().mean() / variance - 1) < 5 * math.sqrt((2 + 12) / k / runs)
    # Student's t with k - 1 degrees of freedom has the standard deviation sqrt((k - 1) / (k - 3));
    # a kurtosis of 12 changes that by some 12 / (4 k).
    spread = (errors / sems).std() / math.sqrt((k - 1) / (k - 3))
    assert abs(spread - 1) < 5 * math.sqrt((2 + 12 / k) / 4 / runs) + 12 / (4 * k)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["hutchinson", "diagonal hutchinson", "frobenius"])
def test_blocks_are_merged_into_one_sample(name: str, block_size: int) -> None:
    A, k, source = rotated(DECAYING), 14, seeded(0)
    widths = [min(block_size, k - start) for start in range(0, k, block_size)]
    Z = torch.cat([draw_probes("rademacher", len(A), w, source) for w in widths], 1)
    forms = {"hutchinson": (Z * (A @ Z)).sum(0), "diagonal hutchinson": Z * (A @ Z)}
    x = forms.get(name, (A @ Z).square().sum(0))
    value, sem = x.mean(-1), x.std(-1) / k**0.5
    if name == "frobenius":
        value, sem = value.sqrt(), sem / (2 * value.sqrt())
    estimate = ESTIMATORS[name](A, k, generator=seeded(0), block_size=block_size)
    torch.testing.assert_close(number(estimate.value), value)
    torch.testing.assert_close(number(estimate.sem), sem)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("method", TRACE_METHODS)
def test_traces_are_unbiased_for_every_probe(method: str, kind: ProbeKind) -> None:
    errors, _ = repeat(method, rotated(DECAYING), 12, 120, kind=kind)
    assert abs(errors.mean()) < 5 * errors.std() / math.sqrt(len(errors))


@pytest.mark.parametrize("values", [FLAT, DECAYING], ids=["flat", "decaying"])
@pytest.mark.parametrize("name", ["hutch++", "frobenius"])
def test_standard_errors_cover(name: str, values: Tensor) -> None:
    runs = 120
    errors, sems = repeat(name, rotated(values), 40, runs)
    # Four sigma of the spread of an average of some 14 samples.
    slack = 4 * math.sqrt((2 + 12 / 14) / 4 / runs)
    ratio = errors.square().mean().sqrt() / sems.square().mean().sqrt()
    assert 1 - slack < ratio < 1 + slack


@pytest.mark.parametrize(
    ("values", "m", "most"),
    [
        (FLAT, 10, 1.1),
        (torch.linspace(1, 2, 60), 10, 1.1),
        (1 / torch.arange(1, 61), 10, 1.1),
        (1 / torch.arange(1, 61), 20, 1.1),
        (DECAYING, 5, 2.0),
        (DECAYING, 20, 2.5),
        (torch.cat([torch.full((8,), 5.0), 0.1 * FLAT[8:]]), 20, 1.1),
    ],
    ids=["flat", "positive", "power law", "more probes", "fast", "more probes on fast", "low rank"],
)
@pytest.mark.parametrize("name", ["xtrace", "xdiag"])
def test_leave_one_out_counts_the_correlation(
    name: str, values: Tensor, m: int, most: float
) -> None:
    runs = 300
    errors, sems = repeat(name, rotated(values), 2 * m, runs)
    # The squared errors are those of a mean of m forms; see the test of Hutchinson's variance. The
    # squares for independent samples, std^2 / m, would give ratios down to 0.4. ``most`` is
    # what cutting off negative estimates of the covariance leads to (XDiag does that by entry).
    slack = 4 * math.sqrt((2 + 12 / m) / runs)
    ratio = sems.square().mean() / errors.square().mean()
    assert 1 - slack < ratio
    assert ratio * (1 - slack) < most


@pytest.mark.parametrize("name", ["hutchinson", "diagonal hutchinson"])
def test_rademacher_is_exact_on_diagonal_matrices(name: str) -> None:
    A = torch.diag(torch.randn(50, generator=seeded(0), dtype=torch.float64))
    errors, sems = repeat(name, A, 12, 3)
    assert max(errors.abs().max(), sems.max()) < 1e-15 * float(A.abs().sum())


@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
@pytest.mark.parametrize("name", ["hutch++", "xtrace", "xdiag"])
def test_exact_on_low_rank(name: str, kind: ProbeKind) -> None:
    A = rotated(torch.cat([torch.tensor([3.0, -2.0, 1.0, 0.01]), torch.zeros(96)]))
    options = {} if name == "xdiag" else {"kind": kind}
    for block_size in (3, 16):
        errors, sems = repeat(name, A, 30, 5, block_size=block_size, **options)
        assert errors.abs().max() < 1e-13
        assert sems.max() < 1e-13


def test_low_rank_parts_pay_on_decaying_spectra() -> None:
    A = rotated(DECAYING)
    rms = {name: float(repeat(name, A, 30, 30)[0].square().mean().sqrt()) for name in ESTIMATORS}
    assert rms["hutch++"] < rms["hutchinson"] / 10
    assert rms["xtrace"] < rms["hutch++"]
    assert rms["xdiag"] < rms["diagonal hutchinson"] / 10


def orthonormal_range(Y: Tensor) -> Tensor:
    """An orthonormal basis of the range of Y, whatever its rank."""
    U, sigma, _ = torch.linalg.svd(Y, full_matrices=False)
    return U[:, sigma > 1e-12 * torch.linalg.vector_norm(Y)]


def first_blocks() -> Tensor:
    """Two blocks of ones in a larger zero matrix: many Rademacher products are exactly zero."""
    A = torch.zeros(24, 24, dtype=torch.float64)
    A[:2, :2], A[2:6, 2:6] = 1.0, -2.0
    return A


def definition(A: Tensor, Omega: Tensor, kind: ProbeKind) -> tuple[Tensor, Tensor]:
    """Samples of XTrace (m, m) and XDiag (m, m, n): [i, j] is that of probe i without probe j."""
    (n, m), Y = Omega.shape, A @ Omega

    def without(*probes: int) -> Tensor:
        return orthonormal_range(Y[:, [k for k in range(m) if k not in probes]])

    rank = without().shape[1]
    needed = [without(i).shape[1] < rank for i in range(m)]
    traces = torch.zeros(m, m, dtype=torch.float64)
    diagonals = torch.zeros(m, m, n, dtype=torch.float64)
    for i, j in itertools.product(range(m), repeat=2):
        # By convention two probes matter together only if one of them does.
        Q = without(i, j) if needed[i] or needed[j] else without()
        P = torch.eye(n, dtype=torch.float64) - Q @ Q.T
        v = P @ Omega[:, i]
        scale = 1.0 if kind == "rademacher" else (n - Q.shape[1]) / (v @ v)
        traces[i, j] = (Q.T @ A @ Q).trace() + scale * (v @ A @ v)
        diagonals[i, j] = (Q @ Q.T @ A).diagonal() + Omega[:, i] * (P @ A @ Omega[:, i])
    return traces, diagonals


@pytest.mark.parametrize("block_size", [2, 5, 9])
@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
@pytest.mark.parametrize(
    "A",
    [
        rotated(DECAYING[:24]),
        rotated(torch.cat([torch.linspace(1, 2, 8), torch.zeros(16)])),
        first_blocks(),
    ],
    ids=["full rank", "rank one less than the probes", "zero products"],
)
def test_leave_one_out_agrees_with_its_definition(
    A: Tensor, kind: ProbeKind, block_size: int
) -> None:
    n, m = len(A), 9
    for seed in range(3):
        source = seeded(seed)
        widths = [min(block_size, m - start) for start in range(0, m, block_size)]
        Omega = torch.cat([draw_probes(kind, n, w, source) for w in widths], 1)
        traces, diagonals = definition(A, Omega, kind)
        options = {"generator": seeded(seed), "block_size": block_size}
        checks = [(trace(A, 2 * m, method="xtrace", kind=kind, **options), traces)]
        if kind == "rademacher":
            options["generator"] = seeded(seed)
            checks.append((diagonal(A, 2 * m, method="xdiag", **options), diagonals))
        for estimate, samples in checks:
            x = samples.diagonal()
            d = x[..., None] - samples.movedim((0, 1), (-2, -1))  # 0 where i = j
            covariance = (d * d.mT).sum((-2, -1)) / (m * (m - 1))
            sem = (x.var(-1) / m + covariance.clamp_min(0)).sqrt()
            close = {"rtol": 1e-8, "atol": 1e-11}
            torch.testing.assert_close(number(estimate.value), x.mean(-1), **close)
            torch.testing.assert_close(number(estimate.sem), sem, **close)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_products_are_counted_and_within_the_budget(name: str) -> None:
    operator = DenseOperator(rotated(FLAT))
    operator.matvec(torch.ones(60, dtype=torch.float64))
    for budget in (4, 5, 31, 59, 60, 200):
        for options in ({"block_size": 1}, {"block_size": 7}, {"rtol": 0.2}, {"atol": 1e-9}):
            before, seen = operator.num_matvecs, []
            estimate = ESTIMATORS[name](
                operator,
                budget,
                generator=seeded(budget),
                progress=lambda done, total, seen=seen: seen.append((done, total)),
                **options,
            )
            assert estimate.num_matvecs == operator.num_matvecs - before <= budget
            assert seen[-1][0] == estimate.num_matvecs
            assert all(done <= total <= budget for done, total in seen)


@pytest.mark.parametrize("sign", [0, -1])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_targets_are_reached(name: str, sign: int) -> None:
    values = torch.linspace(-1, 1, 250) if sign == 0 else -torch.linspace(0, 1, 250)
    A = rotated(values)
    norm = float(torch.linalg.matrix_norm(A))
    true = TRUTH[name](A)
    for target in ({"rtol": 0.2}, {"atol": 0.2 * norm}, {"rtol": 0.2, "atol": 1e-9}):
        estimate = ESTIMATORS[name](A, generator=seeded(0), **target)
        error = torch.linalg.vector_norm(number(estimate.value) - true)
        sem = torch.linalg.vector_norm(number(estimate.sem))
        # The stopping rule works with the estimated norm, known to a few per cent here.
        assert sem <= 1.2 * 0.2 * max(norm, float(torch.linalg.vector_norm(true)))
        assert error <= 5 * sem
        assert estimate.num_matvecs < 200
    # Where sampling cannot reach it, n more products give the exact answer.
    exact = ESTIMATORS[name](A, generator=seeded(0), rtol=1e-6)
    assert 250 <= exact.num_matvecs <= 500
    torch.testing.assert_close(number(exact.value), true, rtol=1e-12, atol=1e-11)
    # A budget below n is kept, and the miss shows.
    missed = ESTIMATORS[name](A, 40, generator=seeded(0), rtol=1e-6)
    assert missed.num_matvecs <= 40
    assert number(missed.sem).max() > 1e-6 * norm


def test_targets_see_the_norm_of_the_low_rank_part() -> None:
    A = rotated(torch.cat([torch.tensor([1e3, -1e3]), torch.linspace(-1, 1, 248)]))
    for method, most in (("hutch++", 33 + 33 + 16), ("xtrace", 2 * 16)):
        estimate = trace(A, generator=seeded(0), method=method, rtol=0.01)
        assert estimate.sem < 0.01 * 1.2 * math.sqrt(2) * 1e3
        assert estimate.num_matvecs <= most


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_target_waits_for_ten_samples(name: str) -> None:
    A = DenseOperator(rotated(FLAT))
    for seed in range(10):
        estimate = ESTIMATORS[name](A, generator=seeded(seed), rtol=2.0, block_size=1)
        assert 10 <= estimate.num_matvecs < 60


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_zero_matrix_meets_any_target_at_once(name: str) -> None:
    zero = FunctionOperator(1000, torch.zeros_like)
    for target in ({"rtol": 1e-9}, {"atol": 1e-300}):
        estimate = ESTIMATORS[name](zero, generator=seeded(0), **target)
        assert number(estimate.value).eq(0).all()
        assert number(estimate.sem).eq(0).all()
        assert estimate.num_matvecs <= 33 + 16


@pytest.mark.parametrize("name", ESTIMATORS)
def test_same_generator_same_bits(name: str) -> None:
    A = rotated(FLAT)
    first, second = (ESTIMATORS[name](A, 20, generator=seeded(3)) for _ in range(2))
    other = ESTIMATORS[name](A, 20, generator=seeded(4))
    assert torch.equal(number(first.value), number(second.value))
    assert torch.equal(number(first.sem), number(second.sem))
    assert not torch.equal(number(first.value), number(other.value))


@pytest.mark.parametrize("spectrum", HOSTILE)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_hostile_matrices_at_every_scale(name: str, spectrum: str) -> None:
    values = HOSTILE[spectrum].double()
    for repeats in (1, 4):  # with n below and above the budget
        A = rotated(values.repeat(repeats))
        for budget in (4, 9):
            if budget < min(4, len(A)):
                continue
            base = ESTIMATORS[name](A, budget, generator=seeded(0))
            value, sem = number(base.value), number(base.sem)
            assert torch.isfinite(value).all()
            assert torch.isfinite(sem).all()
            if budget >= len(A):
                torch.testing.assert_close(value, TRUTH[name](A))
                assert sem.eq(0).all()
            for c in (1e-8, 1e8):
                scaled = ESTIMATORS[name](c * A, budget, generator=seeded(0))
                atol = 1e-12 * float(values.abs().sum())
                for x, y in ((scaled.value, value), (scaled.sem, sem)):
                    torch.testing.assert_close(number(x) / c, y, rtol=1e-10, atol=atol)
                assert scaled.num_matvecs == base.num_matvecs


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 1e307])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scales_of_which_no_error_can_be_given_are_refused(name: str, scale: float) -> None:
    A = rotated(torch.linspace(-1, 2, 12)) * scale
    for budget in (9, 12):
        with pytest.raises(ComputationError, match=r"products of size .* are out of range"):
            ESTIMATORS[name](A, budget, generator=seeded(0))
    narrow = (rotated(torch.linspace(-1, 2, 12)) * 1e-40).float()
    with pytest.raises(ComputationError, match=r"underflow or overflow in torch\.float32"):
        ESTIMATORS[name](narrow, 9, generator=seeded(0))


@pytest.mark.parametrize("name", ["diagonal hutchinson", "xdiag"])
def test_diagonals_are_unbiased_and_covered(name: str) -> None:
    errors, sems = repeat(name, rotated(DECAYING), 24, 100)
    assert (errors.mean(0).abs() < 5 * errors.std(0) / 10).all()
    ratio = errors.square().mean().sqrt() / sems.square().mean().sqrt()
    # XDiag's square is biased upwards where the spectrum decays fast.
    assert (0.65 if name == "xdiag" else 0.85) < ratio < 1.15


@pytest.mark.parametrize("name", ESTIMATORS)
def test_float32_operators_give_float64_statistics(name: str) -> None:
    A = rotated(torch.tensor([(-0.7) ** i for i in range(200)]))
    double, single = (ESTIMATORS[name](X, 30, generator=seeded(0)) for X in (A, A.float()))
    # The probes are the same, so the estimates differ by the products' round-off alone.
    for x, y in ((double.value, single.value), (double.sem, single.sem)):
        torch.testing.assert_close(number(x), number(y), rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    A, generator = rotated(FLAT), seeded(0)
    for name in ESTIMATORS:
        with pytest.raises(InputError, match=r"num_matvecs must be at least \d, or n = 60"):
            ESTIMATORS[name](A, 1, generator=generator)
        with pytest.raises(InputError, match="rtol must be positive"):
            ESTIMATORS[name](A, generator=generator, rtol=0.0)
        with pytest.raises(InputError, match=r"atol must be positive .* got nan"):
            ESTIMATORS[name](A, generator=generator, atol=math.nan)
        with pytest.raises(InputError, match="block_size must be at least 1, got 0"):
            ESTIMATORS[name](A, generator=generator, block_size=0)
    for name in ("hutch++", "xtrace", "xdiag"):
        with pytest.raises(InputError, match="at least 4"):
            ESTIMATORS[name](A, 3, generator=generator)
    with pytest.raises(InputError, match="num_matvecs must be"):
        trace(torch.eye(1), 0, generator=generator)
    with pytest.raises(InputError, match="method must be one of 'hutchinson', 'hutch"):
        trace(A, generator=generator, method="exact")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="method must be one of 'hutchinson', 'xdiag', got"):
        diagonal(A, generator=generator, method="xtrace")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="kind must be one of"):
        trace(torch.eye(2), generator=generator, kind="uniform")  # type: ignore[arg-type]
    huge = FunctionOperator(10**9, lambda v: v)
    with pytest.raises(InputError, match="method='hutchinson' has none"):
        trace(huge, generator=generator, method="hutch++")
