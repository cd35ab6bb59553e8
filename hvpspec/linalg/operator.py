"""The symmetric operator every algorithm works on, and the simple ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hvpspec.errors import ComputationError, InputError, NonFiniteError, first_line
from hvpspec.linalg import interop
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.ranks import ALONE, Ranks
from hvpspec.linalg.tiles import asymmetry, largest_entry, largest_mismatch, symmetrise_
from hvpspec.progress import Progress, shown
from hvpspec.results import Result

if TYPE_CHECKING:
    import linear_operator
    from scipy.sparse.linalg import LinearOperator

#: How often random vectors are drawn before products are called asymmetric.
_LOOKS = 5

# Unit vectors multiplied at once in an assembly.
_BLOCK = 256


@dataclass(frozen=True, repr=False)
class IndexBound(Result):
    """A proven upper bound on the number of negative eigenvalues.

    If ``A`` is positive semi-definite on a subspace of dimension ``psd_dim``, then at most
    ``dim - psd_dim`` of its eigenvalues are negative (Cauchy-Poincare).
    """

    upper: int
    psd_dim: int
    reason: str


@dataclass(frozen=True, repr=False)
class PointFacts(Result):
    """What the maker of an operator knows about it beyond its products; unknown facts are None.

    For the Hessian of ``f`` at a point: ``f`` itself, the Euclidean norm of its gradient, a bound
    on the index that follows from the structure of ``f``, and what a reader of the result should
    know. ``certain`` is False where nothing may be certified of it, since the matrix is the
    derivative of a pseudo-gradient.
    """

    loss: float | None = None
    gradient_norm: float | None = None
    index_bound: IndexBound | None = None
    notes: tuple[str, ...] = ()
    certain: bool = True


@dataclass(frozen=True)
class Piece:
    """Some entries of a matrix that is being assembled.

    Attributes:
        name: without spaces, and the same in each assembly of the matrix.
        entries: tensors, each with the index of the entries.
        fill: computes the entries.
    """

    name: str
    entries: Sequence[tuple[Tensor, Any]]
    fill: Callable[[], None]


class SymmetricOperator(ABC):
    """A real symmetric ``n x n`` matrix seen through its products.

    Subclasses implement ``_matmat``; everything else follows. Products are counted, checked for
    shape and dtype, and refused when they are not finite. A subclass may use its argument as
    scratch space and return the same tensor each time: both are copied.

    Attributes:
        shape: ``(n, n)``.
        dtype: floating-point type of the products.
        device: where vectors live.
        num_matvecs: matrix-vector products done so far (a block of ``k`` vectors counts ``k``),
            without the few that check the symmetry once.
        ranks: the processes that make each product together, with the same vectors.
    """

    ranks: Ranks = ALONE

    #: Whether ``_matmat`` leaves its argument alone and returns memory that nobody else uses, so
    #: that no copies are needed.
    _keeps_apart: ClassVar[bool] = False
    _found_symmetric = False
    #: Whether the entries themselves have been compared, so that an assembled matrix need not be.
    _entries_compared = False

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

    @property
    def defect(self) -> float:
        """How far products are known to be from the matrix that is meant, relative to its norm."""
        return 0.0

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
        self._check(V, ndim=2)
        if self._keeps_apart:
            product = self._matmat(V)
        else:  # each column's entries lie together, as those who go on with them need them
            product = self._matmat(V.clone()).T.clone(memory_format=torch.contiguous_format).T
        self.num_matvecs += V.shape[1]
        # NaN and infinity survive a sum, which costs a tenth of looking at every entry.
        if not bool(torch.isfinite(product.sum())) and not bool(torch.isfinite(product).all()):
            given = bool(torch.isfinite(V).all())
            vector = "the vector to multiply contains NaN or infinity; pass a finite one"
            raise NonFiniteError(self._non_finite_message() if given else vector)
        return product

    def expect(self, num_vectors: int, width: int) -> None:  # noqa: B027 - most need not know
        """Announce that so many vectors are to be multiplied, ``width`` of them in a block.

        An operator may prepare for it; it changes no result.
        """

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply one vector, as :meth:`matmat` does a block.

        Args:
            v: shape (n,), on the operator's device and in its dtype.

        Returns:
            ``A v``, shape (n,).
        """
        self._check(v, ndim=1)
        return self.matmat(v.unsqueeze(1)).squeeze(1)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.matvec(other) if getattr(other, "ndim", 2) == 1 else self.matmat(other)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"<{type(self).__name__} {self.shape[0]} x {self.shape[1]}, {kind}, {self.device}>"

    def __neg__(self) -> SymmetricOperator:
        return AffineOperator(self, scale=-1.0)

    def shifted(self, shift: float) -> SymmetricOperator:
        """``A + shift I``: its index counts the eigenvalues of A below ``-shift``."""
        return AffineOperator(self, shift=shift)

    def to_dense(self, *, progress: Progress | bool | None = None) -> Tensor:
        """Assemble the matrix, in general from products with the unit vectors.

        Args:
            progress: True for a bar; or called with the number of columns done and their total.

        Returns:
            A new tensor, shape (n, n), exactly symmetric.

        Raises:
            InputError: the matrix does not fit into memory.
            ComputationError: the products are not symmetric.
        """
        n = self.shape[0]
        require_memory(n * n * self.dtype.itemsize, f"a dense {n} x {n} matrix", self.device)
        self.check_symmetry()
        A = torch.zeros(n, n, dtype=self.dtype, device=self.device)
        with shown(progress, "columns") as report:
            for piece in self._pieces(A, report):
                piece.fill()
        defect = 0.0 if self._entries_compared else asymmetry(A)
        # What is computed inside with half the digits, as float32 in float64, is off by sqrt(u) in
        # each operation; the root of that once more leaves room for cancellation. What it is off
        # by is measured on the assembled matrix.
        if defect > self.unit_roundoff**0.25:
            raise ComputationError(
                f"the products are not symmetric: |A - A^T| is {defect:.1e} of |A|; look for an "
                "operation whose derivative is wrong, or for low precision inside"
            )
        return symmetrise_(A)

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        """Assemble ``A``, which is zero, up to its asymmetry.

        Whoever iterates fills each piece, or puts in what was kept of it, before the next.
        """
        n = len(A)
        yield from self._columns(A, range(n), progress and (lambda done: progress(done, n)))

    def _columns(
        self, A: Tensor, columns: Sequence[int], report: Callable[[int], None] | None = None
    ) -> Iterator[Piece]:
        """Assemble some columns from products with unit vectors; report how many are done."""

        def fill(block: Sequence[int]) -> None:
            A[:, block] = self.matmat(unit_columns(self, block))

        self.expect(len(columns), _BLOCK)
        for start in range(0, len(columns), _BLOCK):
            block = list(columns[start : start + _BLOCK])
            before = self.num_matvecs
            name = f"columns-{block[0]}-{block[-1]}"
            yield Piece(name, [(A, (slice(None), block))], partial(fill, block))
            self.num_matvecs = before + len(block)  # also if they were kept from another run
            if report is not None:
                report(start + len(block))

    def check_symmetry(self) -> None:
        """Make sure that the products are those of a symmetric matrix, once for each operator.

        Every question asks this before it uses a product. Four products are compared, whatever the
        size, or a few times as many before an operator is refused; they are not counted.

        A wrong derivative is linear all the same, while round-off, of whatever precision inside, is
        not: ``A (u + v)`` and ``A (u - v)`` show how large the errors of products are. An error e
        is seen by u as ``|u^T e|``, of size ``|e| / sqrt(n)``, and ten of these are allowed. (Where
        all errors lie along one direction, those of the sums may by chance be smaller still, about
        once in 20 times, hence more than one look.) Where the sums happen to be exact, as for
        integers, a product may still be off by ``u ||A||``, and ``||A|| <= ||A||_F``, which is
        ``sqrt(n) |A u|`` in the mean; ten of these are allowed, too.

        Raises:
            ComputationError: ``u^T A v`` and ``v^T A u`` differ for random u and v by more than
                round-off.
        """
        if self._found_symmetric:
            return
        n, generator = self.shape[0], torch.Generator().manual_seed(0)
        # Two vectors and their combinations in float64, and blocks of four in two types.
        num_bytes = n * (4 * 8 + 8 * (self.dtype.itemsize + 8))
        with self.ranks.together():
            require_memory(num_bytes, "the check of the operator's symmetry", self.device)
        for _ in range(_LOOKS):
            U = torch.randn(n, 2, generator=generator, dtype=torch.float64)
            U /= torch.linalg.vector_norm(U, dim=0)
            u, v = U.to(self.device, self.dtype).T
            products = self.matmat(torch.stack([u, v, u + v, u - v], 1)).double()
            self.num_matvecs -= 4
            # In units of the largest, so that squares neither overflow nor underflow.
            Au, Av, sum_, difference = (products / largest_entry(products)).T
            # The mean of |A u| and |A v|; |A u| / sqrt(n) is the size of u^T A v itself.
            size = float(torch.linalg.vector_norm(Au) + torch.linalg.vector_norm(Av)) / 2
            defect = n**0.5 * float((u.double() @ Av - v.double() @ Au).abs())
            errors = torch.stack([sum_ - Au - Av, difference - Au + Av])
            measured = float(torch.linalg.vector_norm(errors))
            allowed = 10 * (measured + n**0.5 * self.unit_roundoff * size)
            # Where all products vanish, 0 / 0 has made the size NaN.
            if not size > 0 or defect <= allowed:
                self._found_symmetric = True
                return
        raise ComputationError(
            f"the products are not symmetric: u^T A v and v^T A u differ by {defect / size:.1e} of "
            "|A u| / sqrt(n) for random u and v; pass a symmetric operator, or look for an "
            "operation whose derivative is wrong"
        )

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
        """Wrap as a SciPy operator, for ``eigsh``, ``cg`` and others of ``scipy.sparse.linalg``."""
        return interop.to_scipy(self)

    def to_linear_operator(self) -> linear_operator.LinearOperator:
        """Wrap for the package linear_operator, on which GPyTorch rests.

        Its functions then work on this operator through products. From size 2,000 on, its solver
        for ``A + s I`` makes a preconditioner from the diagonal, which costs n products here;
        ``linear_operator.settings.max_preconditioner_size(0)`` does without.

        Raises:
            InputError: the package is not installed.
        """
        return interop.to_linear_operator(self)

    def _non_finite_message(self) -> str:
        """Say what to do when a product of a finite vector is not finite."""
        return "the operator returned NaN or infinity for a finite vector; check the operator"

    def _check(self, V: Tensor, *, ndim: int) -> None:
        """Raise unless ``V`` is a vector, or a block of them, as this operator multiplies."""
        n = self.shape[0]
        if not isinstance(V, Tensor):
            raise InputError(
                f"expected a tensor, got {type(V).__name__}; convert it with torch.as_tensor"
            )
        if V.ndim != ndim or V.shape[0] != n:
            what = f"a vector of shape ({n},)" if ndim == 1 else f"a block of shape ({n}, k)"
            raise InputError(f"expected {what}, got {tuple(V.shape)}")
        if V.dtype != self.dtype:
            raise InputError(
                f"expected dtype {self.dtype}, got {V.dtype}; convert it with .to({self.dtype})"
            )
        if V.device != self.device:
            raise InputError(f"expected device {self.device}, got {V.device}; move it with .to()")


def as_operator(A: SymmetricOperator | Tensor) -> SymmetricOperator:
    """Take a symmetric matrix as an operator, and an operator as it is."""
    return A if isinstance(A, SymmetricOperator) else DenseOperator(A)


def unit_columns(A: SymmetricOperator, indices: Sequence[int] | Tensor) -> Tensor:
    """The unit vectors of some indices as columns, of which the products are columns of A."""
    unit = torch.zeros(A.shape[0], len(indices), dtype=A.dtype, device=A.device)
    unit[indices, range(len(indices))] = 1
    return unit


def require_scale(norm: float, dtype: torch.dtype) -> None:
    """Raise ComputationError where products are too small or large for their squares.

    Norms are roots of sums of squares in float64, which underflow or overflow. Products below the
    smallest normal number of their own type are rounded by more than ``u`` times their size. Zero
    is exact.
    """
    double = torch.finfo(torch.float64)
    most = math.sqrt(double.max) * double.eps
    least = max(1 / most, torch.finfo(dtype).smallest_normal)
    if norm != 0 and not least <= norm <= most:
        raise ComputationError(
            f"products of size {norm:.0e} are out of range, since they or their squares underflow "
            f"or overflow in {dtype}; scale the matrix, or the loss"
        )


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

    _keeps_apart = True
    _entries_compared = _found_symmetric = True

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
        # A product of n terms, computed in either order, agrees to about n u max|a|, or to as many
        # of the least numbers there are; a matrix that differs from its transpose by more was not
        # meant to be symmetric. Of the largest entry, neither overflows nor underflows.
        finfo, largest = torch.finfo(A.dtype), float(largest_entry(A)) or 1.0
        least = finfo.smallest_normal * finfo.eps
        tolerance = 10 * A.shape[0] * (finfo.eps + least / largest)
        defect = largest_mismatch(A)
        if defect > tolerance:
            raise InputError(
                f"the matrix is not symmetric: |A - A^T| reaches {defect:.2e} of its largest "
                "entry; pass (A + A.T) / 2"
            )
        self._A = A

    def _matmat(self, V: Tensor) -> Tensor:
        return self._A @ V

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        A.copy_(self._A)
        yield from ()

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
        matvec: takes and returns a tensor of shape (n,). It must be linear and symmetric. It gets a
            copy of the vector, and what it returns is copied.
        dtype: floating-point type of the vectors.
        device: where the vectors live.

    Example:
        >>> A = FunctionOperator(3, lambda v: 2 * v, dtype=torch.float64)
        >>> A.matvec(torch.ones(3, dtype=torch.float64))
        tensor([2., 2., 2.], dtype=torch.float64)
    """

    _keeps_apart = True

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
        # Each product's entries lie together, as those who go on with them need them.
        rows = torch.empty(V.shape[1], len(V), dtype=self.dtype, device=self.device)
        for row, v in zip(rows, V.unbind(1), strict=True):
            # The vector may be used as scratch space, and the product be a buffer that is used
            # again: one is a copy, and of the other one is made before the next call.
            product = self._function(v.clone())
            if not isinstance(product, Tensor) or product.dtype.is_complex:
                kind = getattr(product, "dtype", type(product).__name__)
                raise InputError(f"matvec must return a real tensor, but returned {kind}")
            if product.shape != (len(V),):
                raise InputError(
                    f"matvec must return shape ({len(V)},), but returned {tuple(product.shape)}"
                )
            row.copy_(product.detach())
        return rows.T


class WrappedOperator(SymmetricOperator):
    """An operator made of the products of another, which counts them, too.

    What is known of the other is taken to hold for this one; subclasses say where it does not.

    Args:
        A: the operator beneath, or a symmetric matrix of shape (n, n).
    """

    _keeps_apart = True

    def __init__(self, A: SymmetricOperator | Tensor) -> None:
        A = as_operator(A)
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        self._A, self.ranks, self._entries_compared = A, A.ranks, A._entries_compared

    @abstractmethod
    def _around(self, A: SymmetricOperator) -> SymmetricOperator:
        """The same, made of another operator."""

    @property
    def unit_roundoff(self) -> float:
        """That of the operator beneath."""
        return self._A.unit_roundoff

    @property
    def defect(self) -> float:
        """That of the operator beneath."""
        return self._A.defect

    def expect(self, num_vectors: int, width: int) -> None:
        """Announce products to the operator beneath."""
        self._A.expect(num_vectors, width)

    def check_symmetry(self) -> None:
        """Check the operator beneath."""
        self._A.check_symmetry()

    def in_float64(self) -> SymmetricOperator:
        """The same with the operator beneath in float64."""
        beneath = self._A.in_float64()
        return self if beneath is self._A else self._around(beneath)

    def facts(self) -> PointFacts:
        """What is known of the operator beneath."""
        return self._A.facts()

    def fingerprint(self) -> dict[str, str]:
        """That of the operator beneath."""
        return self._A.fingerprint()

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        """Assemble the matrix of the operator beneath."""
        before = self._A.num_matvecs
        yield from self._A._pieces(A, progress)
        self.num_matvecs += self._A.num_matvecs - before


class AffineOperator(WrappedOperator):
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
        super().__init__(A)
        self._scale, self._shift = scale, shift

    def _matmat(self, V: Tensor) -> Tensor:
        return self._scale * self._A.matmat(V) + self._shift * V

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        yield from super()._pieces(A, progress)
        A.mul_(self._scale).diagonal().add_(self._shift)

    def _around(self, A: SymmetricOperator) -> AffineOperator:
        return AffineOperator(A, scale=self._scale, shift=self._shift)

    def fingerprint(self) -> dict[str, str]:
        """That of the operator beneath, with the factors."""
        return {**super().fingerprint(), "scale": repr(self._scale), "shift": repr(self._shift)}

    def facts(self) -> PointFacts:
        """What is known of the operator beneath; a bound on its index says nothing of this one."""
        return replace(super().facts(), index_bound=None)


class PreconditionedOperator(WrappedOperator):
    """``D^-1/2 A D^-1/2`` for a positive diagonal D.

    Its eigenvalues are those of ``D^-1 A``, by which the stability of a descent is judged that
    divides its steps by D. The number of negative ones is that of A (Sylvester's law of inertia),
    though not that of those below ``-tau``.

    Args:
        A: the operator, whose products are counted there, too, or a symmetric matrix (n, n).
        D: positive numbers, shape (n,).

    Raises:
        InputError: ``D`` has another shape, or a number that is not positive and finite.

    Example:
        >>> A = DenseOperator(torch.tensor([[8.0, 2.0], [2.0, -3.0]]))
        >>> PreconditionedOperator(A, torch.tensor([4.0, 1.0])).to_dense()
        tensor([[ 2.,  1.],
                [ 1., -3.]])
    """

    def __init__(self, A: SymmetricOperator | Tensor, D: Tensor) -> None:
        super().__init__(A)
        if D.shape != (self.shape[0],):
            raise InputError(f"D must have shape ({self.shape[0]},), got {tuple(D.shape)}")
        self._D = D.detach().double()
        self._scale = self._D.rsqrt().to(self.device, self.dtype)[:, None]  # (n, 1)
        if not bool((torch.isfinite(self._scale) & (self._scale > 0)).all()):
            raise InputError(
                f"D must hold positive, finite numbers, and so must D^-1/2 in {self.dtype}; add a "
                "little to those that are 0"
            )

    def _matmat(self, V: Tensor) -> Tensor:
        return self._scale * self._A.matmat(self._scale * V)

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        yield from super()._pieces(A, progress)
        A.mul_(self._scale).mul_(self._scale.T)

    def _around(self, A: SymmetricOperator) -> PreconditionedOperator:
        return PreconditionedOperator(A, self._D)

    def fingerprint(self) -> dict[str, str]:
        """That of the operator beneath, with the scaling."""
        return {**super().fingerprint(), "D": tensor_digest([self._D])}

    def facts(self) -> PointFacts:
        """What is known of the operator beneath, but for the gradient, which is another here."""
        return replace(super().facts(), gradient_norm=None)
