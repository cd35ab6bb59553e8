"""A dense matrix and its transpose, a part at a time: what stays in the cache goes fast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Columns reflected at once.
_STRIPE = 256
#: Rows and columns of a tile, of which two stay in the cache.
_TILE = 128


def largest_entry(A: Tensor) -> Tensor:
    """``max |a|`` of a tensor as float64 of shape (), without a copy of all of it."""
    largest: Tensor = torch.linalg.vector_norm(A, torch.inf)
    return largest.double()


def asymmetry(A: Tensor) -> float:
    """``||A - A^T||_F / ||A||_F``; 0 for the zero matrix."""
    difference = norm = 0.0
    for x, y in _pairs(A):
        difference += float((x - y).square().sum())
        norm += float(x.square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0


def largest_mismatch(A: Tensor) -> float:
    """``max |a_ij - a_ji|`` in units of the largest entry."""
    return max((float((x - y).abs().max()) for x, y in _pairs(A)), default=0.0)


def reflect_(A: Tensor, columns: list[int], rows: list[int]) -> None:
    """Set ``A[j, i] = A[i, j]`` for the given columns j and rows i, a stripe at a time."""
    for start in range(0, len(columns), _STRIPE):
        block = columns[start : start + _STRIPE]
        A[torch.tensor(block)[:, None], rows] = A[:, block][rows].T


def symmetrise_(A: Tensor) -> Tensor:
    """Replace ``A`` (n, n) by ``(A + A^T) / 2`` in place, a tile at a time, and return it."""
    tiles = [slice(i, i + _TILE) for i in range(0, len(A), _TILE)]
    for rows in tiles:
        for columns in tiles[: rows.start // _TILE + 1]:
            x, y = A[rows, columns], A[columns, rows].mT
            # The sum of large entries overflows, and half of the least number there is rounds.
            mean = torch.where(x == y, x, x / 2 + y / 2)
            A[rows, columns] = mean
            A[columns, rows] = mean.mT
    return A


def _pairs(A: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, with those of the transpose.

    Their entries are divided by the largest, so that no square or difference overflows and none
    that counts underflows.
    """
    unit = largest_entry(A)
    for i in range(0, len(A) if unit else 0, _TILE):
        rows = slice(i, i + _TILE)
        yield A[rows].double() / unit, A[:, rows].mT.double() / unit
