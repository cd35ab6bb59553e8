"""Writing files atomically, checking them before the work starts, and reading results back."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any

from hvpspec.errors import InputError, first_line
from hvpspec.results import FORMER_NAMES, VERSION

#: Endings of the pictures that can be drawn.
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")

#: A field that was added to the measure of a matrix and of each block, with its earlier value.
_ADDED_TO_MEASURES = {"reorthogonalized": True}
#: All formats, each with the fields that were added to it and the values that earlier files imply.
_ADDED: Mapping[str, Mapping[str, bool | None]] = {
    "hvpspec-index": {"provenance": None},
    "hvpspec-density": {"provenance": None, "notes": None, "seconds": None},
    "hvpspec-measure": {
        **dict.fromkeys(("provenance", "notes", "gauss_newton", "seconds")),
        **_ADDED_TO_MEASURES,
    },
    "hvpspec-eigs": {"provenance": None, "notes": None},
    "hvpspec-trace": {"provenance": None, "notes": None},
    "hvpspec-checkpoint-info": {"weights": None},
}


@contextmanager
def file_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn an error of the operating system into an InputError: what it prevents, and a remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot {what}: {error.strerror}; {remedy}") from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary file in the same folder and rename it once it is safely on disk.

    An existing file is replaced, and keeps its content if anything fails.

    Raises:
        InputError: the path is a folder, or its folder is missing, full or not writable.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with file_errors(f"write {path}", "name a file in a folder you can write to"):
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                # Or a crash of the machine could leave an empty file under the new name.
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def check_target(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Check that a file can be written, before the work for it starts.

    Raises:
        InputError: the folder does not exist or is not writable, the path is not a regular file, or
            its ending is not one of ``suffixes`` (any ending if these are empty).
    """
    if suffixes and path.suffix.lower() not in suffixes:
        known = ", ".join(suffixes)
        raise InputError(f"cannot write {path}: its ending must be one of {known}")
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is not a plain file; name a file")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: the folder {folder} does not exist; create it")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write to {folder}")


def keep_apart(read: Iterable[tuple[str, Path]], written: Iterable[tuple[str, Path]]) -> None:
    """Check that no file is both read and written, or written twice.

    Args:
        read: files that will be read, each after the option that names it, such as ``--model``.
        written: files that will be written, likewise.

    Raises:
        InputError: two paths lead to the same file, perhaps through links.
    """
    written = list(written)
    for (reader, source), (writer, target) in ((r, w) for r in read for w in written):
        if _same(source, target):
            raise InputError(
                f"{target} ({writer}) is read by {reader} and would be overwritten;"
                " write to another file"
            )
    for (one, first), (other, second) in combinations(written, 2):
        if _same(first, second):
            raise InputError(f"{one} and {other} both write to {second}; choose two files")


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file, even if it does not exist yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)  # hard links, and names that differ only in case
    except OSError:  # one of them is not there
        return False


def make_folder(folder: Path, option: str = "--out") -> None:
    """Create a folder and its parents if they do not exist.

    Raises:
        InputError: it cannot be created; the message names ``option``, which sets another one.
    """
    with file_errors(f"make the folder {folder}", f"choose another with {option}"):
        folder.mkdir(parents=True, exist_ok=True)


def write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> None:
    """Write plain data as JSON, atomically.

    Args:
        path: the file; an existing one is replaced.
        content: finite numbers, strings, lists and mappings, such as ``result.to_dict()``.

    Raises:
        InputError: the file cannot be written.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), f"{text}\n".encode())


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a file that ``--json`` wrote.

    Args:
        path: the file, written by this version of hvpspec or an earlier one.

    Returns:
        The fields by name, see docs: JSON. Fields that were added later are filled in, and former
        names of methods are replaced.

    Raises:
        InputError: the file cannot be read, has another format, or is of a later version.
    """
    path = Path(path)
    with file_errors(f"read {path}", "check the path"):
        text = path.read_bytes()
    try:
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 both raise a ValueError
        raise InputError(f"{path} is not JSON, or is damaged: {first_line(error)}") from error
    kind = content.get("format") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _ADDED:
        known = ", ".join(_ADDED)
        raise InputError(
            f"{path} is not a result of hvpspec: its format is {kind!r}, not one of {known}"
        )
    version = content.get("version")
    if version != VERSION or version is True:
        raise InputError(
            f"{path} is of version {version!r} of {kind}, and this hvpspec reads {VERSION}; "
            "update hvpspec"
        )
    layers = content.get("layers")
    if layers is not None:
        if not isinstance(layers, dict) or not all(isinstance(x, dict) for x in layers.values()):
            raise InputError(f"{path} is damaged: its layers are not objects by name")
        layers = {name: {**_ADDED_TO_MEASURES, **layer} for name, layer in layers.items()}
        content = {**content, "layers": layers}
    method = content.get("method")
    if isinstance(method, str):
        content = {**content, "method": FORMER_NAMES.get(method, method)}
    return {**_ADDED[kind], **content}


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which no result contains."""
    raise ValueError(f"it holds {constant}")
