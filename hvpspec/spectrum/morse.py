"""How many directions go down: the Morse index at a resolution, by the way that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.dense import require_tau
from hvpspec.linalg.operator import Progress, SymmetricOperator, as_operator
from hvpspec.linalg.probes import require_count
from hvpspec.spectrum.exact import exact_index
from hvpspec.spectrum.matrix_free import (
    DEFAULT_PROBES,
    DEFAULT_STEPS,
    Effort,
    matrix_free_index,
)
from hvpspec.spectrum.results import IndexResult, Rung

#: Up to this size "auto" assembles the matrix: seconds to minutes, and 72 MB.
AUTO_EXACT_UP_TO = 3000

Method = Literal["auto", "exact", "ldl", "certified", "slq", "chebyshev"]


def index(
    A: SymmetricOperator | Tensor,
    tau: float | None = None,
    *,
    method: Method = "auto",
    tau_ladder: Sequence[float] | None = None,
    side: Literal["negative", "positive"] = "negative",
    confidence: float = 0.99,
    generator: torch.Generator | None = None,
    num_probes: int | None = None,
    num_steps: int | None = None,
    max_matvecs: int = 4000,
    progress: Progress | None = None,
    watch: Callable[[Rung], None] | None = None,
) -> IndexResult:
    """The Morse index: how many eigenvalues lie below ``-tau``.

    Signs of eigenvalues below the noise floor are round-off, so ``tau`` defaults to it and never to
    0. A count at such a ``tau`` is of the computed matrix, and at least as many eigenvalues of the
    true one are negative. At a smaller ``tau`` only an interval is certain, and ``index`` is None
    if it is not a point.

    The exact methods assemble the matrix in float64, whatever the dtype of the operator, where the
    operator can do that. Their noise floor is ``n u ||A||`` for LAPACK, with the unit round-off
    ``u`` of the products, plus the measured error of the assembly. The others see products alone,
    in the operator's dtype, and their noise floor is measured against float64 products. Below it
    their lower bound is that at ``tau`` plus the floor, and from above ``"certified"`` has the
    structural bound alone.

    Args:
        A: a symmetric operator, or a symmetric matrix of shape (n, n).
        tau: the resolution, in units of the eigenvalues, at least 0 (above 0 for matrix-free
            methods). None for the noise floor; matrix-free methods then also answer a ladder of
            decades that leads down to it.
        method: ``"exact"`` computes all eigenvalues; ``"ldl"`` only counts them, by LDL^T, in a
            fraction of the time once the matrix is there. ``"certified"`` is matrix-free: it
            harvests negative directions, which bound the count from below for certain, and bounds
            what is left from above with a confidence, until the two meet. ``"slq"`` is plain
            stochastic Lanczos quadrature with its exact interval; ``"chebyshev"`` a damped
            polynomial filter in the memory of a few vectors, with error bars that are no proof.
            ``"auto"`` is ``"exact"`` up to size 3,000 and ``"certified"`` above.
        tau_ladder: further resolutions to answer in the same run.
        side: ``"positive"`` counts the eigenvalues above ``tau`` instead: the index of ``-A``.
        confidence: of matrix-free intervals, for each tau.
        generator: the source of probes; None for one with seed 0.
        num_probes: probes that advance together; None for 1 (``"certified"``: fewest products) or
            10. More make better use of a pass over the data.
        num_steps: the most steps of a Krylov space, which is ``num_probes`` times that many vectors
            in memory, or of the recurrence; None for 1,000 (``"certified"``) or 100.
        max_matvecs: the most matrix-free products to spend, beside some 20 that measure the noise
            floor; at least ``num_probes`` for ``"slq"`` and ``"chebyshev"``.
        progress: called with the work done (columns or products) and the most there will be.
        watch: called with the interval that a certified count is working on.

    Returns:
        The count or its interval at each resolution, with what else is known of the point.

    Raises:
        InputError: an argument is not allowed, or a matrix or basis does not fit into memory.
        ComputationError: the products are not symmetric; or the norm is too large for float64, or
            for matrix-free methods so small or large that they cannot square it.

    Reference:
        Exact: Weyl's inequality and Sylvester's law of inertia (Horn & Johnson, Matrix Analysis,
        ch. 4). Certified: the page "The certificate" of the documentation.

    Example:
        >>> index(torch.diag(torch.tensor([3.0, 1e-12, -1e-12, -2.0])), tau=1e-6).index
        1
    """
    if method not in get_args(Method):
        raise InputError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if side not in ("negative", "positive"):
        raise InputError(f"side must be 'negative' or 'positive', got {side!r}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    operator = as_operator(A)
    if side == "positive":
        operator = -operator
    method = settle_method(method, operator.shape[0])
    taus = _descending(tau, tau_ladder, positive=method not in ("exact", "ldl"))
    if method in ("exact", "ldl"):
        return exact_index(operator, taus, method, progress)
    num_probes = DEFAULT_PROBES[method] if num_probes is None else num_probes
    num_steps = DEFAULT_STEPS[method] if num_steps is None else num_steps
    for name, value in (
        ("num_probes", num_probes),
        ("num_steps", num_steps),
        ("max_matvecs", max_matvecs),
    ):
        require_count(name, value)
    if method != "certified" and max_matvecs < num_probes:
        raise InputError(
            f"max_matvecs must be at least num_probes = {num_probes} for {method!r}, which takes "
            f"every step with all of them, got {max_matvecs}"
        )
    effort = Effort(
        confidence,
        generator or torch.Generator().manual_seed(0),
        num_probes,
        num_steps,
        max_matvecs,
        progress,
        watch,
    )
    return matrix_free_index(operator, taus, method, effort)


def settle_method(method: Method, n: int) -> Method:
    """What ``"auto"`` means for an operator of size n; any other method stands."""
    if method != "auto":
        return method
    return "exact" if n <= AUTO_EXACT_UP_TO else "certified"


def _descending(
    tau: float | None, ladder: Sequence[float] | None, *, positive: bool
) -> list[float] | None:
    """Put all resolutions asked for in descending order; None if none was."""
    taus = [*(ladder or []), *([] if tau is None else [tau])]
    for value in taus:
        require_tau(value)
        if positive and value == 0:
            raise InputError("tau must be above 0 for a matrix-free method, got 0.0")
    return sorted(map(float, set(taus)), reverse=True) or None
