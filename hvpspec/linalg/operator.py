"""The symmetric operator every algorithm works on, and the simple ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpspec.errors import ComputationError, InputError, NonFiniteError, first_line
from hvpspec.linalg.assembly import Part, fill_columns_, fill_now
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.facts import PointFacts
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.ranks import ALONE, Ranks
from hvpspec.linalg.tiles import asymmetry, symmetrise_

if TYPE_CHECKING:
    import linear_operator
    from scipy.sparse.linalg import LinearOperator

#: Called with the work done and the total.
Progress = Callable[[int, int], None]

#: Round-off of half precision inside a network stays below this; a wrong derivative does not.
_MOST_ASYMMETRY = 0.02


class SymmetricOperator(ABC):
    """A real symmetric ``n x n`` matrix seen through its products.

    Subclasses implement ``_matmat``; everything else follows. Products are counted, checked for
    shape and dtype, and refused when they are not finite.

    Attributes:
        shape: ``(n, n)``.
        dtype: floating-point type of the products.
        device: where vectors live.
        num_matvecs: matrix-vector products done so far (a block of ``k`` vectors counts ``k``).
        ranks: the processes that make each product together, with the same vectors.
    """

    ranks: Ranks = ALONE

    def __init__(self, n: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        if not hasattr(n, "__index__") or n < 1:
            raise InputError(f"an operator needs a size of at least 1, a whole number, got {n}")
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a real floating-point type, got {dtype}")
        self.shape = (n, n)
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_matvecs = 0

    @property
    def unit_roundoff(self) -> float:
        """The relative error of one operation in the products."""
        return torch.finfo(self.dtype).eps / 2

    @abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """Return ``A V`` for a checked block ``V`` of shape (n, k)."""

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply a block of vectors.

        Args:
            V: block of column vectors, shape (n, k), on the operator's device and in its dtype.

        Returns:
            ``A V``, shape (n, k).

        Raises:
            InputError: ``V`` has another shape, dtype or device.
            NonFiniteError: an entry of the product is NaN or infinite.
        """
        n = self.shape[0]
        self._check_tensor(V)
        if V.ndim != 2 or V.shape[0] != n:
            raise InputError(f"expected a block of shape ({n}, k), got {tuple(V.shape)}")
        self._check_kind(V)
        product = self._matmat(V)
        if product.untyped_storage().data_ptr() == V.untyped_storage().data_ptr():
            product = product.clone()  # whoever asked may go on in its place
        self.num_matvecs += V.shape[1]
        # NaN and infinity survive a sum, which costs a tenth of looking at every entry.
        if not bool(torch.isfinite(product.sum())) and not bool(torch.isfinite(product).all()):
            if not bool(torch.isfinite(V).all()):
                raise NonFiniteError(
                    "the vector to multiply contains NaN or infinity; pass a finite one"
                )
            raise NonFiniteError(self._non_finite_message())
        return product

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector.

        Args:
            v: shape (n,), on the operator's device and in its dtype.

        Returns:
            ``A v``, shape (n,).

        Raises:
            InputError: ``v`` has another shape, dtype or device.
            NonFiniteError: an entry of the product is NaN or infinite.
        """
        n = self.shape[0]
        self._check_tensor(v)
        if v.shape != (n,):
            raise InputError(f"expected a vector of shape ({n},), got {tuple(v.shape)}")
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def __matmul__(self, other: Tensor) -> Tensor:
        self._check_tensor(other)
        return self.matvec(other) if other.ndim == 1 else self.matmat(other)

    def __neg__(self) -> SymmetricOperator:
        return AffineOperator(self, scale=-1.0)

    def shifted(self, shift: float) -> SymmetricOperator:
        """``A + shift I``: its index counts the eigenvalues of A below ``-shift``."""
        return AffineOperator(self, shift=shift)

    def to_dense(self, *, progress: Progress | None = None) -> Tensor:
        """Assemble the matrix, in general from products with the unit vectors.

        Args:
            progress: called with the number of columns done and their total.

        Returns:
            A new tensor, shape (n, n), exactly symmetric.

        Raises:
            InputError: the matrix does not fit into memory.
            ComputationError: the products are far from symmetric.
        """
        return self._dense(progress, fill_now)

    def _dense(self, progress: Progress | None, part: Part) -> Tensor:
        """Assemble the matrix of parts."""
        n = self.shape[0]
        require_memory(n * n * self.dtype.itemsize, f"a dense {n} x {n} matrix", self.device)
        A = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        self._assemble_(A, progress, part)
        defect = asymmetry(A)
        if defect > _MOST_ASYMMETRY:
            raise ComputationError(
                f"the products are not symmetric: |A - A^T| is {defect:.1%} of |A|; look for an "
                "operation whose second derivative is wrong, or for low precision inside"
            )
        return symmetrise_(A)

    def _assemble_(self, A: Tensor, progress: Progress | None, part: Part) -> None:
        """Fill ``A``, which is zero, up to its asymmetry."""
        n = len(A)
        fill_columns_(A, self, range(n), part, progress and (lambda done: progress(done, n)))

    def in_float64(self) -> SymmetricOperator:
        """Return the same matrix with products in float64, or ``self`` where impossible."""
        return self

    def facts(self) -> PointFacts:
        """Return what is known of this operator beyond its products."""
        return PointFacts()

    def fingerprint(self) -> dict[str, str]:
        """What tells this operator from others, by the names of its parts."""
        return {
            "operator": type(self).__name__,
            "size": str(self.shape[0]),
            "dtype": str(self.dtype),
        }

    def to_scipy(self) -> LinearOperator:
        """Wrap as a SciPy operator, for ``eigsh``, ``lobpcg``, ``cg`` of ``scipy.sparse.linalg``.

        Returns:
            A ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays with this operator's dtype.
        """
        from hvpspec.linalg.interop import to_scipy

        return to_scipy(self)

    def to_linear_operator(self) -> linear_operator.LinearOperator:
        """Wrap for the package linear_operator, on which GPyTorch rests.

        Its functions then work on this operator through products: ``solve``, ``inv_quad_logdet``,
        ``add_diagonal`` and more. From size 2,000 on, its solver for ``A + s I`` makes a
        preconditioner from the diagonal, which costs n products here;
        ``linear_operator.settings.max_preconditioner_size(0)`` does without.

        Returns:
            A ``linear_operator.LinearOperator`` with this operator's dtype and device.

        Raises:
            InputError: the package is not installed.
        """
        from hvpspec.linalg.interop import to_linear_operator

        return to_linear_operator(self)

    def _non_finite_message(self) -> str:
        """Say what to do when a product of a finite vector is not finite."""
        return "the operator returned NaN or infinity for a finite vector; check the operator"

    def _check_tensor(self, V: Tensor) -> None:
        """Raise unless ``V`` is a tensor."""
        if not isinstance(V, Tensor):
            raise InputError(
                f"expected a tensor, got {type(V).__name__}; convert it with torch.as_tensor"
            )

    def _check_kind(self, V: Tensor) -> None:
        """Raise unless ``V`` has the operator's dtype and device."""
        if V.dtype != self.dtype:
            raise InputError(
                f"expected dtype {self.dtype}, got {V.dtype}; convert it with .to({self.dtype})"
            )
        if V.device != self.device:
            raise InputError(f"expected device {self.device}, got {V.device}; move it with .to()")


def as_operator(A: SymmetricOperator | Tensor) -> SymmetricOperator:
    """Take a symmetric matrix as an operator, and an operator as it is."""
    return A if isinstance(A, SymmetricOperator) else DenseOperator(A)


class DenseOperator(SymmetricOperator):
    """A symmetric matrix held in memory.

    Args:
        A: shape (n, n), floating point and symmetric to round-off.

    Raises:
        InputError: ``A`` is not a square, finite, symmetric floating-point matrix.

    Example:
        >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, -3.0]]))
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
    """

    def __init__(self, A: Tensor) -> None:
        try:
            A = torch.as_tensor(A).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"expected a symmetric operator or a matrix, got {type(A).__name__} "
                f"({first_line(error)})"
            ) from error
        if A.layout != torch.strided:
            raise InputError(f"expected a dense matrix, got layout {A.layout}; call .to_dense()")
        if A.ndim != 2 or A.shape[0] != A.shape[1]:
            raise InputError(f"expected a square matrix, got shape {tuple(A.shape)}")
        if A.is_meta:
            raise InputError("expected a matrix with numbers, got one on the device meta")
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        if not bool(torch.isfinite(A).all()):
            raise InputError("the matrix contains NaN or infinity")
        # A product of n terms, computed in either order, agrees to about n u max|a|; a matrix that
        # differs from its transpose by more was not meant to be symmetric.
        tolerance = A.shape[0] * torch.finfo(A.dtype).eps * A.abs().max()
        defect = (A - A.mT).abs().max()
        if bool(defect > 10 * tolerance):
            raise InputError(
                f"the matrix is not symmetric: |A - A^T| reaches {float(defect):.2e}; pass (A + "
                f"A.T) / 2"
            )
        self._A = A

    def _matmat(self, V: Tensor) -> Tensor:
        return self._A @ V

    def _dense(self, progress: Progress | None, part: Part) -> Tensor:
        return symmetrise_(self._A.clone())

    def fingerprint(self) -> dict[str, str]:
        """What tells this matrix from others."""
        return {**super().fingerprint(), "matrix": tensor_digest([self._A])}

    def in_float64(self) -> DenseOperator:
        """Return the same matrix in float64."""
        return self if self.dtype == torch.float64 else DenseOperator(symmetrise_(self._A.double()))


class FunctionOperator(SymmetricOperator):
    """A symmetric operator given by a function that multiplies one vector.

    Args:
        n: size of the vectors.
        matvec: takes and returns a tensor of shape (n,). It must be linear and symmetric.
        dtype: floating-point type of the vectors.
        device: where the vectors live.

    Example:
        >>> A = FunctionOperator(3, lambda v: 2 * v, dtype=torch.float64)
        >>> A.matvec(torch.ones(3, dtype=torch.float64))
        tensor([2., 2., 2.], dtype=torch.float64)
    """

    def __init__(
        self,
        n: int,
        matvec: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(n, dtype=dtype, device=device)
        self._function = matvec

    def _matmat(self, V: Tensor) -> Tensor:
        columns = [self._function(v) for v in V.unbind(1)]
        if not columns:
            return V.clone()
        for product in columns:
            if not isinstance(product, Tensor) or product.dtype.is_complex:
                kind = getattr(product, "dtype", type(product).__name__)
                raise InputError(f"matvec must return a real tensor, but returned {kind}")
            if product.shape != (self.shape[0],):
                raise InputError(
                    f"matvec must return shape ({self.shape[0]},), but returned "
                    f"{tuple(product.shape)}"
                )
        # Each product's entries lie together, as those who go on with them need them.
        return torch.stack(columns).to(self.dtype).T


class AffineOperator(SymmetricOperator):
    """``scale A + shift I``.

    Args:
        A: the operator, whose products are counted there, too.
        scale: factor of ``A``.
        shift: factor of the identity.

    Example:
        >>> A = DenseOperator(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
        >>> A.shifted(-2.0).to_dense().diagonal()
        tensor([-1.,  3.])
    """

    def __init__(self, A: SymmetricOperator, *, scale: float = 1.0, shift: float = 0.0) -> None:
        if not (math.isfinite(scale) and math.isfinite(shift)):
            raise InputError(f"scale and shift must be finite, got {scale} and {shift}")
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        self._A, self._scale, self._shift = A, scale, shift
        self.ranks = A.ranks

    @property
    def unit_roundoff(self) -> float:
        """That of the operator beneath."""
        return self._A.unit_roundoff

    def _matmat(self, V: Tensor) -> Tensor:
        return self._scale * self._A.matmat(V) + self._shift * V

    def _dense(self, progress: Progress | None, part: Part) -> Tensor:
        before = self._A.num_matvecs
        A = self._A._dense(progress, part).mul_(self._scale)
        self.num_matvecs += self._A.num_matvecs - before
        A.diagonal().add_(self._shift)
        return A

    def in_float64(self) -> SymmetricOperator:
        """The same with the operator beneath in float64."""
        beneath = self._A.in_float64()
        if beneath is self._A:
            return self
        return AffineOperator(beneath, scale=self._scale, shift=self._shift)

    def fingerprint(self) -> dict[str, str]:
        """That of the operator beneath, with the factors."""
        factors = {"scale": repr(self._scale), "shift": repr(self._shift)}
        return {**self._A.fingerprint(), **factors}

    def facts(self) -> PointFacts:
        """What is known of the operator beneath; a bound on its index says nothing of this one."""
        return replace(self._A.facts(), index_bound=None)
