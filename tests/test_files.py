"""Files asked about before the work for them starts."""

from __future__ import annotations

import os

import pytest

from hvpspec.errors import InputError
from hvpspec.files import check_target, keep_apart, make_folder


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


def test_files_that_are_one(tmp_path):
    one, other = tmp_path / "a.pt", tmp_path / "b.pt"
    one.write_text("")
    other.write_text("")
    keep_apart([("--model", one)], [("--json", other), ("--out", tmp_path / "new")])
    (tmp_path / "link").symlink_to(one)
    os.link(one, tmp_path / "hard")
    for name in ("a.pt", "../" + tmp_path.name + "/a.pt", "link", "hard"):
        with pytest.raises(InputError, match=r"\(--json\) is read by --model and would be"):
            keep_apart([("--model", one)], [("--json", tmp_path / name)])
        with pytest.raises(InputError, match="--json and --out both write to"):
            keep_apart([], [("--json", one), ("--out", tmp_path / name)])


def test_names_of_files_that_are_not_there_yet(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    (tmp_path / "round").symlink_to(tmp_path / "round")  # leads nowhere
    keep_apart([("--model", tmp_path / "missing")], [("--json", tmp_path / "round")])
    with pytest.raises(InputError, match="both write to"):
        keep_apart([], [("--json", tmp_path / "new"), ("--out", tmp_path / "dangling")])
