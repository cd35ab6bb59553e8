from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvpspec.errors import InputError
from hvpspec.zoo import Dataset, DataSource, load_data

INPUTS = np.arange(12, dtype=np.float64).reshape(6, 2)
TARGETS = np.arange(6, dtype=np.int32)


def _dataset(source: object, **options: Any) -> Dataset:
    data = load_data(str(source), **options)
    assert isinstance(data, Dataset)
    return data


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_data_module.py").write_text(
        "import numpy, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from hvpspec.zoo import Dataset\n"
        "x, y = torch.rand(6, 2), torch.arange(6)\n"
        "frozen = numpy.arange(6)[::-1]; frozen.flags.writeable = False\n"
        "def pair(): return x, y\n"
        "def arrays(): return [numpy.ones((6, 2)), frozen]\n"
        "def dataset(): return Dataset('mine', x, y)\n"
        "def loader(): return DataLoader(TensorDataset(x, y), batch_size=4)\n"
        "def batches(): return [(x[:4], y[:4]), (x[4:], y[4:])]\n"
        "def once(): yield x, y\n"
        "def mapped(): return TensorDataset(x, y)\n"
        "def nothing(): return None\n"
        "def unequal(): return x, y[:5]\n"
    )
    monkeypatch.chdir(tmp_path)
    return "my_data_module"


@pytest.mark.parametrize("source", ["mnist-sample", "fashion-mnist-sample"])
def test_samples_are_images_in_zero_to_one(source: str) -> None:
    data = _dataset(source)
    assert (data.name, data.inputs.shape) == (source, (2000, 1, 28, 28))
    assert (data.inputs.dtype, data.targets.dtype) == (torch.float32, torch.int64)
    assert (data.inputs.min().item(), data.inputs.max().item()) == (0.0, 1.0)
    assert _dataset(source, split="test").name == f"{source} (test)"


def test_subset_takes_the_first(tmp_path: Path) -> None:
    whole, some = _dataset("mnist-sample"), _dataset("mnist-sample", subset=7)
    assert len(some) == 7
    assert torch.equal(some.inputs, whole.inputs[:7])
    assert torch.equal(some.targets, whole.targets[:7])
    assert some.tensors == (some.inputs, some.targets)


@pytest.mark.parametrize("n", [0, -1, 2001, 1.5, True, "3"])
def test_subset_out_of_range(n: Any) -> None:
    with pytest.raises(InputError, match=f"subset is {n!r}; mnist-sample has 2000 examples"):
        load_data("mnist-sample", subset=n)


@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_files_keep_real_numbers_and_widen_whole_ones(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"own.{suffix}"
    content = {"inputs": INPUTS, "targets": TARGETS, "test_inputs": INPUTS[:2]}
    content["test_targets"] = TARGETS[:2] > 0
    if suffix == "npz":
        np.savez(file, **content)
    else:
        torch.save({key: torch.tensor(value) for key, value in content.items()}, file)
    data, test = _dataset(file), _dataset(file, split="test")
    assert torch.equal(data.inputs, torch.tensor(INPUTS))
    assert data.inputs.dtype == torch.float64
    assert torch.equal(data.targets, torch.arange(6))
    assert test.targets.tolist() == [0, 1]


def test_a_file_without_the_split_says_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", inputs=INPUTS, targets=TARGETS)
    with pytest.raises(InputError, match=r"no 'test_inputs' .*it holds: inputs, targets"):
        load_data(str(tmp_path / "own.npz"), split="test")
    torch.save([1, 2], tmp_path / "own.pt")
    with pytest.raises(InputError, match=r"no 'inputs' .*it holds: list"):
        load_data(str(tmp_path / "own.pt"))


@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_a_hostile_file_does_not_run(
    tmp_path: Path, trap: tuple[object, Path], suffix: str
) -> None:
    hostile, sprung = trap
    file = tmp_path / f"own.{suffix}"
    if suffix == "npz":
        np.savez(file, inputs=np.array([hostile], dtype=object), targets=TARGETS)
    else:
        torch.save({"inputs": hostile, "targets": TARGETS}, file)
    with pytest.raises(InputError, match="own"):
        load_data(str(file))
    assert not sprung.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04", b"\x80\x04N."])
def test_a_broken_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"own.npz cannot be read as plain NumPy arrays"):
        load_data(str(tmp_path / "own.npz"))


def test_a_single_array_named_npz(tmp_path: Path) -> None:
    with (tmp_path / "own.npz").open("wb") as stream:
        np.save(stream, INPUTS)
    with pytest.raises(InputError, match=r"own.npz cannot be read"):
        load_data(str(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (INPUTS, TARGETS[:4], "6 inputs but 4 targets"),
        (INPUTS[:0], TARGETS[:0], "no examples"),
        (np.float64(3), TARGETS, "one row per example"),
        (np.where(INPUTS > 9, np.nan, INPUTS), TARGETS, "2 of 12 numbers in inputs are NaN"),
        (INPUTS, np.where(TARGETS == 1, np.inf, 0), "1 of 6 numbers in targets are NaN or inf"),
        (INPUTS + 1j, TARGETS, "complex128"),
        (np.array(["a"] * 6), TARGETS, "arrays of numbers"),
    ],
)
def test_unusable_arrays(tmp_path: Path, inputs: Any, targets: Any, message: str) -> None:
    np.savez(tmp_path / "own.npz", inputs=inputs, targets=targets)
    with pytest.raises(InputError, match=rf"own.npz: .*{message}"):
        load_data(str(tmp_path / "own.npz"))


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"inputs": torch.eye(6).to_sparse(), "targets": torch.arange(6)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"torch.sparse_coo"):
        load_data(str(tmp_path / "a.pt"))


@pytest.mark.parametrize("name", ["pair", "arrays", "dataset"])
def test_own_code_that_returns_arrays(user_code: str, name: str) -> None:
    data = _dataset(f"{user_code}:{name}", subset=5)
    assert data.inputs.shape == (5, 2)
    assert data.targets.dtype == torch.int64


@pytest.mark.parametrize("name", ["loader", "batches"])
def test_own_batches_come_as_they_are(user_code: str, name: str) -> None:
    data = load_data(f"{user_code}:{name}")
    assert not isinstance(data, Dataset)
    for _ in range(2):
        assert [len(targets) for _, targets in data] == [4, 2]
    with pytest.raises(InputError, match=r"subset is 3, but .* gives batches"):
        load_data(f"{user_code}:{name}", subset=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("once", "returned a generator, which can be read only once"),
        ("mapped", "returned a TensorDataset; return"),
        ("nothing", "returned a NoneType; return"),
        ("unequal", "6 inputs but 5 targets"),
        ("missing", "has no 'missing'"),
    ],
)
def test_own_code_that_returns_something_else(user_code: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(f"{user_code}:{name}")


def test_own_code_has_one_split(user_code: str) -> None:
    with pytest.raises(InputError, match="has no test split"):
        load_data(f"{user_code}:pair", split="test")


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown data 'minst'; give one of mnist, fashion-mnist"):
        load_data("minst")
    with pytest.raises(InputError, match="split is 'validation'"):
        load_data("mnist-sample", split="validation")  # type: ignore[arg-type]
    for suffix in ("npz", "pt"):
        with pytest.raises(InputError, match=f"nowhere.{suffix} does not exist"):
            load_data(str(tmp_path / f"nowhere.{suffix}"))


@pytest.mark.parametrize(
    "arguments", [(3,), ("mnist", "dev"), ("mnist", "train", 0), ("mnist", "train", "5")]
)
def test_a_malformed_source_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match=r"source is|split is|subset is"):
        DataSource(*arguments)
