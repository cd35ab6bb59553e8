"""Stochastic estimates of the trace, the Frobenius norm and the diagonal, with standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.linalg.probes import ProbeKind
from hvpspec.linalg.sampling import (
    DEFAULT_BUDGET,
    Run,
    hutchinson,
    hutchpp,
    leave_one_out,
    quadratic_form,
    root,
    square_length,
    unit_vectors,
)
from hvpspec.linalg.sketch import entries, xdiag, xtrace
from hvpspec.progress import Progress
from hvpspec.results import Result, Row, Subject

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]

_T = TypeVar("_T", float, Tensor)


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(Result, Generic[_T]):
    """A number, or a vector of them, estimated from random products.

    Attributes:
        value: the estimate: a float, or for a diagonal a float64 tensor of shape (n,).
        sem: its standard error, of the same shape; 0 where the value is exact up to round-off. It
            is itself estimated, from k samples to about ``1 / sqrt(2 (k - 1))`` of it; with two it
            may by chance be tiny, or 0, beside a wrong value.
        num_matvecs: matrix-vector products spent.
    """

    value: _T
    sem: _T
    num_matvecs: int

    def cells(self, method: str = "") -> tuple[str, str]:
        """The value with its standard error, and what it cost, by a method."""
        if isinstance(self.value, Tensor) or isinstance(self.sem, Tensor):
            return f"{len(self.value)} entries", f"{self.num_matvecs:,} products"
        if self.sem == 0:
            return f"{self.value:.8g}", f"exact, by {self.num_matvecs:,} products"
        cost = f"± standard error, {self.num_matvecs:,} products"
        return f"{self.value:.5g} ± {self.sem:.2g}", f"{cost} by {method}" if method else cost

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """The line of the table."""
        return [("estimate", *self.cells())]


def trace(
    A: SymmetricOperator | Tensor,
    num_matvecs: int | None = None,
    *,
    generator: torch.Generator | None = None,
    method: TraceMethod = "hutch++",
    kind: ProbeKind | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    block_size: int = 16,
    progress: Progress | bool | None = None,
) -> Estimate[float]:
    """Estimate the trace.

    ``"hutchinson"`` averages ``z^T A z`` in O(n) memory. The others take the trace of a low-rank
    part exactly and sample the remainder, which wins where the spectrum decays: ``"hutch++"`` parts
    its products between the two and keeps ``2 n num_matvecs / 3`` numbers; in ``"xtrace"`` each
    probe samples what all others leave, and ``3 n num_matvecs / 2`` numbers are kept, of which each
    of several processes has its share. XTrace is the
    most accurate. Its samples are exchangeable, not independent; the standard error counts their
    correlation, estimated from each sample's change when another probe is left out too. The squares
    of the standard errors are unbiased, but XTrace's is cut off from below at that of independent
    samples: in our tests it is too large by less than 20% where the spectrum decays slowly, by a
    factor of about 2 where it decays fast, and by more where it drops at the number of probes.

    Sampling stops once ``sem <= max(atol, rtol * max(|trace|, ||A||_F))``, the norm being estimated
    on the way. So ``rtol`` means the relative error for a semi-definite matrix, and is reached by
    Hutchinson's method in about ``2 / rtol**2`` products even where the trace is 0. A target that
    the budget does not reach shows in ``sem``.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        num_matvecs: most products to spend, at least 4 (2 for ``"hutchinson"``). From n on they buy
            the exact answer by n unit vectors, with ``sem = 0``, unless those beyond n reach a
            given target first. Of 4, ``"hutch++"`` and ``"xtrace"`` have two samples, from which
            ``sem`` says little. None is 100 or, with a target, what it takes (at most 2 n).
        generator: source of the probes; None for one with seed 0.
        method: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        kind: distribution of the probes. None is ``"rademacher"``, but for XTrace ``"sphere"``,
            which is normalised within the subspace that it samples (as is ``"gaussian"``).
        rtol: target for the standard error, relative.
        atol: target for the standard error, in units of the eigenvalues.
        block_size: vectors multiplied at once.
        progress: True for a bar; or called with the products done and the most there can be.

    Raises:
        InputError: the budget or memory is too small, a choice unknown or a target not positive.
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64.

    Reference:
        Hutchinson (1990); Meyer, Musco, Musco & Woodruff, Hutch++ (2021), Algorithm 1; Epperly,
        Tropp & Webber, XTrace (SIAM J. Matrix Anal. Appl. 45, 2024), normalised as in section 2.3.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, -1.0, 0.5]))
        >>> trace(A, generator=torch.Generator().manual_seed(0))
        Estimate(value=2.5, sem=0.0, num_matvecs=3)
    """
    _require_choice("method", method, get_args(TraceMethod))
    kind = kind or ("sphere" if method == "xtrace" else "rademacher")
    _require_choice("kind", kind, get_args(ProbeKind))
    minimum = 2 if method == "hutchinson" else 4
    run = Run(A, num_matvecs, minimum, generator, rtol, atol, block_size, progress)
    if method == "xtrace":
        steps = leave_one_out(run, kind, partial(xtrace, normalise=kind != "rademacher"))
    elif method == "hutch++":
        steps = hutchpp(run, kind, (num_matvecs or DEFAULT_BUDGET) // 3)
    else:
        steps = hutchinson(run, kind, quadratic_form)
    answer = run.stop(chain(steps, unit_vectors(run, quadratic_form)))
    return Estimate(float(answer.value), float(answer.sem), run.spent)


def frobenius_norm(
    A: SymmetricOperator | Tensor,
    num_matvecs: int | None = None,
    *,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    block_size: int = 16,
    progress: Progress | bool | None = None,
) -> Estimate[float]:
    """Estimate the Frobenius norm as the root of the mean of ``||A z||^2`` over Rademacher probes.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        num_matvecs: most products to spend, at least 2; see :func:`trace`.
        generator: source of the probes; None for one with seed 0.
        rtol: target for the standard error, relative to the norm.
        atol: target for the standard error, in units of the eigenvalues.
        block_size: vectors multiplied at once.
        progress: True for a bar; or called with the products done and the most there can be.

    Raises:
        InputError: the budget is too small or a target not positive.
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64.

    Example:
        >>> frobenius_norm(torch.eye(4), generator=torch.Generator().manual_seed(0))
        Estimate(value=2.0, sem=0.0, num_matvecs=4)
    """
    run = Run(A, num_matvecs, 2, generator, rtol, atol, block_size, progress)
    steps = chain(hutchinson(run, "rademacher", square_length), unit_vectors(run, square_length))
    answer = run.stop(map(root, steps))
    return Estimate(float(answer.value), float(answer.sem), run.spent)


def diagonal(
    A: SymmetricOperator | Tensor,
    num_matvecs: int | None = None,
    *,
    generator: torch.Generator | None = None,
    method: DiagonalMethod = "xdiag",
    rtol: float | None = None,
    atol: float | None = None,
    block_size: int = 16,
    progress: Progress | bool | None = None,
) -> Estimate[Tensor]:
    """Estimate the diagonal from Rademacher probes.

    ``"hutchinson"`` averages ``z * (A z)`` in O(n) memory. ``"xdiag"`` is to it what XTrace is to
    Hutchinson's trace, with the same kind of standard error for each entry; it keeps a few times
    ``n num_matvecs`` numbers. Sampling stops once ``||sem||_2 <= max(atol, rtol * ||A||_F)``.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        num_matvecs: most products to spend, at least 4 (2 for ``"hutchinson"``); see :func:`trace`.
        generator: source of the probes; None for one with seed 0.
        method: ``"hutchinson"`` or ``"xdiag"``.
        rtol: target for the 2-norm of the standard errors, relative to ``||A||_F``.
        atol: the same in units of the eigenvalues.
        block_size: vectors multiplied at once.
        progress: True for a bar; or called with the products done and the most there can be.

    Raises:
        InputError: the budget or memory is too small, a choice unknown or a target not positive.
        ComputationError: the products are not symmetric, or so small or large that their squares
            are no numbers in float64.

    Reference:
        Bekas, Kokiopoulou & Saad (2007); Epperly, Tropp & Webber (2024), XDiag.

    Example:
        >>> A = torch.tensor([[1.0, 5.0], [5.0, -2.0]])
        >>> diagonal(A, generator=torch.Generator().manual_seed(0)).value
        tensor([ 1., -2.], dtype=torch.float64)
    """
    _require_choice("method", method, get_args(DiagonalMethod))
    minimum = 2 if method == "hutchinson" else 4
    run = Run(A, num_matvecs, minimum, generator, rtol, atol, block_size, progress)
    if method == "xdiag":
        steps = leave_one_out(run, "rademacher", xdiag)
    else:
        steps = hutchinson(run, "rademacher", entries)
    answer = run.stop(chain(steps, unit_vectors(run, entries)))
    return Estimate(answer.value, answer.sem, run.spent)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
