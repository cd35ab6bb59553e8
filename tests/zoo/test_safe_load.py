import argparse
import datetime
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.serialization import get_safe_globals

from hvpspec.errors import InputError
from hvpspec.zoo.safe_load import BESIDE_WEIGHTS, Unread, load_torch_file

load = partial(load_torch_file, remedy="save it otherwise")


def test_plain_data_come_back(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3), "b": [1, "x", None]}, tmp_path / "a.pt")
    content = load(tmp_path / "a.pt")
    assert isinstance(content, dict)
    assert content["b"] == [1, "x", None]


@pytest.mark.parametrize("archive", [True, False])
def test_a_hostile_pickle_does_not_run(
    tmp_path: Path, trap: tuple[object, Path], archive: bool
) -> None:
    hostile, sprung = trap
    file = tmp_path / "evil.pt"
    if archive:
        torch.save({"inputs": hostile}, file)
    else:
        file.write_bytes(pickle.dumps(hostile))
    message = "could run code" if archive else "truncated, damaged"
    with pytest.raises(InputError, match=rf"evil.pt .*{message}"):
        load(file)
    assert not sprung.exists()
    torch.load(file, weights_only=False) if archive else pickle.loads(file.read_bytes())
    assert sprung.exists()  # the trap was a real one


def test_a_whole_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    cause = "model.pt holds torch.nn.modules.linear.Linear, which is not plain data"
    with pytest.raises(InputError, match=rf"{cause}.* could run code; save it otherwise"):
        load(tmp_path / "model.pt")


@pytest.mark.parametrize("archive", [True, False])
def test_what_is_refused_is_named(tmp_path: Path, archive: bool) -> None:
    content = {"a": torch.ones(2), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(InputError, match=r"a.pt holds argparse.Namespace, which is not plain data"):
        load(tmp_path / "a.pt", unread=BESIDE_WEIGHTS)


def test_what_stands_beside_weights_is_left_unread(tmp_path: Path) -> None:
    beside = {
        "number": np.float64(92.1),
        "flag": np.bool_(True),
        "history": np.arange(5.0),
        "objects": np.array([{"a": 1}], dtype=object),
        "folder": tmp_path,
        "time": datetime.datetime.now(datetime.timezone.utc),
        "version": torch.__version__,
    }
    torch.save({"a": torch.ones(2), **beside}, tmp_path / "a.pt")
    allowed = set(get_safe_globals())
    found = load(tmp_path / "a.pt", unread=BESIDE_WEIGHTS)
    assert isinstance(found, dict)
    assert torch.equal(found.pop("a"), torch.ones(2))
    assert found.keys() == beside.keys()
    assert all(isinstance(value, Unread) for value in found.values())
    assert set(get_safe_globals()) == allowed
    with pytest.raises(InputError, match="which is not plain data"):
        load(tmp_path / "a.pt")


def test_an_array_that_holds_a_trap_does_not_run(tmp_path: Path, trap: tuple[object, Path]) -> None:
    hostile, sprung = trap
    torch.save({"a": np.array([hostile], dtype=object)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"mkdir, which is not plain data"):
        load(tmp_path / "a.pt", unread=BESIDE_WEIGHTS)
    assert not sprung.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 700])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.arange(300)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"a.pt \({kept} bytes\) is truncated, damaged"):
        load(file)


@pytest.mark.parametrize("content", [b"hello, world\n" * 9, b"PK\x03\x04junk", bytes(64)])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match="truncated, damaged"):
        load(tmp_path / "a.pt")


def test_a_script_archive_is_refused_without_a_warning(tmp_path: Path) -> None:
    # As torch.jit.save makes them, which is on its way out.
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/version", b"3")
    with pytest.raises(InputError, match=r"a.pt is a TorchScript archive.* torch.jit.load"):
        load(tmp_path / "a.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.pt does not exist"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path)
