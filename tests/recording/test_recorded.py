"""Runs that are interrupted go on with the same bits; what is foreign or damaged is found."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import hvpspec
from hvpspec import DenseOperator, InputError, RecordedOperator, SymmetricOperator
from hvpspec import files as hvpspec_files
from hvpspec.curvature import operator as curvature_operator
from hvpspec.linalg.digests import digest
from hvpspec.results import plain

ABOUT = "checkpoint.json"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def matrix(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    return (Q * torch.linspace(-1, 3, 60).double()) @ Q.T


class Interrupted(DenseOperator):
    """A float32 operator with a float64 copy, both of which fail after some products together."""

    def __init__(self, A: Tensor, left: list[float]) -> None:
        super().__init__(A)
        self.left = left

    def _matmat(self, V: Tensor) -> Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt
        return super()._matmat(V)

    def in_float64(self) -> DenseOperator:
        return self if self.dtype == torch.float64 else Interrupted(self._A.double(), self.left)

    def fingerprint(self) -> dict[str, str]:
        return {**super().fingerprint(), "operator": "Interrupted"}


def operator(products: float = float("inf")) -> Interrupted:
    A = matrix().float()
    return Interrupted((A + A.T) / 2, [products])


QUESTIONS: dict[str, Callable[[SymmetricOperator], Any]] = {
    "density": lambda A: hvpspec.spectral_measure(A, 3, 12, generator=seeded()).nodes,
    "index": lambda A: hvpspec.index(A, 0.05, method="certified", generator=seeded()),
    "exact index": lambda A: hvpspec.index(A, method="exact"),
    "eigenvalues": lambda A: hvpspec.eigsh(A, 3, generator=seeded()),
    "trace": lambda A: [
        hvpspec.trace(A, 30, generator=seeded()),
        hvpspec.frobenius_norm(A, 20, generator=seeded()),
    ],
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_run_that_is_interrupted_again_and_again(question: str, tmp_path: Path) -> None:
    ask = QUESTIONS[question]
    with RecordedOperator(operator(), tmp_path / "whole") as whole:
        expected = ask(whole)
    folder, interruptions = tmp_path / "parts", 0
    for every in (0.0, 1e6) * 50:  # written at each product, and only at the end
        try:
            # The first product of each width is made every time: an index has four.
            left = 3 if question == "trace" else 5
            with RecordedOperator(operator(left), folder, every=every) as R:
                found = ask(R)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 0 or question == "exact index"
    assert plain(found) == plain(expected)  # all digits that there are
    if isinstance(found, tuple):
        assert all(map(torch.equal, found, expected))
    assert R.num_matvecs == whole.num_matvecs
    # Now everything is there: no more than the first product of each width and kind is made.
    again = operator(4)
    with RecordedOperator(again, folder) as R:
        assert plain(ask(R)) == plain(expected)


def density(folder: Path, A: SymmetricOperator | None = None, seed: int = 5, **options: Any) -> Any:
    with RecordedOperator(A or DenseOperator(matrix()), folder, **options) as R:
        generator = torch.Generator().manual_seed(seed)
        return hvpspec.spectral_measure(R, 2, 10, generator=generator).nodes


def test_another_operator_or_other_options_are_refused(tmp_path: Path) -> None:
    first = density(tmp_path)
    with pytest.raises(InputError, match="checkpoint of another run: matrix differs; choose"):
        density(tmp_path, DenseOperator(matrix(seed=1)))
    with pytest.raises(InputError, match=r"to a run with other options, .* its product 1 is"):
        density(tmp_path, seed=6)
    assert all(map(torch.equal, first, density(tmp_path)))


def test_an_operator_that_multiplies_otherwise_is_refused(tmp_path: Path) -> None:
    """Of a function nothing is known beforehand but its size."""
    density(tmp_path, hvpspec.FunctionOperator(60, lambda v: 2 * v))
    with pytest.raises(InputError, match=r"a product of size .* in the checkpoint differs by"):
        density(tmp_path, hvpspec.FunctionOperator(60, lambda v: 3 * v))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "renamed"])
def test_a_damaged_file_is_named_and_made_again(damage: str, tmp_path: Path) -> None:
    expected = density(tmp_path, every=0.0)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == 10
    victim = written[4]
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[:-7])
    elif damage == "changed":
        victim.write_bytes(content[:-7] + b"1234567")
    elif damage == "renamed":
        victim.rename(tmp_path / "notes.safetensors")
    else:
        victim.unlink()
    named = written[5] if damage in ("missing", "renamed") else victim
    with pytest.warns(UserWarning, match=f"{named.name} is damaged or out of order"):
        found = density(tmp_path, every=0.0)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, density(tmp_path), expected))  # whole again, and without a word


def kept(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the first file by a whole one with other content."""
    first, *_ = sorted(folder.glob("*.safetensors"))
    content = safetensors.torch.save(tensors)
    first.unlink()
    (folder / f"00000000-{len(tensors)}-{digest([content])}.safetensors").write_bytes(content)


@pytest.mark.parametrize("names", [["0"], ["00000000"], ["00000001 key"], ["00000000 a", "x"]])
def test_a_whole_file_with_other_names_is_damaged_too(names: list[str], tmp_path: Path) -> None:
    expected = density(tmp_path, every=0.0)
    kept(tmp_path, {name: torch.zeros(2, 60) for name in names})
    with pytest.warns(UserWarning, match="is damaged or out of order"):
        found = density(tmp_path)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (lambda t: t[:, :39], r"torch.float64 \(2, 39\)"),
        (lambda t: t.float(), r"torch.float32 \(2, 60\)"),
        (lambda t: t / 0, r"torch.float64 \(2, 60\) with NaN or infinity"),
    ],
)
def test_what_the_operator_cannot_have_made_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], holds: str, tmp_path: Path
) -> None:
    density(tmp_path, every=0.0)
    first, *_ = sorted(tmp_path.glob("*.safetensors"))
    tensors = safetensors.torch.load(first.read_bytes())
    kept(tmp_path, {name: change(t).contiguous() for name, t in tensors.items()})
    with pytest.raises(InputError, match=rf"the checkpoint holds {holds} where torch.float64"):
        density(tmp_path)


def test_other_numbers_of_threads_are_refused(tmp_path: Path) -> None:
    """Which have other bits."""
    A = DenseOperator(matrix())
    density(tmp_path, A)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(InputError, match="the checkpoint of another run: threads differs"):
            density(tmp_path, A)
    finally:
        torch.set_num_threads(threads)


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    density(tmp_path, every=0.0)
    name = min(path.name for path in tmp_path.glob("*.safetensors"))
    left, other = tmp_path / f".{name}.0a1b2c3d.tmp", tmp_path / ".mine.0a1b2c3d.tmp"
    left.write_bytes(b"half")
    other.write_bytes(b"mine")
    density(tmp_path)
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 10**5, '{"format": ' * 10**5, "1" * 10**5, "\ud800", "\0"],
    ids=lambda content: f"{content[:9]!r}",
)
def test_a_folder_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / ABOUT).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"checkpoint\.json cannot be read") as caught:
        density(tmp_path)
    assert re.fullmatch(r".{,300}; choose another folder, or remove it", str(caught.value))


@pytest.mark.parametrize("header", [b"[" * 10**5, b'{"a":' * 10**5, b"", b"null"])
def test_a_whole_file_of_something_else(header: bytes, tmp_path: Path) -> None:
    expected = density(tmp_path / "whole")
    density(tmp_path / "other")
    (path,) = (tmp_path / "other").glob("*.safetensors")
    content = len(header).to_bytes(8, "little") + header
    path.unlink()
    path.with_name(f"00000000-1-{digest([content])}.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged or out of order"):
        again = density(tmp_path / "other")
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("every", [-1.0, float("nan"), "60"])
def test_seconds_that_are_none(every: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every must be a number of seconds of at least 0, got"):
        density(tmp_path / "new", every=every)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        density(tmp_path / "file")


def test_a_full_disk_leaves_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = density(tmp_path / "whole")
    true_fsync, left = hvpspec_files.os.fsync, [4]

    def fsync(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        true_fsync(number)

    monkeypatch.setattr(hvpspec_files.os, "fsync", fsync)
    with pytest.raises(InputError, match="No space left on device"):
        density(tmp_path / "full", every=0.0)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert names[:1] == [".lock"]
    assert len(names) == 5  # and nothing half-written
    assert json.loads((tmp_path / "full" / ABOUT).read_text())["size"] == "60"
    assert all(map(torch.equal, density(tmp_path / "full"), expected))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"not ours")
    (tmp_path / "folder.safetensors").mkdir()
    expected = density(tmp_path)
    assert all(map(torch.equal, density(tmp_path), expected))
    assert weights.read_bytes() == b"not ours"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    A = DenseOperator(matrix())
    with (
        RecordedOperator(A, tmp_path),
        pytest.raises(InputError, match="is in use by another run; wait"),
    ):
        RecordedOperator(A, tmp_path)
    RecordedOperator(A, tmp_path)


def test_products_that_were_zero(tmp_path: Path) -> None:
    v = torch.ones(4, dtype=torch.float64)
    with RecordedOperator(hvpspec.FunctionOperator(4, lambda v: 0 * v), tmp_path) as R:
        assert not R.matvec(v).any()
    other = hvpspec.FunctionOperator(4, lambda v: v)
    with (
        RecordedOperator(other, tmp_path) as R,
        pytest.raises(InputError, match=r"differs by 2\.0e"),
    ):
        R.matvec(v)


def test_half_precision_networks(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2).bfloat16()
    data = torch.rand(5, 3), torch.randint(2, (5,))
    H = hvpspec.HessianOperator(model, torch.nn.CrossEntropyLoss(), data, dtype=torch.float32)
    with RecordedOperator(H, tmp_path) as R:
        assert hvpspec.eigsh(R, 1).converged.all()


def small_hessian() -> hvpspec.HessianOperator:
    """Of 940 parameters, 610 of them of the first layer, whose block is made without products."""
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(60, 10), torch.nn.Tanh(), torch.nn.Linear(10, 30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    data = torch.randn(30, 60, generator=generator), torch.arange(30)
    return hvpspec.HessianOperator(
        model, torch.nn.CrossEntropyLoss(), data, dtype=torch.float64, chunk_size=10
    )


@pytest.mark.parametrize("preconditioned", [False, True])
def test_an_assembly_goes_on_after_the_parts_that_are_done(
    preconditioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted in its first reports of progress, then in the next ones, and so on."""

    def operator() -> SymmetricOperator:
        H = small_hessian()
        D = torch.linspace(1, 2, H.shape[0])
        return hvpspec.PreconditionedOperator(H, D) if preconditioned else H

    with RecordedOperator(operator(), tmp_path / "whole") as whole:
        expected = whole.to_dense()
    assert torch.equal(expected, operator().to_dense())
    num_blocks, left = 0, 0
    add_block_ = curvature_operator.add_own_block_

    def add_counted_block_(*arguments: Any) -> Any:
        nonlocal num_blocks
        num_blocks += 1
        return add_block_(*arguments)

    def progress(*_: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(curvature_operator, "add_own_block_", add_counted_block_)
    for allowed in range(20):
        left = allowed
        try:
            with RecordedOperator(operator(), tmp_path / "parts", every=0.0) as R:
                matrix = R.to_dense(progress=progress)
            break
        except KeyboardInterrupt:
            pass
    # Three reports come from within the block: it is filled a fourth time, and then read.
    assert (allowed, num_blocks) == (4, 4)
    assert torch.equal(matrix, expected)
    assert R.num_matvecs == whole.num_matvecs


@pytest.mark.parametrize("blocks", [1, 3])
def test_half_a_matrix_of_another_operator_is_left_alone(blocks: int, tmp_path: Path) -> None:
    """Of a function nothing is known but what it returns."""

    def function(seed: int) -> hvpspec.FunctionOperator:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(600, 600, generator=generator, dtype=torch.float64)
        A += A.T.clone()
        return hvpspec.FunctionOperator(600, lambda v: A @ v)

    def stop(done: int, _total: int) -> None:
        if done >= min(256 * blocks, 600):
            raise KeyboardInterrupt

    with RecordedOperator(function(0), tmp_path / "whole") as whole:
        expected = whole.to_dense()
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt), RecordedOperator(function(0), folder) as R:
        R.to_dense(progress=stop)
    before = sorted(path.name for path in folder.iterdir())
    other = function(1)
    with (
        pytest.raises(InputError, match=r"a product of size .* in the checkpoint differs by"),
        RecordedOperator(other, folder) as R,
    ):
        R.to_dense()
    assert other.num_matvecs == 1
    assert sorted(path.name for path in folder.iterdir()) == before
    with RecordedOperator(function(0), folder) as R:
        assert torch.equal(R.to_dense(), expected)
        assert R.num_matvecs == whole.num_matvecs == 600


def test_an_operator_that_is_linear_only_nearly(tmp_path: Path) -> None:
    """Differences of gradients: a product is not that with the matrix, but the same each time."""
    C, h = matrix(), 1e-3

    def difference(v: Tensor) -> Tensor:
        return C @ (torch.sinh(h * C @ v) - torch.sinh(-h * C @ v)) / (2 * h)

    A = hvpspec.FunctionOperator(60, difference)
    for _ in range(2):
        with RecordedOperator(A, tmp_path) as R:
            found = R.to_dense()
    z = torch.randn(60, generator=seeded(), dtype=torch.float64)
    product = A @ z
    assert torch.linalg.norm(found @ z - product) > A.unit_roundoff**0.5 * product.norm()


def test_data_with_gaps(tmp_path: Path) -> None:
    """As the share of a process has: a last chunk of one entry counts as contiguous."""
    model = torch.nn.Linear(2, 3)
    X, y = torch.randn(9, 2)[::2], torch.arange(9)[::2] % 3
    H = hvpspec.HessianOperator(model, torch.nn.CrossEntropyLoss(), (X, y), chunk_size=4)
    same = (X.contiguous(), y.contiguous())
    plain = hvpspec.HessianOperator(model, torch.nn.CrossEntropyLoss(), same, chunk_size=4)
    assert H.fingerprint() == plain.fingerprint()
    with RecordedOperator(H, tmp_path) as R:
        assert torch.equal(R.to_dense(), plain.to_dense())
