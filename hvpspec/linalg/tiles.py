"""A dense matrix and its transpose, a part at a time: what stays in the cache goes fast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Columns reflected at once.
_STRIPE = 256


def asymmetry(A: Tensor) -> float:
    """``||A - A^T||_F / ||A||_F``, a tile at a time; 0 for the zero matrix."""
    square = 0.0
    for rows, columns in _tiles(len(A)):
        defect = A[rows, columns] - A[columns, rows].mT
        above_too = 1 if rows == columns else 2
        square += above_too * float(torch.linalg.vector_norm(defect, dtype=torch.float64)) ** 2
    norm = float(torch.linalg.vector_norm(A, dtype=torch.float64))
    return square**0.5 / norm if norm else 0.0


def reflect_(A: Tensor, columns: list[int], rows: list[int]) -> None:
    """Set ``A[j, i] = A[i, j]`` for the given columns j and rows i, a stripe at a time."""
    for start in range(0, len(columns), _STRIPE):
        block = columns[start : start + _STRIPE]
        A[torch.tensor(block)[:, None], rows] = A[:, block][rows].T


def symmetrise_(A: Tensor) -> Tensor:
    """Replace ``A`` (n, n) by ``(A + A^T) / 2`` in place, a tile at a time, and return it."""
    for rows, columns in _tiles(len(A)):
        mean = (A[rows, columns] + A[columns, rows].mT) / 2
        A[rows, columns] = mean
        A[columns, rows] = mean.mT
    return A


def _tiles(n: int, width: int = 128) -> Iterator[tuple[slice, slice]]:
    """The tiles of a matrix on and below the diagonal; two of them stay in the cache."""
    for i in range(0, n, width):
        for j in range(0, i + 1, width):
            yield slice(i, min(i + width, n)), slice(j, min(j + width, n))
