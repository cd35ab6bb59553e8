import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from hvpspec.errors import InputError
from hvpspec.zoo import Dataset, cache_dir, load_data
from hvpspec.zoo.datasets import raw_files
from tests.zoo.rebuild_samples import read_split


@pytest.fixture(autouse=True)
def _no_data_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.delenv("HVPSPEC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", refuse)


def _check(data: object, folder: Path, name: str) -> None:
    images, labels = read_split(folder, name, "test")
    assert isinstance(data, Dataset)
    assert data.inputs.shape == (600, 1, 28, 28)
    assert data.inputs.dtype == torch.float32
    assert torch.equal((data.inputs * 255).round().to(torch.uint8)[:, 0], torch.tensor(images))
    assert torch.equal(data.targets, torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_found_in_the_named_folder(idx_folder: Path, name: str) -> None:
    _check(load_data(name, split="test", data_dir=idx_folder), idx_folder, name)


def test_found_by_the_environment_variable(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVPSPEC_DATA", str(idx_folder))
    _check(load_data("mnist", split="test", data_dir=tmp_path), idx_folder, "mnist")


def test_downloaded_to_the_cache_and_found_there(
    idx_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetch(data: torchvision.datasets.MNIST) -> None:
        print("fetching")
        cache_dir().mkdir(parents=True)
        (idx_folder / "MNIST").rename(Path(data.root) / "MNIST")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    data = load_data("mnist", split="test")
    assert cache_dir() == tmp_path / "cache" / "hvpspec" / "data"
    _check(data, cache_dir(), "mnist")
    assert capsys.readouterr() == ("", "fetching\n")
    _check(load_data("mnist", split="test"), cache_dir(), "mnist")
    assert capsys.readouterr() == ("", "")


def test_not_found_says_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_data("fashion-mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for part in (
        f"fashion-mnist is not in {tmp_path}, {cache_dir()}",
        "download failed (URLError)",
        "DIR/FashionMNIST/raw and pass --data-dir DIR or set HVPSPEC_DATA=DIR",
        "fashion-mnist-sample",
    ):
        assert part in message


def test_a_named_folder_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--data-dir is .*not a folder"):
        load_data("mnist", data_dir=tmp_path / "typo")
    monkeypatch.setenv("HVPSPEC_DATA", str(tmp_path / "typo"))
    with pytest.raises(InputError, match=r"HVPSPEC_DATA is .*not a folder"):
        load_data("mnist")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x1f\x8b\x08\x00packed",
        b"\x00\x00\x08\x03\x00\x00",
        b"\x00\x00\x0d\x03" + b"\x00\x00\x00\x01" * 3 + b"\x00" * 4,
        b"\x00\x00\x08\x03\x00\x00\x00\x05" + b"\x00\x00\x00\x1c" * 2 + b"abc",
        b"\x00\x00\x08\x03" + b"\xff" * 12,
    ],
)
@pytest.mark.parametrize("which", [2, 3])
def test_a_broken_file_is_refused(idx_folder: Path, content: bytes, which: int) -> None:
    raw_files(idx_folder, "mnist")[which].write_bytes(content)
    with pytest.raises(InputError, match=r"the test split in .*MNIST.raw is broken"):
        load_data("mnist", split="test", data_dir=idx_folder)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((3, 28, 28), (4,), "3 inputs but 4 targets"),
        ((3, 28, 27), (3,), r"shape \(3, 28, 27\), not \(N, 28, 28\)"),
        ((3,), (3,), "is broken"),
    ],
)
def test_files_that_do_not_fit(
    idx_folder: Path,
    write_idx: Callable[[Path, NDArray[np.uint8]], None],
    images: tuple[int],
    labels: tuple[int],
    message: str,
) -> None:
    for file, shape in zip(raw_files(idx_folder, "mnist")[2:], (images, labels), strict=True):
        write_idx(file, np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=message):
        load_data("mnist", split="test", data_dir=idx_folder)
