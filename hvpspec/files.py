"""Files that are written whole or not at all, and asked about before the work for them starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from hvpspec.errors import InputError

#: Endings of the pictures that can be drawn.
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place and move it there once it is safely on disk.

    Args:
        path: Where to; a file there is replaced, and keeps its content if anything fails.
        content: What to write.

    Raises:
        InputError: The path is a folder, or its folder is missing, full or not writable.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; name a file in a folder you can write to"
        ) from error


def check_target(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that could not be written, before the work for it starts.

    Args:
        path: the file to be written; one that exists will be replaced.
        suffixes: endings allowed; none for any.

    Raises:
        InputError: the folder does not exist or cannot be written to, the path is not a plain file,
            or its ending is not allowed.
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
    """Refuse to write over what is read, or two files to one place, before any of it happens.

    Files are the same if their names lead to one place, through links and by any spelling.

    Args:
        read: the files that are read, each with what names it, such as ``--model``.
        written: those that are written, likewise.

    Raises:
        InputError: a file is read and written, or written twice.
    """
    written = list(written)
    for (reader, source), (writer, target) in ((r, w) for r in read for w in written):
        if _same(source, target):
            raise InputError(
                f"{target} ({writer}) is what {reader} reads and would be lost;"
                " write to another file"
            )
    for (one, first), (other, second) in combinations(written, 2):
        if _same(first, second):
            raise InputError(f"{one} and {other} both write to {second}; name two files")


def _same(one: Path, other: Path) -> bool:
    """Tell whether two names lead to one place, whether anything is there yet or not."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)  # hard links, and names that differ only in case
    except OSError:  # one of them is not there
        return False


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make a folder and those above it, where they are not there yet.

    Args:
        folder: the folder.
        option: with which another is chosen on the command line.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder}: {error.strerror}; choose another with {option}"
        ) from error
