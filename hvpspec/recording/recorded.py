"""Products that are written down as they are made, so that a run that ended can go on.

All that costs here is products, and everything else follows from them. A run that is started again
therefore takes the same steps, with the products of before read instead of made, up to where it
ended, and goes on from there with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.operator import Piece, SymmetricOperator, WrappedOperator
from hvpspec.progress import Progress
from hvpspec.recording.kept_tensors import KeptTensors

if TYPE_CHECKING:
    from typing_extensions import Self


class RecordedOperator(WrappedOperator):
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
        super().__init__(A)
        self._widths: set[int] = set()
        # Of several processes, which all have the same products, the first writes and reads.
        # Sums have other bits in other numbers of threads.
        fingerprint = {
            **self._A.fingerprint(),
            "processes": str(self.ranks.size),
            "threads": str(torch.get_num_threads()),
        }
        self._checkpoint = (
            KeptTensors(Path(folder), fingerprint, every=every) if self.ranks.rank == 0 else None
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

    def _around(self, A: SymmetricOperator) -> RecordedOperator:
        """The same of another operator, in the same files."""
        other = copy(self)
        WrappedOperator.__init__(other, A)
        other._widths = set()
        return other

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        # A product that is kept and made again, by which it is seen that pieces which lie here, and
        # those that will follow them, are of the same operator. It is none of the assembly's.
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(len(A), 1, generator=generator, dtype=torch.float64)
        self._matmat(z.to(self.device, self.dtype))
        for piece in super()._pieces(A, progress):
            yield replace(piece, fill=partial(self._fill, piece))

    def _fill(self, piece: Piece) -> None:
        """Read a piece of a matrix, or compute it and keep it."""
        keys = [f"{piece.name}/{number}" for number in range(len(piece.entries))]
        stored = [
            # On the device meta an index takes no memory.
            self._take(key, tensor.to("meta")[index].shape, tensor.dtype)
            for key, (tensor, index) in zip(keys, piece.entries, strict=True)
        ]
        if any(values is None for values in stored):
            piece.fill()
        for key, (tensor, index), values in zip(keys, piece.entries, stored, strict=True):
            if values is None:
                self._add(key, tensor[index])
            else:
                tensor[index] = values

    def _matmat(self, V: Tensor) -> Tensor:
        width = V.shape[1]
        key = f"{width}x{tensor_digest([V.T])}"
        stored = self._take(key, (width, self.shape[0]), self.dtype)
        if stored is not None and width in self._widths:
            return stored.T
        self._widths.add(width)
        # Laid out as when it is read, in all strides: what is done with it takes other sums else.
        product = self._A.matmat(V).T.clone(memory_format=torch.contiguous_format)
        if stored is None:
            self._add(key, product)
            return product.T
        self._require_same(stored, product)
        return stored.T

    def _take(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """What was stored, in all processes."""
        stored = None
        with self.ranks.together():
            if self._checkpoint is not None:
                stored = self._checkpoint.take(key)
                if stored is not None:
                    self._require_possible(stored, shape, dtype)
        if not self.ranks.sum(float(stored is not None)):
            return None
        if stored is None:
            stored = torch.empty(shape, dtype=dtype)
        return self.ranks.from_first_(stored.to(self.device))

    def _require_possible(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise InputError unless this operator could have made it."""
        found, expected = f"{stored.dtype} {tuple(stored.shape)}", f"{dtype} {tuple(shape)}"
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

    def _require_same(self, before: Tensor, now: Tensor) -> None:
        """Raise InputError unless the operator still multiplies like before, up to round-off."""
        difference = float(torch.linalg.vector_norm((before - now).double()))
        size = float(torch.linalg.vector_norm(before.double()))
        if not difference <= self.unit_roundoff**0.5 * size:
            raise InputError(
                f"a product of size {size:.1e} in the checkpoint differs by {difference:.1e} from "
                "the one computed now, so the network or the data have changed; choose another "
                "folder, or remove it"
            )
