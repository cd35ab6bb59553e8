import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from hvpspec.errors import InputError
from hvpspec.zoo.safe_load import load_torch_file


def test_plain_data_come_back(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3), "b": [1, "x", None]}, tmp_path / "a.pt")
    content = load_torch_file(tmp_path / "a.pt")
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
        load_torch_file(file)
    assert not sprung.exists()
    torch.load(file, weights_only=False) if archive else pickle.loads(file.read_bytes())
    assert sprung.exists()  # the trap was a real one


def test_a_whole_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"could run code; save the model's state_dict\(\)"):
        load_torch_file(tmp_path / "model.pt")


@pytest.mark.parametrize("kept", [0, 1, 100, 700])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.arange(300)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"a.pt \({kept} bytes\) is truncated, damaged"):
        load_torch_file(file)


@pytest.mark.parametrize("content", [b"hello, world\n" * 9, b"PK\x03\x04junk", bytes(64)])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match="truncated, damaged"):
        load_torch_file(tmp_path / "a.pt")


def test_a_script_archive_is_refused_without_a_warning(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/version", b"3")
    with pytest.raises(InputError, match=r"a.pt"):
        load_torch_file(tmp_path / "a.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.pt does not exist"):
        load_torch_file(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="is a folder"):
        load_torch_file(tmp_path)
