"""Tensors in files of a folder, in the order in which they were computed."""

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

# More bytes than this are not held back until they are due.
_MOST_WAITING = 2**28


class KeptTensors:
    """Tensors in the order in which they were computed, in files of a folder.

    Each file holds those of some time, and in its name a digest of its content. It is written whole
    or not at all.

    Args:
        folder: where; it is made if it does not exist.
        fingerprint: what the tensors depend on, in words; those of a folder must be the same.
        every: seconds between files.

    Raises:
        InputError: the folder cannot be used, or belongs to something else; or ``every`` is no
            number of seconds.
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
        """The next tensor that was stored before; None where there is no more.

        Args:
            key: what it was computed from.

        Raises:
            InputError: it was computed from something else.
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
        """Store a tensor behind the others, in a file when that is due."""
        # A copy, since whoever asked for it may go on in its place.
        self._waiting[f"{self._num_read:08d} {key}"] = tensor.detach().cpu().clone()
        self._num_read += 1
        waiting = sum(t.nbytes for t in self._waiting.values())
        if time.monotonic() - self._last >= self._every or waiting >= _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write what is not in a file yet.

        Raises:
            InputError: it cannot be written; what was written before stays.
        """
        if self._waiting:
            content = save(self._waiting)
            first = min(self._waiting).split()[0]
            name = f"{first}-{len(self._waiting)}-{digest([content])}.safetensors"
            write_atomically(self._folder / name, content)
            self._waiting = {}
        self._last = time.monotonic()

    def _files(self) -> list[Path]:
        """The files with tensors, in order; others that lie there are left alone."""
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with their keys, as far as files are whole."""
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
    """A file that is open and locked as long as a folder is in use."""
    with file_errors(f"write to {folder}", "choose another with --checkpoint"):
        number = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        raise InputError(
            f"{folder} is in use by another run; wait for its end, or choose another folder"
        ) from error
    return number


def _whole(path: Path, expected: int) -> dict[str, Tensor] | None:
    """The tensors of a file, None if it is damaged or does not begin with the number expected."""
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
    """Raise InputError unless a checkpoint is of the same operator."""
    try:
        before = json.loads(path.read_text())
        if not isinstance(before, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:  # the last for what is nested deeply
        raise InputError(f"{path} cannot be read ({first_line(error)}); {_REMEDY}") from error
    differing = [name for name in {**about, **before} if about.get(name) != before.get(name)]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise InputError(
            f"{path.parent} is the checkpoint of another run: {', '.join(differing)} {verb};"
            f" {_REMEDY}"
        )
