"""What may be known of an operator beyond its products."""

from __future__ import annotations

from dataclasses import dataclass

from hvpspec.results import Result


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
