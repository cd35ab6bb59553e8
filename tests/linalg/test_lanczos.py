"""The Lanczos recurrence: its identity, its breakdowns, its blocks, and the traps of others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvpspec import DenseOperator, FunctionOperator, InputError, NonFiniteError
from hvpspec.linalg.krylov import LanczosRun, dot, lanczos, norm
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import draw_probes
from hvpspec.linalg.quadrature import gauss
from tests.linalg.test_dense import HOSTILE, rotated

U = torch.finfo(torch.float64).eps / 2


def starts(n: int, k: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw_probes("gaussian", n, k, torch.Generator().manual_seed(seed), dtype=dtype)


def bases(run: LanczosRun) -> tuple[Tensor, Tensor]:
    assert run.basis is not None
    assert run.next_vector is not None
    return run.basis, run.next_vector


def check_identity(A: SymmetricOperator, run: LanczosRun, scale: float) -> None:
    """``A Q^T = Q^T T + r e_m^T`` with orthonormal Q, to round-off in float64."""
    Q, q = bases(run)
    m, n = Q.shape
    right = Q.T @ run.T
    right[:, -1] += run.betas[-1] * q
    # An exhausted run leaves a residual of up to 10 u ||T|| out; a product errs by n u ||A||.
    error = torch.linalg.matrix_norm(A.matmat(Q.T.contiguous()) - right)
    assert float(error) <= (10 + n) * m * U * scale
    assert float((Q @ Q.T - torch.eye(m).double()).abs().max()) <= 1e-12
    if not run.exhausted:
        assert float((Q @ q).abs().max()) <= 1e-12
        assert abs(float(q.norm()) - 1) <= 1e-12


@pytest.mark.parametrize("scale", [1e-14, 1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HOSTILE)
def test_identity_on_hostile_spectra(name: str, scale: float) -> None:
    values = HOSTILE[name].double() * scale
    A = DenseOperator(rotated(values))
    for m in (1, 2, len(values), 50):
        for run in lanczos(A, starts(len(values), 3), m):
            check_identity(A, run, float(values.abs().max()))
            assert len(run.alphas) == len(run.betas) <= min(m, len(values))


def test_identity_and_orthogonality_at_many_steps() -> None:
    """Orthogonality is kept beyond 50 steps, with outliers that converge after ten."""
    values = torch.cat([torch.linspace(-1e-3, 1e-3, 380), torch.logspace(-2, 2, 20)])
    A = DenseOperator(rotated(values))
    (run,) = lanczos(A, starts(400), 120)
    assert len(run.alphas) == 120
    check_identity(A, run, 100.0)


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_full_depth_gives_all_eigenvalues(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, dtype=torch.float64, generator=generator).sort().values
    (run,) = lanczos(DenseOperator(rotated(values)), starts(n), n)
    assert run.exhausted
    torch.testing.assert_close(torch.linalg.eigvalsh(run.T), values, rtol=0, atol=20 * n * U)


def test_powers_of_two_scale_bit_by_bit() -> None:
    A = rotated(torch.linspace(-1, 3, 40))
    (run,) = lanczos(DenseOperator(A), starts(40), 25)
    for power in (-30, -7, 40):
        (scaled,) = lanczos(DenseOperator(A * 2.0**power), starts(40), 25)
        assert torch.equal(scaled.alphas, run.alphas * 2.0**power)
        assert torch.equal(scaled.betas, run.betas * 2.0**power)
        assert torch.equal(bases(scaled)[0], bases(run)[0])


@pytest.mark.parametrize("scale", [1e-14, 1e-8, 1e8])
def test_other_scales_to_round_off(scale: float) -> None:
    values = torch.linspace(-1, 3, 40)
    (run,) = lanczos(DenseOperator(rotated(values)), starts(40), 25)
    (scaled,) = lanczos(DenseOperator(rotated(values) * scale), starts(40), 25)
    assert not scaled.exhausted
    # Coefficients amplify round-off, the eigenvalues of T much less: both are compared with room.
    torch.testing.assert_close(scaled.alphas / scale, run.alphas, rtol=0, atol=1e-10)
    torch.testing.assert_close(scaled.betas / scale, run.betas, rtol=0, atol=1e-10)


def test_negation_mirrors_bit_by_bit() -> None:
    A = rotated(torch.linspace(-1, 3, 40))
    (run,) = lanczos(DenseOperator(A), starts(40), 25)
    (mirrored,) = lanczos(DenseOperator(-A), starts(40), 25)
    assert torch.equal(mirrored.alphas, -run.alphas)
    assert torch.equal(mirrored.betas, run.betas)


@pytest.mark.parametrize("scale", [1e-14, 1e-8, 1.0, 1e8])
@pytest.mark.parametrize(
    ("values", "distinct"),
    [
        ([0.0] * 6, [0.0]),
        ([3.0] * 6, [3.0]),
        ([0.0] * 8 + [2.0], [0.0, 2.0]),
        ([-1.0] * 4 + [2.0] * 5, [-1.0, 2.0]),
        ([-2.0] * 30 + [0.0] * 30 + [1.0] * 30, [-2.0, 0.0, 1.0]),
        ([-3.0], [-3.0]),
    ],
)
def test_breakdown_is_an_exact_end(
    values: list[float], distinct: list[float], scale: float
) -> None:
    """Low rank and repeated eigenvalues end a run early, on exact answers and no NaN."""
    spectrum = torch.tensor(values, dtype=torch.float64) * scale
    A = FunctionOperator(len(values), lambda v: spectrum * v)
    for run in lanczos(A, starts(len(values), 4), len(values)):
        assert run.exhausted
        assert len(run.alphas) == len(distinct)
        assert bool(torch.isfinite(run.alphas).all())
        expected = torch.tensor(distinct, dtype=torch.float64) * scale
        largest = float(expected.abs().max())
        rule = gauss(run)
        torch.testing.assert_close(rule.nodes, expected, rtol=0, atol=100 * U * largest)
        assert not bases(run)[1].any()


def test_one_probe_ends_within_a_block() -> None:
    """Columns that are eigenvectors end alone, and cost no product after."""
    values = torch.linspace(1, 2, 12, dtype=torch.float64)
    A = FunctionOperator(12, lambda v: values * v)
    Z = starts(12, 3)
    Z[:, 1] = 0
    Z[4, 1] = -5.0
    seen: list[tuple[int, int]] = []
    runs = lanczos(A, Z, 6, progress=lambda *done: seen.append(done))
    assert [len(run.alphas) for run in runs] == [6, 1, 6]
    assert [run.exhausted for run in runs] == [False, True, False]
    assert A.num_matvecs == 13
    assert seen == [(3, 18), (5, 18), (7, 18), (9, 18), (11, 18), (13, 18)]
    assert float(runs[1].alphas) == pytest.approx(float(values[4]))
    assert runs[1].norm == 5.0
    for i in (0, 2):
        (single,) = lanczos(A, Z[:, [i]], 6)
        torch.testing.assert_close(runs[i].alphas, single.alphas, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_block_is_its_single_runs(reorthogonalize: bool) -> None:
    A = DenseOperator(rotated(torch.linspace(-1, 2, 50)))
    Z = starts(50, 4)
    block = lanczos(A, Z, 15, reorthogonalize=reorthogonalize)
    for i, run in enumerate(block):
        (single,) = lanczos(A, Z[:, [i]], 15, reorthogonalize=reorthogonalize)
        # A block's GEMM and a vector's GEMV round differently.
        torch.testing.assert_close(run.alphas, single.alphas, rtol=0, atol=1e-11)
        torch.testing.assert_close(run.betas, single.betas, rtol=0, atol=1e-11)
        assert run.norm == pytest.approx(float(Z[:, i].norm()))


def test_without_reorthogonalisation_the_moments_stay() -> None:
    """Copies share the weight of one, so that moments and densities agree; no basis is kept."""
    values = torch.cat([torch.linspace(-0.01, 0.01, 190), torch.logspace(-1, 2, 10)])
    A = DenseOperator(rotated(values))
    (kept,) = lanczos(A, starts(200), 60)
    (free,) = lanczos(A, starts(200), 60, reorthogonalize=False)
    assert free.basis is None
    assert free.next_vector is None
    assert not free.exhausted
    copies = gauss(free).nodes
    assert int((copies > 99).sum()) > 1  # the loss of orthogonality is really there
    for p in range(6):
        moments = [
            float((rule.nodes / 100) ** p @ rule.weights) for rule in (gauss(kept), gauss(free))
        ]
        assert moments[0] == pytest.approx(moments[1], rel=1e-10)


def test_copies_are_not_taken_for_the_whole_space() -> None:
    """Without reorthogonalisation n steps do not exhaust the space, so nothing is exact."""
    values = torch.cat([torch.linspace(-0.01, 0.01, 50), torch.logspace(-1, 2, 10)])
    A = DenseOperator(rotated(values))
    (run,) = lanczos(A, starts(60), 60, reorthogonalize=False)
    missed = (torch.linalg.eigvalsh(run.T) - values.double().sort().values).abs().max()
    assert float(missed) > 1  # T is not A in another basis
    assert not run.exhausted


def test_narrow_operators_have_wide_coefficients() -> None:
    values = torch.linspace(-1, 2, 80)
    A = rotated(values)
    (wide,) = lanczos(DenseOperator(A), starts(80), 20)
    (narrow,) = lanczos(DenseOperator(A.float()), starts(80, dtype=torch.float32), 20)
    assert narrow.alphas.dtype == narrow.betas.dtype == torch.float64
    assert bases(narrow)[0].dtype == torch.float32
    # Products err by a few 6e-8; the recurrence amplifies that while no Ritz value has converged
    # by little.
    torch.testing.assert_close(narrow.alphas, wide.alphas, rtol=0, atol=1e-4)
    torch.testing.assert_close(narrow.betas, wide.betas, rtol=0, atol=1e-4)


def test_sums_over_long_vectors_are_those_of_float64() -> None:
    """Over several pieces, the last shorter, and over strided entries."""
    n = 3 * 2**16 + 5
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, n, 2, generator=generator)[..., 0]
    xy, xx = x.double() * y.double(), x.double().square()
    # n additions err by n u times the sum of sizes at most; float32 errs by 1e9 times as much.
    assert abs(dot(x, y) - math.fsum(xy.tolist())) <= n * U * float(xy.abs().sum())
    for shaped in (x, x[:-1].view(2, -1)):
        exact = math.sqrt(math.fsum(xx[: shaped.numel()].tolist()))
        assert norm(shaped) == pytest.approx(exact, rel=n * U)
    assert norm(x[:0]) == 0.0


def test_products_are_counted_and_inputs_left_alone() -> None:
    A = DenseOperator(rotated(torch.linspace(-1, 2, 30)))
    Z = starts(30, 5)
    before = Z.clone()
    lanczos(A, Z, 7)
    assert A.num_matvecs == 35
    assert torch.equal(Z, before)
    lanczos(A, Z[:, :1], 1000)
    assert A.num_matvecs == 35 + 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_on_a_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    A = DenseOperator(rotated(torch.linspace(-1, 2, 30)).to(dtype))
    Z = starts(30, 3, dtype=dtype)
    for on_disk, in_memory in zip(
        lanczos(A, Z, 12, basis_folder=tmp_path), lanczos(A, Z, 12), strict=True
    ):
        assert list(tmp_path.iterdir()) == []  # the file has no name
        assert torch.equal(on_disk.alphas, in_memory.alphas)
        assert torch.equal(on_disk.betas, in_memory.betas)
        assert all(map(torch.equal, bases(on_disk), bases(in_memory)))


def test_a_basis_on_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    A = DenseOperator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(InputError, match=r"cannot keep 0\.0 MiB in .*none: No such file or dir"):
        lanczos(A, starts(3), 2, basis_folder=tmp_path / "none")
    large = FunctionOperator(10**8, lambda v: v)  # 7 PiB
    before = large.num_matvecs
    with pytest.raises(InputError, match=r"GiB in .*: (No space left|File too large)"):
        lanczos(large, torch.ones(1).expand(10**8, 1), 10**7, basis_folder=tmp_path)
    assert large.num_matvecs == before
    assert list(tmp_path.iterdir()) == []


def test_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers that the message names do fit, and one more does not."""
    A, Z = DenseOperator(rotated(torch.linspace(-1, 2, 30))), starts(30, 4)
    for room, steps, probes in ((50, 11, 2), (21, 4, 1), (10, 1, 0), (4, 0, 0)):
        monkeypatch.setattr(
            "hvpspec.linalg.memory.available_memory", lambda device, room=room: room * 30 * 8
        )
        with pytest.raises(InputError) as raised:
            lanczos(A, Z, 20)
        words = str(raised.value)
        assert ("num_steps=" in words, "block_size=" in words) == (steps > 0, probes > 0)
        if steps:
            assert f"choose num_steps={steps}" in words
            lanczos(A, Z, steps)
            with pytest.raises(InputError):
                lanczos(A, Z, steps + 1)
        if probes:
            assert f"{probes} probes at a time (block_size={probes}), which fit, or" in words
            lanczos(A, Z[:, :probes], 20)
            with pytest.raises(InputError):
                lanczos(A, Z[:, : probes + 1], 20)


def test_errors() -> None:
    A = DenseOperator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(InputError, match="num_steps must be a whole number of at least 1, got 0"):
        lanczos(A, starts(3), 0)
    with pytest.raises(InputError, match=r"start vectors as columns, shape \(n, k\), got \(3,\)"):
        lanczos(A, torch.ones(3, dtype=torch.float64), 2)
    with pytest.raises(InputError, match="start vector is zero"):
        lanczos(A, torch.zeros(3, 1, dtype=torch.float64), 2)
    with pytest.raises(InputError, match="reorthogonalize=False"):
        lanczos(FunctionOperator(10**8, lambda v: v), torch.ones(1).expand(10**8, 1), 10**4)
    with pytest.raises(NonFiniteError):
        lanczos(FunctionOperator(3, lambda v: v / 0), starts(3), 2)
