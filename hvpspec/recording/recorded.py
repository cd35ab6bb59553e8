"""An operator that saves its products, so that an interrupted run can be resumed.

Products take almost all of the time, and an algorithm is determined by its products. So a run that
is started again repeats the same steps with the saved products up to the point of interruption, and
continues from there with the same bits.
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
    """An operator that saves its products in a folder and reads them in the next run.

    If a later run uses the same operator in the same way, it gets the saved products as long as
    there are any. The first product of each width is computed again, to check that the operator is
    the same. Use the operator as a context manager, so that all products are written at the end,
    also after an error.

    Args:
        A: the operator, or a symmetric matrix of shape (n, n). A resumed run gives the same bits
            only if the products are reproducible; for the operators of networks, choose one
            ``engine``.
        folder: the folder, one for each operator.
        every: seconds between two files; a process that is killed loses the products since the
            last.

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
        # All processes have the same products, so only the first reads and writes. The number of
        # threads belongs to the fingerprint because it changes the bits of sums.
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
        """Record another operator in the same files."""
        other = copy(self)
        WrappedOperator.__init__(other, A)
        other._widths = set()
        return other

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        # An extra product, which is saved and computed again: it shows that pieces saved earlier
        # are of the same operator. The assembly itself does not need it.
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(len(A), 1, generator=generator, dtype=torch.float64)
        self._matmat(z.to(self.device, self.dtype))
        for piece in super()._pieces(A, progress):
            yield replace(piece, fill=partial(self._fill, piece))

    def _fill(self, piece: Piece) -> None:
        """Read a piece of a matrix, or compute and save it."""
        keys = [f"{piece.name}/{number}" for number in range(len(piece.entries))]
        stored = [
            # Indexing a tensor on the meta device gives the shape without using memory.
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
        # With the strides of a product that is read: later sums depend on the memory layout.
        product = self._A.matmat(V).T.clone(memory_format=torch.contiguous_format)
        if stored is None:
            self._add(key, product)
            return product.T
        self._require_same(stored, product)
        return stored.T

    def _take(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return the next saved tensor, in all processes; None if there is none."""
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
        """Raise InputError unless this operator can have computed the tensor."""
        found, expected = f"{stored.dtype} {tuple(stored.shape)}", f"{dtype} {tuple(shape)}"
        finite = bool(torch.isfinite(stored).all())
        if found != expected or not finite:
            raise InputError(
                f"the checkpoint holds {found}{'' if finite else ' with NaN or infinity'} where "
                f"{expected} belongs; choose another folder, or remove it"
            )

    def _add(self, key: str, tensor: Tensor) -> None:
        """Save a tensor, in the first process."""
        if self._checkpoint is not None:
            self._checkpoint.add(key, tensor)

    def _require_same(self, before: Tensor, now: Tensor) -> None:
        """Raise InputError unless the operator gives the saved product, up to round-off."""
        difference = float(torch.linalg.vector_norm((before - now).double()))
        size = float(torch.linalg.vector_norm(before.double()))
        # The same operator differs by a small multiple of the unit round-off u, if at all; other
        # weights or data differ by far more than its square root. The negation catches NaN.
        if not difference <= self.unit_roundoff**0.5 * size:
            raise InputError(
                f"a product of size {size:.1e} in the checkpoint differs by {difference:.1e} from "
                "the one computed now, so the network or the data have changed; choose another "
                "folder, or remove it"
            )
