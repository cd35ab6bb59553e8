"""Products that are written down as they are made, so that a run that ended can go on.

All that costs here is products, and everything else follows from them. A run that is started again
therefore takes the same steps, with the products of before read instead of made, up to where it
ended, and goes on from there with the same bits.
"""

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
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.files import make_folder, write_atomically
from hvpspec.linalg.digests import digest, tensor_digest
from hvpspec.linalg.facts import PointFacts
from hvpspec.linalg.operator import Progress, SymmetricOperator, as_operator

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMAT = "hvpspec checkpoint 1"
_ABOUT = "checkpoint.json"
_LOCK = ".lock"
_NAME = re.compile(r"\d{8}-\d+-[0-9a-f]{16}\.safetensors")
_KEY = re.compile(r"(\d{8}) \S+")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]+\.tmp")

# More bytes than this are not held back until they are due.
_MOST_WAITING = 2**28


class Checkpoint:
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
                f"{self._folder} is of a run with other options, or of another version: its "
                f"product {self._num_read} is of other vectors; choose another folder, or remove it"
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
                    f"{path} is damaged or out of order; what it holds, and what follows, is "
                    "computed again",
                    UserWarning,
                    stacklevel=2,
                )
                for later in self._files():
                    if later >= path:
                        _put_aside(later)
                return
            for name in sorted(tensors):
                yield name.split()[1], tensors[name]
            count += len(tensors)


class RecordedOperator(SymmetricOperator):
    """An operator whose products are kept in a folder, from which they are read the next time.

    Made again in a later run, with the same operator and the same questions asked of it, it returns
    the products of before, as long as there are any. The first of each width is made again all the
    same, to see that the operator is the one of before. Use it as a context, so that all is written
    when it ends, in whatever way.

    Args:
        A: the operator, or a symmetric matrix of shape (n, n). For the same bits as without an
            interruption its products must be the same from run to run, which for a network's means
            to name one ``engine``.
        folder: where; one for each operator.
        every: seconds between writing, in which more is lost if the process is killed.

    Raises:
        InputError: the folder cannot be used, or belongs to another operator.

    Example:
        >>> import tempfile
        >>> from hvpspec import DenseOperator, eigsh
        >>> A = DenseOperator(torch.diag(torch.arange(1.0, 6.0)))
        >>> with tempfile.TemporaryDirectory() as folder, RecordedOperator(A, folder) as R:
        ...     eigsh(R, k=1).values.round(decimals=4)
        tensor([5.], dtype=torch.float64)
    """

    def __init__(
        self, A: SymmetricOperator | Tensor, folder: Path | str, *, every: float = 60.0
    ) -> None:
        A = as_operator(A)
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        self._A, self.ranks = A, A.ranks
        self._widths: set[int] = set()
        # Of several processes, which all have the same products, the first writes and reads.
        # Sums have other bits in other numbers of threads.
        fingerprint = {
            **A.fingerprint(),
            "processes": str(self.ranks.size),
            "threads": str(torch.get_num_threads()),
        }
        self._checkpoint = (
            Checkpoint(Path(folder), fingerprint, every=every) if self.ranks.rank == 0 else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._checkpoint is not None:
            try:
                self._checkpoint.flush()
            finally:
                self._checkpoint.close()

    @property
    def unit_roundoff(self) -> float:
        """That of the operator."""
        return self._A.unit_roundoff

    def fingerprint(self) -> dict[str, str]:
        """That of the operator."""
        return self._A.fingerprint()

    def facts(self) -> PointFacts:
        """What is known of the operator."""
        return self._A.facts()

    def in_float64(self) -> SymmetricOperator:
        """The same with the operator in float64, in the same files."""
        beneath = self._A.in_float64()
        if beneath is self._A:
            return self
        copy = object.__new__(type(self))
        SymmetricOperator.__init__(copy, self.shape[0], dtype=beneath.dtype, device=beneath.device)
        copy._A, copy.ranks, copy._widths = beneath, beneath.ranks, set()
        copy._checkpoint = self._checkpoint
        return copy

    def to_dense(self, *, progress: Progress | None = None) -> Tensor:
        """Assemble the matrix, or read it."""
        n = self.shape[0]
        stored = self._take("matrix", (n + 1, n))
        if stored is None:
            before = self._A.num_matvecs
            matrix = self._A.to_dense(progress=progress)
            spent = self._A.num_matvecs - before
            # A last row that says what it took.
            self._add("matrix", torch.cat([matrix, torch.full((1, n), spent).to(matrix)]))
        else:
            matrix, spent = stored[:n].clone(), int(stored[n, 0])
        self.num_matvecs += spent
        return matrix

    def _matmat(self, V: Tensor) -> Tensor:
        width = V.shape[1]
        key = f"{width}x{tensor_digest([V.T])}"
        stored = self._take(key, (width, self.shape[0]))
        if stored is not None and width in self._widths:
            return stored.T
        self._widths.add(width)
        # Laid out as when it is read, in all strides: what is done with it takes other sums else.
        product = self._A.matmat(V).T.clone(memory_format=torch.contiguous_format)
        if stored is not None:
            product = self._same(stored, product)
        else:
            self._add(key, product)
        return product.T

    def _take(self, key: str, shape: tuple[int, int]) -> Tensor | None:
        """What was stored, in all processes."""
        stored = None
        with self.ranks.together():
            if self._checkpoint is not None:
                stored = self._checkpoint.take(key)
                if stored is not None:
                    self._require_possible(stored, shape)
        if not self.ranks.sum(float(stored is not None)):
            return None
        if stored is None:
            stored = torch.zeros(shape, dtype=self.dtype)
        return self.ranks.sum_(stored.to(self.device))

    def _require_possible(self, stored: Tensor, shape: tuple[int, int]) -> None:
        """Raise InputError unless this operator could have made it."""
        found, expected = f"{stored.dtype} {tuple(stored.shape)}", f"{self.dtype} {shape}"
        finite = bool(torch.isfinite(stored).all())
        if found != expected or not finite:
            raise InputError(
                f"the checkpoint holds {found}{'' if finite else ' with NaN or infinity'} where "
                f"{expected} belongs; choose another folder, or remove it"
            )

    def _add(self, key: str, tensor: Tensor) -> None:
        """Store something, in the first process."""
        if self._checkpoint is not None:
            self._checkpoint.add(key, tensor)

    def _same(self, before: Tensor, now: Tensor) -> Tensor:
        """The product of before, if the operator still multiplies like that up to round-off."""
        difference = float(torch.linalg.vector_norm((before - now).double()))
        size = float(torch.linalg.vector_norm(before.double()))
        if not difference <= self.unit_roundoff**0.5 * size:
            raise InputError(
                f"a product of size {size:.1e} in the checkpoint differs by {difference:.1e} from "
                "one made now: it is of another network or other data; choose another folder, or "
                "remove it"
            )
        return before


def _locked(folder: Path) -> int:
    """A file that is open and locked as long as a folder is in use."""
    try:
        number = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another with --checkpoint"
        ) from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        raise InputError(
            f"{folder} is in use by another run; wait for its end, or choose another folder"
        ) from error
    return number


def _put_aside(path: Path) -> None:
    """Rename a file, so that it is not read again."""
    try:
        path.rename(path.with_name(f"{path.name}.damaged"))
    except OSError as error:
        raise InputError(
            f"cannot rename {path}: {error.strerror}; choose another folder, or remove it"
        ) from error


def _whole(path: Path, expected: int) -> dict[str, Tensor] | None:
    """The tensors of a file, None if it is damaged or does not begin with the number expected."""
    try:
        first, number, expected_digest = path.stem.split("-")
        content = path.read_bytes()
        if int(first) != expected or digest([content]) != expected_digest:
            return None
        tensors = load(content)
    except (ValueError, SafetensorError):
        return None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; choose another folder, or remove it"
        ) from error
    keys = [_KEY.fullmatch(name) for name in sorted(tensors)]
    numbers = [int(key[1]) for key in keys if key is not None]
    sound = numbers == list(range(expected, expected + int(number)))
    return tensors if sound and len(keys) == len(numbers) else None


def _require_same(path: Path, about: Mapping[str, str]) -> None:
    """Raise InputError unless a checkpoint is of the same operator."""
    try:
        before = json.loads(path.read_text())
        if not isinstance(before, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); choose another folder, or remove it"
        ) from error
    differing = [name for name in {**about, **before} if about.get(name) != before.get(name)]
    if differing:
        raise InputError(
            f"{path.parent} is the checkpoint of another run: {', '.join(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}; choose another folder, or remove it"
        )
