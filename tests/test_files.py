"""Files asked about before the work for them starts."""

from __future__ import annotations

import os

import pytest

from hvpspec.errors import InputError
from hvpspec.files import check_target, make_folder


@pytest.mark.parametrize(
    ("name", "cause"),
    [("missing/x.json", "does not exist"), (".", "not a plain file"), ("x.txt", "its ending")],
)
def test_targets_that_cannot_be_written(tmp_path, name, cause):
    with pytest.raises(InputError, match=cause):
        check_target(tmp_path / name, () if name == "." else (".json",))


def test_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="no permission"):
        check_target(tmp_path / "x.json")


def test_folders_are_made_with_those_above(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        make_folder(tmp_path / "file" / "b")
