"""How many directions go down: the Morse index at a resolution, by the way that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.dense import require_tau
from hvpspec.linalg.operator import SymmetricOperator, as_operator
from hvpspec.linalg.probes import seeded
from hvpspec.progress import Progress, shown
from hvpspec.results import FORMER_NAMES
from hvpspec.spectrum.certified import Certified
from hvpspec.spectrum.exact import Exact, Inertia
from hvpspec.spectrum.matrix_free import Filtered, Quadrature
from hvpspec.spectrum.results import IndexResult

#: Up to this size "auto" assembles the matrix: seconds to minutes, and 72 MB.
AUTO_EXACT_UP_TO = 3000

Method: TypeAlias = Exact | Inertia | Certified | Quadrature | Filtered
MethodName = Literal["auto", "exact", "inertia", "certified", "quadrature", "filtered"]

#: The methods by name.
METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (Exact, Inertia, Certified, Quadrature, Filtered)
}


def index(
    A: SymmetricOperator | Tensor,
    tau: float | None = None,
    *,
    method: Method | MethodName = "auto",
    tau_ladder: Sequence[float] | None = None,
    side: Literal["negative", "positive"] = "negative",
    generator: torch.Generator | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
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
    their lower bound is that at ``tau`` plus the floor, and from above :class:`Certified` has the
    structural bound alone.

    Args:
        A: a symmetric operator, or a symmetric matrix of shape (n, n).
        tau: the resolution, in units of the eigenvalues, at least 0 (above 0 for matrix-free
            methods). None for the noise floor; matrix-free methods then also answer a ladder of
            decades that leads down to it.
        method: :class:`Exact`, :class:`Inertia`, :class:`Certified`, :class:`Quadrature` or
            :class:`Filtered`, with their options, or their names in lower case for the defaults.
            ``"auto"`` is exact up to size 3,000 and certified above.
        tau_ladder: further resolutions to answer in the same run.
        side: ``"positive"`` counts the eigenvalues above ``tau`` instead: the index of ``-A``.
        generator: the source of probes, where a method draws some; None for one with seed 0.
        progress: True for a bar; or called with the work done (columns or products) and the most
            there will be.
        options: of the method, where it is given by name: ``method="certified", confidence=0.9`` is
            short for ``method=Certified(confidence=0.9)``.

    Returns:
        The count or its interval at each resolution, with what else is known of the point.

    Raises:
        InputError: an argument is not allowed, or a matrix or basis does not fit into memory.
        TypeError: the method has no such option.
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64.

    Reference:
        Exact: Weyl's inequality and Sylvester's law of inertia (Horn & Johnson, Matrix Analysis,
        ch. 4). Certified: the page "The certificate" of the documentation.

    Example:
        >>> index(torch.diag(torch.tensor([3.0, 1e-12, -1e-12, -2.0])), tau=1e-6).index
        1
    """
    if side not in ("negative", "positive"):
        raise InputError(f"side must be 'negative' or 'positive', got {side!r}")
    operator = as_operator(A) if side == "negative" else -as_operator(A)
    chosen = settle_method(method, operator.shape[0], **options)
    asked = [*(tau_ladder or []), *([] if tau is None else [tau])]
    for value in asked:
        require_tau(value)
    taus = sorted(map(float, set(asked)), reverse=True) or None
    with shown(progress, "index") as report:
        return chosen.count(operator, taus, seeded(generator), report)


def settle_method(method: Method | str, n: int, **options: Any) -> Method:
    """The method that is meant, with its options, for an operator of size n.

    Raises:
        InputError: there is no such method, or an option is out of range.
        TypeError: the method has no such option.
    """
    if not isinstance(method, str):
        if options:  # they belong into the method itself
            made = ", ".join(f"{option}=..." for option in options)
            raise TypeError(
                f"index() takes no options beside a method; use {type(method).__name__}({made})"
            )
        return method
    method = FORMER_NAMES.get(method, method)
    if method == "auto":
        method = "exact" if n <= AUTO_EXACT_UP_TO else "certified"
    if method not in METHODS:
        known = ", ".join(["auto", *METHODS])
        raise InputError(f"method must be one of {known}, got {method!r}")
    return METHODS[method](**options)
