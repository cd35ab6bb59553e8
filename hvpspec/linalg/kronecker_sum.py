"""The sum of Kronecker products ``Q_s (x) a_s a_s^T``, made of weighted Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

#: Rows in one matrix product: enough for its full speed, and few enough to stay in the cache.
PIECE_ROWS = 512

#: Columns of a Gram matrix computed at once, and only down to the diagonal.
_STRIPE = 128


class KroneckerSum:
    """Accumulates ``H = sum_s Q_s (x) a_s a_s^T`` in place in a larger matrix.

    ``H`` is the Hessian of ``sum_s l_s(W a_s + b)`` in the rows of ``W`` (D, p), then ``b`` (D,):
    ``Q_s`` is the Hessian of ``l_s`` (D, D), and for the bias ``a_s`` is continued by a 1. The
    block of rows j and k of ``W`` is the weighted Gram matrix ``sum_s Q_s[j, k] a_s a_s^T``.

    Inputs that are zero in every example, as the border of an image is, take no part in a product:
    while the sum is under way, each block holds the others in the order of their first appearance
    in its upper left corner, of which the upper triangle counts.

    Args:
        A: the matrix, (n, n), zero in the rows and columns of ``W`` and ``b``.
        weight: where the D p entries of ``W`` lie in a vector, row by row.
        bias: where the D entries of ``b`` lie, or None if the bias is none of the variables.
        num_outputs: D.

    Attributes:
        mass: ``sum_s ||Q_s||_F (1 + ||a_s||^2)``, which is ``||H||_F`` if nothing cancels.

    Example:
        >>> H = torch.zeros(3, 3)
        >>> total = KroneckerSum(H, weight=slice(0, 2), bias=slice(2, 3), num_outputs=1)
        >>> total.add(torch.tensor([[1.0, 2.0]]), [torch.tensor([[3.0]])])
        >>> total.finish()
        >>> H  # 3 a a^T with a = (1, 2, 1)
        tensor([[ 3.,  6.,  3.],
                [ 6., 12.,  6.],
                [ 3.,  6.,  3.]])
    """

    def __init__(self, A: Tensor, weight: slice, bias: slice | None, num_outputs: int) -> None:
        self._A, self._weight, self._bias, self._num_outputs = A, weight, bias, num_outputs
        self._num_inputs = (weight.stop - weight.start) // num_outputs
        self._live = torch.zeros(0, dtype=torch.long, device=A.device)
        self.mass = 0.0

    def add(self, inputs: Tensor, columns: Iterable[Tensor]) -> None:
        """Add some examples.

        Args:
            inputs: their ``a_s``, shape (S, p).
            columns: for each j the column ``Q_s[:, j]``, shape (S, D).
        """
        self._note_live(inputs)
        live_inputs = inputs[:, self._live]
        pieces = _pieces(live_inputs)
        square = torch.zeros(len(inputs), dtype=self._A.dtype, device=self._A.device)
        for j, q in enumerate(columns):
            square += (q * q).sum(1)
            # Where a ReLU is off, or a target ignored, an example has no share in row j.
            active = q.any(1)
            if bool(active.all()):
                self._add_row(j, pieces, _pieces(q))
            else:
                self._add_row(j, _pieces(live_inputs[active]), _pieces(q[active]))
        self.mass += float(square.sqrt() @ (1 + (inputs * inputs).sum(1)))

    def _add_row(self, j: int, inputs: list[Tensor], weights: list[Tensor]) -> None:
        """Add pieces, (live, S) and (D, S), to the blocks of row j on and below the diagonal."""
        num_live = len(self._live)
        grams = [self._block(j, k)[:num_live, :num_live] for k in range(j + 1)]
        for X, q in zip(inputs, weights, strict=True):
            for gram, weight in zip(grams, q, strict=False):
                add_weighted_gram_(gram, X, weight)
            if self._bias is not None:
                self._A[self._bias, self._row(j)][:, :num_live] += q @ X.T
                self._A[self._bias, self._bias][:, j] += q.sum(1)

    def finish(self) -> None:
        """Move all entries to their places, after the last examples."""
        for j in range(self._num_outputs):
            for k in range(j + 1):
                block = self._block(j, k)
                gram = block[: len(self._live), : len(self._live)].triu()
                gram += gram.triu(1).T
                block.zero_()
                block[self._live[:, None], self._live] = gram
                if k < j:
                    self._block(k, j).copy_(block)
        if self._bias is None:
            return
        for j in range(self._num_outputs):
            rows = self._A[self._bias, self._row(j)]
            live = rows[:, : len(self._live)].clone()
            rows.zero_()
            rows[:, self._live] = live
        self._A[self._weight, self._bias] = self._A[self._bias, self._weight].T

    def _note_live(self, inputs: Tensor) -> None:
        """Put the inputs that are not zero in these examples, but in all before, at the end."""
        seen = inputs.any(0)
        seen[self._live] = False
        self._live = torch.cat([self._live, seen.nonzero().squeeze(1)])

    def _row(self, j: int) -> slice:
        """Where row j of ``W`` lies in a vector."""
        start = self._weight.start + j * self._num_inputs
        return slice(start, start + self._num_inputs)

    def _block(self, j: int, k: int) -> Tensor:
        """The block of rows j and k of ``W``, a view of shape (p, p)."""
        return self._A[self._row(j), self._row(k)]


def _pieces(rows: Tensor) -> list[Tensor]:
    """The transposes of blocks of rows of about equal length, none longer than a piece."""
    num_pieces = max(1, math.ceil(len(rows) / PIECE_ROWS))
    return [piece.T.contiguous() for piece in rows.chunk(num_pieces)]


def add_weighted_gram_(G: Tensor, X: Tensor, q: Tensor) -> None:
    """Add ``X diag(q) X^T``, from X (p, S) and q (S,), to the upper triangle of G (p, p).

    In stripes of columns little is computed below the diagonal, where G is undefined afterwards:
    with a stripe of w of p columns, (1 + w / p) / 2 of all.
    """
    for start in range(0, len(X), _STRIPE):
        stop = min(start + _STRIPE, len(X))
        G[:stop, start:stop].addmm_(X[:stop], (q * X[start:stop]).T)
