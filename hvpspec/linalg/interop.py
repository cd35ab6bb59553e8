"""Adapters, which present an operator to SciPy and to linear_operator."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpspec.errors import InputError

if TYPE_CHECKING:
    import linear_operator
    from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

    from hvpspec.linalg.operator import SymmetricOperator

#: Unit vectors multiplied at once for single entries.
_BLOCK = 256


def to_scipy(A: SymmetricOperator) -> ScipyLinearOperator:
    """Wrap an operator for SciPy; see :meth:`SymmetricOperator.to_scipy`."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

    def multiply(V: np.ndarray) -> np.ndarray:
        block = torch.as_tensor(np.asarray(V).reshape(A.shape[0], -1))
        product = A.matmat(block.to(A.device, A.dtype))
        return product.cpu().numpy().reshape(V.shape)

    dtype = torch.empty(0, dtype=A.dtype).numpy().dtype
    return LinearOperator(
        A.shape,
        matvec=multiply,
        rmatvec=multiply,
        matmat=multiply,
        rmatmat=multiply,
        dtype=dtype,
    )


def to_linear_operator(A: SymmetricOperator) -> linear_operator.LinearOperator:
    """Wrap an operator for linear_operator; see :meth:`SymmetricOperator.to_linear_operator`.

    Args:
        A: the operator, which counts the products.

    Raises:
        InputError: the package is not installed.
    """
    witness = torch.empty(0, dtype=A.dtype, device=A.device)
    return _wrapper_class()(witness, operator=A)


@cache
def _wrapper_class() -> Any:
    """Make the subclass, whose base is imported only here."""
    try:
        from linear_operator import LinearOperator
    except ImportError as error:
        raise InputError(
            "to_linear_operator needs the package linear_operator; pip install linear_operator"
        ) from error

    class HvpspecLinearOperator(LinearOperator):
        """A symmetric operator seen through its products.

        The library rebuilds an operator from its tensors, and reads dtype and device off the first
        of them: an empty one stands in, and the operator travels along as an option.
        """

        def __init__(self, witness: Tensor, *, operator: SymmetricOperator) -> None:
            super().__init__(witness, operator=operator)
            self._operator = operator

        def _size(self) -> torch.Size:
            return torch.Size(self._operator.shape)

        def _transpose_nonbatch(self) -> HvpspecLinearOperator:
            return self

        def _matmul(self, rhs: Tensor) -> Tensor:
            A = self._operator
            if rhs.ndim == 1:
                return self._matmul(rhs[:, None])[:, 0]
            # Batches (..., n, k) become the columns of one block.
            columns = rhs.movedim(-2, 0)
            block = columns.reshape(A.shape[0], -1).to(A.device, A.dtype)
            return A.matmat(block).to(rhs).reshape(columns.shape).movedim(0, -2)

        def _get_indices(self, row_index: Tensor, col_index: Tensor) -> Tensor:
            """Single entries, for the diagonal and for preconditioners, from unit vectors."""
            rows, columns = torch.broadcast_tensors(row_index, col_index)  # type: ignore[no-untyped-call]
            if len(rows.unique()) < len(columns.unique()):  # the matrix is its own transpose
                rows, columns = columns, rows
            unique, inverse = columns.unique(return_inverse=True)
            entries = torch.empty(rows.shape, dtype=self.dtype, device=self.device)
            for start in range(0, len(unique), _BLOCK):
                block = unique[start : start + _BLOCK]
                unit = torch.zeros(self.shape[-1], len(block), dtype=self.dtype, device=self.device)
                unit[block, range(len(block))] = 1
                here = (inverse >= start) & (inverse < start + len(block))
                entries[here] = self._matmul(unit)[rows[here], inverse[here] - start]
            return entries

        def to_dense(self) -> Tensor:
            return self._operator.to_dense().to(self.device, self.dtype)

    return HvpspecLinearOperator
