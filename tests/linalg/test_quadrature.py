"""Gauss and Gauss-Radau rules, and the bracket of the mass below a number."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvpspec import FunctionOperator, InputError
from hvpspec.linalg.krylov import LanczosRun, lanczos
from hvpspec.linalg.quadrature import Rule, gauss, gauss_radau, mass_below

U = torch.finfo(torch.float64).eps / 2


def measured(values: Tensor, num_steps: int, seed: int = 0) -> tuple[LanczosRun, Tensor]:
    """A run on diag(values), and the weight of each eigenvalue in its start vector."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(values), dtype=torch.float64, generator=generator)
    values = values.double()
    (run,) = lanczos(FunctionOperator(len(values), lambda v: values * v), z[:, None], num_steps)
    return run, z**2 / (z @ z)


def integral(rule: Rule, degree: int) -> float:
    """The integral of a Chebyshev polynomial, bounded by 1 on [-1, 1]."""
    return float(torch.special.chebyshev_polynomial_t(rule.nodes, degree) @ rule.weights)


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_gauss_is_exact_to_degree_2m_minus_1(m: int) -> None:
    values = torch.linspace(-1, 1, 40, dtype=torch.float64)
    run, weights = measured(values, m)
    exact = Rule(values, weights)
    for degree in range(2 * m):
        assert integral(gauss(run), degree) == pytest.approx(integral(exact, degree), abs=1e-12)
    assert abs(integral(gauss(run), 2 * m) - integral(exact, 2 * m)) > 1e-6


@pytest.mark.parametrize("x", [-1.5, -1.0, -0.3, 0.4, 2.0])
@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_radau_has_the_node_and_is_exact_to_degree_2m(m: int, x: float) -> None:
    values = torch.linspace(-1, 1, 40, dtype=torch.float64)
    run, weights = measured(values, m)
    rule = gauss_radau(run, x)
    assert len(rule.nodes) == m + 1
    assert float((rule.nodes - x).abs().min()) < 1e-12
    assert float(rule.weights.sum()) == pytest.approx(1)
    # A prescribed node inside can push another outside [-1, 1], where the polynomials grow.
    size = max(1.0, float(torch.special.chebyshev_polynomial_t(rule.nodes, 2 * m).abs().max()))
    for degree in range(2 * m + 1):
        exact = integral(Rule(values, weights), degree)
        assert integral(rule, degree) == pytest.approx(exact, abs=1e-12 * size)


def test_rules_of_an_exhausted_run_are_the_measure() -> None:
    values = torch.tensor([-2.0, -2.0, 0.5, 3.0, 3.0, 3.0])
    run, weights = measured(values, 6)
    assert run.exhausted
    for rule in (gauss(run), gauss_radau(run, 0.0)):
        torch.testing.assert_close(rule.nodes, torch.tensor([-2, 0.5, 3]).double())
        expected = torch.stack([weights[:2].sum(), weights[2], weights[3:].sum()])
        torch.testing.assert_close(rule.weights, expected)
    assert mass_below(run, 1.0) == pytest.approx((float(weights[:3].sum()),) * 2)
    assert mass_below(run, -5.0) == (0.0, 0.0)
    assert mass_below(run, 5.0) == pytest.approx((1.0, 1.0))


SPECTRA = st.lists(
    st.one_of(st.floats(-1, 1), st.sampled_from([-1.0, -1e-3, 0.0, 0.0, 1e-6, 0.5, 1.0])),
    min_size=1,
    max_size=30,
)


@given(SPECTRA, st.integers(1, 30), st.floats(-1.2, 1.2), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_the_bracket_holds(values: list[float], m: int, x: float, seed: int) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    run, weights = measured(spectrum, m, seed)
    lower, upper = mass_below(run, x)
    assert 0 <= lower <= upper <= 1 + 1e-12
    # Eigenvalues within round-off of x may be counted or not (a breakdown leaves 10 u ||T||).
    near = 1e-12 * float(spectrum.abs().max())
    surely, perhaps = spectrum < x - near, spectrum <= x + near
    assert lower <= float(weights[perhaps].sum()) + mixing(spectrum, perhaps)
    assert upper >= float(weights[surely].sum()) - mixing(spectrum, surely)


def mixing(spectrum: Tensor, part: Tensor) -> float:
    """How much weight round-off moves across the cut between some eigenvalues and those above.

    It turns eigenvectors on both sides into each other by an angle of 10 u ||T|| / gap (Davis and
    Kahan), and the weight, a sum of squares, changes by twice its sine.
    """
    low, high = spectrum[part], spectrum[~part]
    gap = float(high.min() - low.max()) if len(low) and len(high) else 1.0
    return 1e-9 + 2 * 10 * U * float(spectrum.abs().max()) / gap


@pytest.mark.parametrize("offset", [0.0, 1e-16, -1e-16, 1e-14, -1e-13, 1e-12, 1e-10, -1e-8, 1e-4])
@pytest.mark.parametrize("m", [5, 30, 45])
def test_the_bracket_holds_at_the_nodes_of_gauss(m: int, offset: float) -> None:
    """There the row that extends T grows beyond bounds: x + d_m with d_m up to 1 / offset."""
    generator = torch.Generator().manual_seed(0)
    bulk = 0.05 * torch.randn(50, dtype=torch.float64, generator=generator)
    values = torch.cat([bulk, torch.linspace(-3, 5, 10, dtype=torch.float64)])
    run, weights = measured(values, m)
    for node in gauss(run).nodes.tolist():
        x = node + offset
        lower, upper = mass_below(run, x)
        assert lower <= float(weights[values < x + 1e-13].sum()) + 1e-9
        assert upper >= float(weights[values < x - 1e-13].sum()) - 1e-9


def test_the_bracket_holds_at_the_middle_of_a_symmetric_spectrum() -> None:
    """The commonest number to count below, 0, is a node of every odd Gauss rule here."""
    half = torch.linspace(0.1, 1, 30, dtype=torch.float64)
    values = torch.cat([-half, half])
    (run,) = lanczos(
        FunctionOperator(60, lambda v: values * v), torch.ones(60, 1, dtype=torch.float64), 9
    )
    assert float(gauss(run).nodes.abs().min()) < 1e-15
    lower, upper = mass_below(run, 0.0)
    assert lower - 1e-9 <= 0.5 <= upper + 1e-9
    assert upper - lower < 1


@pytest.mark.parametrize("x", [-0.9, -0.05, 0.1, 0.7])
def test_more_steps_narrow_the_bracket(x: float) -> None:
    """A longer run knows more moments, so its bracket lies inside the shorter one's."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(80, dtype=torch.float64, generator=generator)
    brackets = [mass_below(measured(values, m)[0], x) for m in range(1, 60)]
    for (lower, upper), (next_lower, next_upper) in pairwise(brackets):
        assert next_lower >= lower - 1e-9
        assert next_upper <= upper + 1e-9
    assert brackets[-1][1] - brackets[-1][0] < 0.2 * (brackets[4][1] - brackets[4][0])


@pytest.mark.parametrize("scale", [1e-150, 1e-14, 1e-8, 1e8, 1e150])
def test_brackets_do_not_depend_on_the_scale(scale: float) -> None:
    values = torch.linspace(-1, 1, 40, dtype=torch.float64)
    run, _ = measured(values, 12)
    scaled = LanczosRun(run.alphas * scale, run.betas * scale, run.norm, run.exhausted)
    for x in (-0.5, 0.01, 0.6):
        expected = mass_below(run, x)
        assert mass_below(scaled, x * scale) == pytest.approx(expected, abs=1e-11)


def test_a_node_at_nan_is_refused() -> None:
    run, _ = measured(torch.linspace(-1, 1, 9), 3)
    with pytest.raises(InputError, match="x must be finite, got nan"):
        gauss_radau(run, float("nan"))
