"""Files of results are read back, and those of an earlier hvpspec mean what they meant."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hvpspec import InputError
from hvpspec.files import read_json

# Written by the commands before files told where they come from.
OLD = Path(__file__).parent / "version-1"
NOT_OF_LAYERS = {"format", "version", "hvpspec", "subject", "provenance", "notes", "seconds"}
SCHEMA = Path(__file__).parents[2] / "docs" / "json.md"


def documented(kind: str) -> set[str]:
    """The fields that the documentation lists for a format."""
    section = SCHEMA.read_text().split(f"\n## {kind}\n")[1].split("\n## ")[0]
    names = [
        re.findall(r"`(\w+)`", row.split("|")[1]) for row in section.splitlines() if "|" in row
    ]
    return {name for row in names for name in row}


@pytest.mark.parametrize(
    "name", ["index", "density", "measure", "eigs", "trace", "checkpoint-info"]
)
def test_old_files(name: str) -> None:
    content = read_json(OLD / f"{name}.json")
    assert content["format"] == f"hvpspec-{name}"
    assert set(content) == documented(content["format"])
    assert content.get("provenance") is None
    for field, value in json.loads((OLD / f"{name}.json").read_text()).items():
        if field != "layers":
            assert content[field] == value
    for layer in content.get("layers", {}).values():
        # As docs say: the fields from dim on, of the layer's own block.
        assert layer.keys() | {"layers", "gauss_newton"} >= content.keys() - NOT_OF_LAYERS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON, or is damaged: Expecting value"),
        (b'{"format": "hvpspec-index", "ver', "is not JSON, or is damaged"),
        (b"\xff\xfe\x00", "is not JSON, or is damaged"),
        (b"[1]", "not a result of hvpspec: its format is None, not one of hvpspec-index"),
        (b'{"format": "other"}', "not a result of hvpspec: its format is 'other'"),
        (b'{"format": ["hvpspec-index"]}', r"its format is \['hvpspec-index'\]"),
        (b'{"format": "hvpspec-index", "version": 2}', "of version 2 of hvpspec-index, and this"),
        (b'{"format": "hvpspec-index"}', "of version None"),
        (b'{"format": "hvpspec-index", "version": true}', "of version True"),
        (b'{"format": "hvpspec-index", "version": 1, "tau": NaN}', "damaged: it holds NaN"),
        (b'{"format": "hvpspec-measure", "version": 1, "layers": 3}', "its layers are not objects"),
        (b"[" * 100_000, "damaged: maximum recursion depth"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path)
