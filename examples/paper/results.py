"""Results as lines of JSON: appended whole, safe against kills and against other writers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from hvpspec.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

#: One line: the settings of a run and what was measured, all plain data.
Record = dict[str, Any]
#: The settings of a run: a frozen dataclass of strings, numbers, booleans and None.
RunT = TypeVar("RunT", bound="DataclassInstance")


def append(path: Path, record: Record) -> None:
    """Add a line to a file, under a lock and safely on disk when this returns.

    A line that a killed writer left unfinished is removed first.

    Args:
        path: the file; made if it is not there.
        record: plain data without NaN and infinity.

    Raises:
        InputError: the file cannot be written.
        ValueError: a number is NaN or infinite.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    # In append mode every write goes to the end, wherever another process has moved it.
    with _locked(path, "a+b", fcntl.LOCK_EX) as stream:
        kept = _whole_lines(_content(stream))
        stream.truncate(len(kept))
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[Record]:
    """Read all whole lines of a file; none if there is no such file.

    Args:
        path: what :func:`append` wrote. An unfinished last line is left out.

    Raises:
        InputError: the file cannot be read, or a whole line of it is no JSON object.
    """
    if not path.exists():
        return []
    with _locked(path, "rb", fcntl.LOCK_SH) as stream:
        content = _whole_lines(_content(stream))
    return [_parse(path, number, line) for number, line in enumerate(content.splitlines(), start=1)]


def finished(path: Path, records: Iterable[Record], kind: type[RunT]) -> dict[RunT, Record]:
    """Tell which runs are done, from the lines of a file.

    Args:
        path: the file, for messages.
        records: its lines.
        kind: the dataclass of the settings. Lines have its fields; one with a default may be
            missing, where the line is older than the field.

    Returns:
        The line of each run; the first, if two processes measured the same.

    Raises:
        InputError: a line lacks a field.
    """
    done: dict[RunT, Record] = {}
    names = [field.name for field in fields(kind)]
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    for number, record in enumerate(records, start=1):
        missing = [name for name in needed if name not in record]
        if missing:
            raise InputError(
                f"line {number} of {path} is from another experiment: it has no {missing[0]!r};"
                " move the file away or choose another folder with --out"
            )
        done.setdefault(kind(**{name: record[name] for name in names if name in record}), record)
    return done


@contextmanager
def _locked(path: Path, mode: str, lock: int) -> Iterator[BinaryIO]:
    """Open a file and hold a lock on it; closing it lets go."""
    try:
        with path.open(mode) as stream:
            fcntl.flock(stream, lock)
            yield stream  # type: ignore[misc]  # both modes are binary
    except OSError as error:
        raise InputError(
            f"cannot use {path}: {error.strerror}; choose a folder you can write to with --out"
        ) from error


def _content(stream: BinaryIO) -> bytes:
    """All bytes of a file."""
    stream.seek(0)
    return stream.read()


def _whole_lines(content: bytes) -> bytes:
    """Leave out what a killed writer left: a last line without its end."""
    return content[: content.rfind(b"\n") + 1]


def _parse(path: Path, number: int, line: bytes) -> Record:
    """Read one line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"line {number} of {path} is no JSON ({error}); remove it") from error
    if not isinstance(record, dict):
        raise InputError(f"line {number} of {path} is no JSON object; remove it")
    return record
