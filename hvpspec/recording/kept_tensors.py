"""A log of tensors in the files of a folder, in the order in which they were computed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hvpspec.errors import InputError, first_line
from hvpspec.files import file_errors, make_folder, write_atomically
from hvpspec.linalg.digests import digest

_FORMAT = "hvpspec checkpoint 1"
_ABOUT = "checkpoint.json"
_LOCK = ".lock"
_NAME = re.compile(r"\d{8}-\d+-[0-9a-f]{16}\.safetensors")
_KEY = re.compile(r"(\d{8}) \S+")
#: What to do about a folder that cannot be used.
_REMEDY = "choose another folder, or remove it"
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]+\.tmp")

# With so many bytes in memory a file is written even if it is not due yet.
_MOST_WAITING = 2**28


class KeptTensors:
    """A log of tensors, in the order in which they were computed.

    Each file contains the tensors of some seconds, and its name a digest of its content. Files are
    written atomically.

    Args:
        folder: the folder, which is created if it does not exist.
        fingerprint: everything that the tensors depend on; the folder's must be the same.
        every: seconds between two files.

    Raises:
        InputError: the folder cannot be used or belongs to something else, or ``every`` is not a
            non-negative number.
    """

    def __init__(
        self, folder: Path, fingerprint: Mapping[str, str], *, every: float = 60.0
    ) -> None:
        if not (isinstance(every, int | float) and every >= 0):
            raise InputError(f"every must be a number of seconds of at least 0, got {every!r}")
        self._folder, self._every = folder, every
        self._waiting: dict[str, Tensor] = {}
        self._last = time.monotonic()
        make_folder(folder, "--checkpoint")
        self.close = weakref.finalize(self, os.close, _locked(folder))
        for path in folder.iterdir():
            if _UNFINISHED.fullmatch(path.name):  # of a run that was killed while it wrote
                path.unlink(missing_ok=True)
        about = {"format": _FORMAT, **fingerprint}
        path = folder / _ABOUT
        if path.exists():
            _require_same(path, about)
        else:
            write_atomically(path, json.dumps(about, indent=2).encode())
        self._stored = self._read()
        self._num_read = 0

    def take(self, key: str) -> Tensor | None:
        """Return the next tensor of an earlier run, or None after the last.

        Args:
            key: identifies the input from which the tensor is computed.

        Raises:
            InputError: it was stored with another key.
        """
        found = next(self._stored, None)
        if found is None:
            return None
        before, tensor = found
        self._num_read += 1
        if before != key:
            raise InputError(
                f"{self._folder} belongs to a run with other options, or of another version: its "
                f"product {self._num_read} is of other vectors; {_REMEDY}"
            )
        return tensor

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor, and write a file if that is due."""
        # A copy, since the caller may overwrite the tensor.
        self._waiting[f"{self._num_read:08d} {key}"] = tensor.detach().cpu().clone()
        self._num_read += 1
        waiting = sum(t.nbytes for t in self._waiting.values())
        if time.monotonic() - self._last >= self._every or waiting >= _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write the tensors that are not in a file yet.

        Raises:
            InputError: the file cannot be written; earlier files stay.
        """
        if self._waiting:
            content = save(self._waiting)
            # Names sort by the number of the first tensor; the digest reveals any damage.
            first = min(self._waiting).split()[0]
            name = f"{first}-{len(self._waiting)}-{digest([content])}.safetensors"
            write_atomically(self._folder / name, content)
            self._waiting = {}
        self._last = time.monotonic()

    def _files(self) -> list[Path]:
        """The files of the log, in order; other files in the folder are ignored."""
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with their keys, up to the first damaged file."""
        count = 0
        for path in self._files():
            tensors = _whole(path, count)
            if tensors is None:
                warnings.warn(
                    f"{path} is damaged or out of order; its products and all later ones are "
                    "computed again",
                    UserWarning,
                    stacklevel=2,
                )
                with file_errors(f"rename files in {self._folder}", _REMEDY):
                    for later in self._files():
                        if later >= path:
                            later.rename(later.with_name(f"{later.name}.damaged"))
                return
            for name in sorted(tensors):
                yield name.split()[1], tensors[name]
            count += len(tensors)


def _locked(folder: Path) -> int:
    """Open and lock a file, so that no other run uses the folder."""
    with file_errors(f"write to {folder}", "choose another with --checkpoint"):
        number = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        # The system releases the lock when the process ends, in whatever way.
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        raise InputError(
            f"{folder} is in use by another run; wait for its end, or choose another folder"
        ) from error
    return number


def _whole(path: Path, expected: int) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is damaged or its first number is not the expected one."""
    first, number, expected_digest = path.stem.split("-")
    with file_errors(f"read {path}", _REMEDY):
        content = path.read_bytes()
    if int(first) != expected or digest([content]) != expected_digest:
        return None
    try:
        tensors = load(content)
    except (ValueError, SafetensorError):
        return None
    keys = [_KEY.fullmatch(name) for name in sorted(tensors)]
    numbers = [key and int(key[1]) for key in keys]
    return tensors if numbers == list(range(expected, expected + int(number))) else None


def _require_same(path: Path, about: Mapping[str, str]) -> None:
    """Raise InputError unless the folder has the same fingerprint."""
    try:
        before = json.loads(path.read_text())
        if not isinstance(before, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:  # recursion in deeply nested JSON
        raise InputError(f"{path} cannot be read ({first_line(error)}); {_REMEDY}") from error
    differing = [name for name in {**about, **before} if about.get(name) != before.get(name)]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise InputError(
            f"{path.parent} is the checkpoint of another run: {', '.join(differing)} {verb};"
            f" {_REMEDY}"
        )
