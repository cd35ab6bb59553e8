import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision

from hvpspec.errors import InputError
from hvpspec.zoo import Dataset, cache_dir, load_data
from hvpspec.zoo.idx import read_split


@pytest.fixture(autouse=True)
def _no_data_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.delenv("HVPSPEC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)


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
    def fetch(root: Path, download: bool) -> None:
        print("fetching")
        assert download
        (idx_folder / "MNIST").rename(root / "MNIST")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
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
