"""Random vectors: their law, and that a generator determines them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from hvpspec import InputError
from hvpspec.linalg.probes import ProbeKind, draw_probes

KINDS = get_args(ProbeKind)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_covariance(kind: ProbeKind) -> None:
    n, samples = 6, 40_000
    Z = draw_probes(kind, n, samples, generator(0))
    # Each entry of either mean has a variance of at most 2 / samples (Gaussian squares); 5 sigma
    # for 6 + 36 entries.
    tolerance = 5 * (2 / samples) ** 0.5
    torch.testing.assert_close(Z.mean(1), torch.zeros(n).double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(Z @ Z.T / samples, torch.eye(n).double(), rtol=0, atol=tolerance)


def test_the_kinds_are_what_they_are_called() -> None:
    assert bool(draw_probes("rademacher", 50, 20, generator(1)).abs().eq(1).all())
    lengths = draw_probes("sphere", 50, 20, generator(1)).norm(dim=0)
    torch.testing.assert_close(lengths, torch.full((20,), 50**0.5, dtype=torch.float64))
    fourth = draw_probes("gaussian", 200, 200, generator(1)).pow(4).mean()
    assert abs(float(fourth) - 3) < 5 * (96 / 40_000) ** 0.5  # var z^4 = 105 - 9
    signs = draw_probes("sphere", 1, 3, generator(0))
    torch.testing.assert_close(signs.abs(), torch.ones(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_same_generator_same_bits_for_every_dtype(kind: ProbeKind) -> None:
    wide = draw_probes(kind, 30, 4, generator(3))
    assert torch.equal(wide, draw_probes(kind, 30, 4, generator(3)))
    narrow = draw_probes(kind, 30, 4, generator(3), dtype=torch.float32)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide.float())
    advanced = generator(3)
    draw_probes(kind, 30, 4, advanced)
    assert not torch.equal(wide, draw_probes(kind, 30, 4, advanced))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_seeds_share_no_probe(kind: ProbeKind) -> None:
    """Seeding probe i with seed + i makes neighbouring runs see nearly the same vectors."""
    n, k = 400, 8
    Z = torch.cat([draw_probes(kind, n, k, generator(seed)) for seed in range(5)], 1)
    cosines = torch.triu(Z.T @ Z / n, diagonal=1)
    # Cosines of independent vectors have standard deviation 1 / sqrt(n); 780 pairs.
    assert float(cosines.abs().max()) < 6 / n**0.5


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draw_probes("gaussian", 10, 2, generator(0))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_orthogonal_to_a_basis(dtype: torch.dtype, tolerance: float) -> None:
    n, d = 60, 20
    basis = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64, generator=generator(0))).Q.T
    basis = basis.to(dtype)
    Z = draw_probes("gaussian", n, 5, generator(1), dtype=dtype, orthogonal_to=basis)
    # Two passes leave the round-off of one product of n terms, about u sqrt(n) |z| / sqrt(n).
    assert float((basis @ Z).abs().max()) < tolerance
    # What is left is the same vector without its part in the span.
    whole = draw_probes("gaussian", n, 5, generator(1), dtype=dtype)
    torch.testing.assert_close(Z, whole - basis.T @ (basis @ whole), rtol=0, atol=20 * tolerance)


def test_errors() -> None:
    with pytest.raises(InputError, match="num_probes must be a whole number of at least 1, got 0"):
        draw_probes("gaussian", 3, 0, generator(0))
    with pytest.raises(InputError, match=r"generator must be a torch\.Generator, .* got None"):
        draw_probes("gaussian", 3, 1, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 'cauchy'"):
        draw_probes("cauchy", 3, 1, generator(0))  # type: ignore[arg-type]


def test_probes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvpspec.linalg.memory.available_memory", lambda device: 3 * 12 * 1000)
    generator = torch.Generator().manual_seed(0)
    assert draw_probes("gaussian", 1000, 3, generator, dtype=torch.float32).shape == (1000, 3)
    with pytest.raises(InputError, match=r"4 probes of length 1000 in float64 needs 0\.0 MiB"):
        draw_probes("gaussian", 1000, 4, generator, dtype=torch.float32)
