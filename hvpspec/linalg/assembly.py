"""A dense matrix from products with unit vectors, in parts of which each can be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hvpspec.linalg.operator import SymmetricOperator

#: Fills entries of tensors, by a function that does so or with what was kept of them before;
#: returns whether it called the function. Takes a name without spaces, the tensors with the indices
#: of the entries, and the function.
Part = Callable[[str, Sequence[tuple[Tensor, Any]], Callable[[], None]], bool]

#: Unit vectors multiplied at once.
_BLOCK = 256


def fill_now(_name: str, _entries: Sequence[tuple[Tensor, Any]], fill: Callable[[], None]) -> bool:
    """The part of a matrix of which nothing is kept."""
    fill()
    return True


def fill_columns_(
    A: Tensor,
    operator: SymmetricOperator,
    columns: Sequence[int],
    part: Part,
    report: Callable[[int], None] | None = None,
) -> None:
    """Fill some columns of a matrix by products with unit vectors.

    Args:
        A: the matrix, shape (n, n).
        operator: what multiplies; products that were kept count as its own.
        columns: which.
        part: fills, or finds, a block of them.
        report: called with how many are done.
    """

    def fill(block: list[int]) -> None:
        """Fill those of one block."""
        A[:, block] = operator.matmat(unit_columns(operator, block))

    for start in range(0, len(columns), _BLOCK):
        block = list(columns[start : start + _BLOCK])
        name, entries = f"columns-{block[0]}-{block[-1]}", [(A, (slice(None), block))]
        if not part(name, entries, partial(fill, block)):
            operator.num_matvecs += len(block)
        if report is not None:
            report(start + len(block))


def unit_columns(A: SymmetricOperator, indices: Sequence[int] | Tensor) -> Tensor:
    """The unit vectors of some indices as columns, of which the products are columns of A."""
    unit = torch.zeros(A.shape[0], len(indices), dtype=A.dtype, device=A.device)
    unit[indices, range(len(indices))] = 1
    return unit
