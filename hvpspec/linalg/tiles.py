"""A dense matrix and its transpose, a part at a time: what stays in the cache goes fast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Columns reflected at once.
_STRIPE = 256


def largest_entry(A: Tensor) -> Tensor:
    """``max |a|`` of a tensor as float64 of shape (), without a copy of all of it."""
    largest: Tensor = torch.linalg.vector_norm(A, torch.inf)
    return largest.double()


def asymmetry(A: Tensor) -> float:
    """``||A - A^T||_F / ||A||_F``, a tile at a time; 0 for the zero matrix."""
    unit = largest_entry(A)
    if unit == 0:
        return 0.0
    difference = norm = 0.0
    for x, y, is_diagonal in _pairs(A, unit):
        difference += float((x - y).square().sum()) * (1 if is_diagonal else 2)
        norm += float(x.square().sum()) + (0.0 if is_diagonal else float(y.square().sum()))
    return float((difference / norm) ** 0.5)


def largest_mismatch(A: Tensor, unit: Tensor) -> float:
    """``max |a_ij - a_ji|`` in units of the largest entry, a tile at a time."""
    if unit == 0:
        return 0.0
    return max(float((x - y).abs().max()) for x, y, _ in _pairs(A, unit))


def reflect_(A: Tensor, columns: list[int], rows: list[int]) -> None:
    """Set ``A[j, i] = A[i, j]`` for the given columns j and rows i, a stripe at a time."""
    for start in range(0, len(columns), _STRIPE):
        block = columns[start : start + _STRIPE]
        A[torch.tensor(block)[:, None], rows] = A[:, block][rows].T


def symmetrise_(A: Tensor) -> Tensor:
    """Replace ``A`` (n, n) by ``(A + A^T) / 2`` in place, a tile at a time, and return it."""
    for rows, columns in _tiles(len(A)):
        x, y = A[rows, columns], A[columns, rows].mT
        # The sum of large entries overflows, and half of the least number there is rounds.
        mean = torch.where(x == y, x, x / 2 + y / 2)
        A[rows, columns] = mean
        A[columns, rows] = mean.mT
    return A


def _pairs(A: Tensor, unit: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Tiles with those across the diagonal, transposed, and whether they are the same.

    Their entries are divided by ``unit``, the largest, so that no square or difference overflows
    and none that counts underflows.
    """
    for rows, columns in _tiles(len(A)):
        x, y = A[rows, columns].double(), A[columns, rows].mT.double()
        yield x / unit, y / unit, rows == columns


def _tiles(n: int, width: int = 128) -> Iterator[tuple[slice, slice]]:
    """The tiles of a matrix on and below the diagonal; two of them stay in the cache."""
    for i in range(0, n, width):
        for j in range(0, i + 1, width):
            yield slice(i, min(i + width, n)), slice(j, min(j + width, n))
