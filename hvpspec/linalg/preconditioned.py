"""An operator in scaled coordinates."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.assembly import Part
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.facts import PointFacts
from hvpspec.linalg.operator import Progress, SymmetricOperator, as_operator


class PreconditionedOperator(SymmetricOperator):
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
        >>> from hvpspec import DenseOperator
        >>> A = DenseOperator(torch.tensor([[8.0, 2.0], [2.0, -3.0]]))
        >>> PreconditionedOperator(A, torch.tensor([4.0, 1.0])).to_dense()
        tensor([[ 2.,  1.],
                [ 1., -3.]])
    """

    _keeps_apart = True

    def __init__(self, A: SymmetricOperator | Tensor, D: Tensor) -> None:
        A = as_operator(A)
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        if D.shape != (A.shape[0],):
            raise InputError(f"D must have shape ({A.shape[0]},), got {tuple(D.shape)}")
        self._A, self._D, self.ranks = A, D.detach().double(), A.ranks
        self._scale = self._D.rsqrt().to(A.device, A.dtype)[:, None]  # (n, 1)
        if not bool((torch.isfinite(self._scale) & (self._scale > 0)).all()):
            raise InputError(
                f"D must hold positive, finite numbers, and so must D^-1/2 in {A.dtype}; add a "
                "little to those that are 0"
            )

    @property
    def unit_roundoff(self) -> float:
        """That of the operator beneath."""
        return self._A.unit_roundoff

    @property
    def defect(self) -> float:
        """That of the operator beneath."""
        return self._A.defect

    def _matmat(self, V: Tensor) -> Tensor:
        return self._scale * self._A.matmat(self._scale * V)

    def check_symmetry(self) -> None:
        """Check the operator beneath."""
        self._A.check_symmetry()

    def _dense(self, progress: Progress | None, part: Part) -> Tensor:
        before = self._A.num_matvecs
        A = self._A._dense(progress, part).mul_(self._scale).mul_(self._scale.T)
        self.num_matvecs += self._A.num_matvecs - before
        return A

    def in_float64(self) -> SymmetricOperator:
        """The same with the operator beneath in float64."""
        beneath = self._A.in_float64()
        return self if beneath is self._A else PreconditionedOperator(beneath, self._D)

    def facts(self) -> PointFacts:
        """What is known of the operator beneath, but for the gradient, which is another here."""
        return replace(self._A.facts(), gradient_norm=None)

    def fingerprint(self) -> dict[str, str]:
        """That of the operator beneath, with the scaling."""
        return {**self._A.fingerprint(), "D": tensor_digest([self._D])}
