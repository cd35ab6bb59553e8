"""Methods as objects: every option has its effect, and one that a method lacks cannot be given."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

import hvpspec
from hvpspec import Certified, Exact, Filtered, FunctionOperator, Inertia, Quadrature, Rung, index
from tests.linalg.test_dense import rotated

VALUES = torch.cat([torch.linspace(-1, -0.5, 12), torch.linspace(-0.01, 2, 200)]).double()
TRUTH = 12


def operator() -> FunctionOperator:
    return FunctionOperator(len(VALUES), lambda v: VALUES * v)


METHODS = [Exact, Inertia, Certified, Quadrature, Filtered]


@pytest.mark.parametrize("kind", METHODS)
def test_a_name_is_short_for_the_object(kind: Any) -> None:
    by_name, by_object = (
        index(operator(), 0.25, method=kind.name),
        index(operator(), 0.25, method=kind()),
    )
    assert by_name.to_dict() == by_object.to_dict()
    assert by_name.method == kind.name
    assert by_name.lower <= TRUTH <= by_name.upper


@pytest.mark.parametrize(
    ("former", "present"), [("ldl", "inertia"), ("slq", "quadrature"), ("chebyshev", "filtered")]
)
def test_former_names_are_understood(former: Any, present: str) -> None:
    assert index(operator(), 0.25, method=former).method == present


@pytest.mark.parametrize("kind", [Certified, Quadrature, Filtered])
def test_confidence_widens_the_interval(kind: Any) -> None:
    options = {"max_matvecs": 12} if kind is Certified else {"num_steps": 30}
    A = rotated(VALUES)  # where Rademacher probes have a variance
    loose, sure = (index(A, 0.25, method=kind(confidence=c, **options)) for c in (0.5, 0.9999))
    assert (loose.confidence, sure.confidence) == (0.5, 0.9999)
    assert sure.lower <= loose.lower <= loose.upper <= sure.upper
    assert sure.interval != loose.interval


@pytest.mark.parametrize("kind", [Quadrature, Filtered])
def test_probes_and_steps_are_what_is_spent(kind: Any) -> None:
    for num_probes, num_steps in ((3, 7), (4, 11)):
        method = kind(num_probes=num_probes, num_steps=num_steps)
        A = operator()
        result = index(A, 0.25, method=method)
        noise = hvpspec.linalg.measure_noise(operator(), torch.Generator().manual_seed(0))
        assert result.num_matvecs == A.num_matvecs == num_probes * num_steps + noise.num_matvecs


def test_options_of_the_certificate() -> None:
    noise = hvpspec.linalg.measure_noise(operator(), torch.Generator().manual_seed(0)).num_matvecs
    seen: list[Rung] = []
    plain = index(operator(), 0.25, method=Certified(watch=seen.append))
    assert (seen[-1].lower, seen[-1].upper) == plain.interval == (TRUTH, TRUTH)
    assert index(operator(), 0.25, method=Certified(max_matvecs=20)).num_matvecs <= 20 + noise
    blocks = index(operator(), 0.25, method=Certified(num_probes=4))
    assert blocks.num_matvecs > plain.num_matvecs
    assert blocks.index == TRUTH
    # A space of one vector is a harvest each product.
    short = index(operator(), 0.25, method=Certified(num_steps=1, max_matvecs=30))
    assert short.num_matvecs != plain.num_matvecs
    assert short.lower <= TRUTH <= short.upper


def test_zero_rows_that_are_kept_are_eigenvalues_like_others() -> None:
    A = torch.zeros(40, 40, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double()).Q
    A[:20, :20] = Q @ torch.diag(torch.linspace(-1, 1, 20).double()) @ Q.T
    A = (A + A.T) / 2
    apart, kept = index(A), index(A, method=Exact(keep_zero_rows=True))
    assert apart.index == kept.index == 10
    assert apart.eigenvalues is not None
    assert kept.eigenvalues is not None
    assert int((apart.eigenvalues == 0).sum()) == 20
    assert not torch.equal(apart.eigenvalues, kept.eigenvalues)


EVERY_OPTION = sorted({f.name for kind in METHODS for f in fields(kind)})


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("option", EVERY_OPTION)
def test_an_option_of_another_method_is_an_error_that_names_it(kind: Any, option: str) -> None:
    if option in {f.name for f in fields(kind)}:
        return
    with pytest.raises(TypeError, match=f"'{option}'"):
        kind(**{option: 5})
    with pytest.raises(TypeError, match=f"{kind.__name__}.* argument '{option}'"):
        index(operator(), 0.25, method=kind.name, **{option: 5})
    with pytest.raises(TypeError, match=f"{kind.__name__}\\({option}=...\\)"):
        index(operator(), 0.25, method=kind(), **{option: 5})


def test_auto_takes_the_options_of_what_it_chooses() -> None:
    with pytest.raises(TypeError, match=r"Exact.* argument 'confidence'"):
        index(torch.eye(3), confidence=0.9)
    big = FunctionOperator(4000, lambda v: v)
    assert index(big, 0.5, confidence=0.9).confidence == 0.9


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Certified, {"confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
        (Certified, {"max_matvecs": 0}, "max_matvecs must be a whole number"),
        (Quadrature, {"num_steps": 0}, "num_steps must be a whole number"),
        (Filtered, {"num_probes": 1.5}, "num_probes must be a whole number"),
    ],
)
def test_an_option_out_of_range_is_refused_at_once(kind: Any, options: Any, message: str) -> None:
    with pytest.raises(hvpspec.InputError, match=message):
        kind(**options)


def test_a_filter_says_that_it_proves_nothing() -> None:
    result = index(operator(), 0.25, method=Filtered())
    assert result.index is None
    assert not result.certified
    assert result.resolution > 0
    assert "no proof" in str(result)
    assert "proves nothing" in (Filtered.__doc__ or "")
