"""Stochastic estimates of the trace, the Frobenius norm and the diagonal, with standard errors.

Each method yields its estimate after every block of products (`_Step`); the three questions differ
only in the integrand. A `_Run` holds what was asked for, and picks the step to stop at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.operator import Progress, SymmetricOperator, as_operator
from hvpspec.linalg.probes import ProbeKind, draw_probes
from hvpspec.linalg.sketch import entries, inner, xdiag, xtrace

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]

#: Products spent when neither a budget nor a target is given.
_DEFAULT_BUDGET = 100
#: Samples before a target may stop the sampling: a standard error from k samples is itself known to
#: about 1 / sqrt(2 (k - 1)), 24% at 10, and the smallest of many looks at fewer would mislead.
_MIN_SAMPLES = 10

_T = TypeVar("_T", float, Tensor)
#: V, AV (n, k) to samples (k,), or (n, k) for a diagonal.
_Form = Callable[[Tensor, Tensor], Tensor]
#: Omega (n, m), Q and Z (n, r), C (r, m) to an estimate and its standard error, () or (n,).
_LeaveOneOut = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimate(Generic[_T]):
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


def trace(
    A: SymmetricOperator | Tensor,
    num_matvecs: int | None = None,
    *,
    generator: torch.Generator,
    method: TraceMethod = "hutch++",
    kind: ProbeKind | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    block_size: int = 16,
    progress: Progress | None = None,
) -> Estimate[float]:
    """Estimate the trace.

    ``"hutchinson"`` averages ``z^T A z`` in O(n) memory. The others take the trace of a low-rank
    part exactly and sample the remainder, which wins where the spectrum decays: ``"hutch++"`` parts
    its products between the two and keeps ``2 n num_matvecs / 3`` numbers; in ``"xtrace"`` each
    probe samples what all others leave, and ``3 n num_matvecs / 2`` numbers are kept. XTrace is the
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
        generator: source of the probes.
        method: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        kind: distribution of the probes. None is ``"rademacher"``, but for XTrace ``"sphere"``,
            which is normalised within the subspace that it samples (as is ``"gaussian"``).
        rtol: target for the standard error, relative.
        atol: target for the standard error, in units of the eigenvalues.
        block_size: vectors multiplied at once.
        progress: called with the products done and the most there can be.

    Raises:
        InputError: the budget or memory is too small, a choice unknown or a target not positive.

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
    run = _Run(A, num_matvecs, minimum, generator, rtol, atol, block_size, progress)
    if method == "xtrace":
        steps = _leave_one_out(run, kind, partial(xtrace, normalise=kind != "rademacher"))
    elif method == "hutch++":
        steps = _hutchpp(run, kind, (num_matvecs or _DEFAULT_BUDGET) // 3)
    else:
        steps = _hutchinson(run, kind, _quadratic_form)
    answer = run.stop(chain(steps, _unit_vectors(run, _quadratic_form)))
    return Estimate(float(answer.value), float(answer.sem), run.spent)


def frobenius_norm(
    A: SymmetricOperator | Tensor,
    num_matvecs: int | None = None,
    *,
    generator: torch.Generator,
    rtol: float | None = None,
    atol: float | None = None,
    block_size: int = 16,
    progress: Progress | None = None,
) -> Estimate[float]:
    """Estimate the Frobenius norm as the root of the mean of ``||A z||^2`` over Rademacher probes.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        num_matvecs: most products to spend, at least 2; see :func:`trace`.
        generator: source of the probes.
        rtol: target for the standard error, relative to the norm.
        atol: target for the standard error, in units of the eigenvalues.
        block_size: vectors multiplied at once.
        progress: called with the products done and the most there can be.

    Raises:
        InputError: the budget is too small or a target not positive.

    Example:
        >>> frobenius_norm(torch.eye(4), generator=torch.Generator().manual_seed(0))
        Estimate(value=2.0, sem=0.0, num_matvecs=4)
    """
    run = _Run(A, num_matvecs, 2, generator, rtol, atol, block_size, progress)
    steps = chain(_hutchinson(run, "rademacher", _square_norm), _unit_vectors(run, _square_norm))
    answer = run.stop(map(_root, steps))
    return Estimate(float(answer.value), float(answer.sem), run.spent)


def diagonal(
    A: SymmetricOperator | Tensor,
    num_matvecs: int | None = None,
    *,
    generator: torch.Generator,
    method: DiagonalMethod = "xdiag",
    rtol: float | None = None,
    atol: float | None = None,
    block_size: int = 16,
    progress: Progress | None = None,
) -> Estimate[Tensor]:
    """Estimate the diagonal from Rademacher probes.

    ``"hutchinson"`` averages ``z * (A z)`` in O(n) memory. ``"xdiag"`` is to it what XTrace is to
    Hutchinson's trace, with the same kind of standard error for each entry; it keeps a few times
    ``n num_matvecs`` numbers. Sampling stops once ``||sem||_2 <= max(atol, rtol * ||A||_F)``.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        num_matvecs: most products to spend, at least 4 (2 for ``"hutchinson"``); see :func:`trace`.
        generator: source of the probes.
        method: ``"hutchinson"`` or ``"xdiag"``.
        rtol: target for the 2-norm of the standard errors, relative to ``||A||_F``.
        atol: the same in units of the eigenvalues.
        block_size: vectors multiplied at once.
        progress: called with the products done and the most there can be.

    Raises:
        InputError: the budget or memory is too small, a choice unknown or a target not positive.

    Reference:
        Bekas, Kokiopoulou & Saad (2007); Epperly, Tropp & Webber (2024), XDiag.

    Example:
        >>> A = torch.tensor([[1.0, 5.0], [5.0, -2.0]])
        >>> diagonal(A, generator=torch.Generator().manual_seed(0)).value
        tensor([ 1., -2.], dtype=torch.float64)
    """
    _require_choice("method", method, get_args(DiagonalMethod))
    minimum = 2 if method == "hutchinson" else 4
    run = _Run(A, num_matvecs, minimum, generator, rtol, atol, block_size, progress)
    if method == "xdiag":
        steps = _leave_one_out(run, "rademacher", xdiag)
    else:
        steps = _hutchinson(run, "rademacher", entries)
    answer = run.stop(chain(steps, _unit_vectors(run, entries)))
    return Estimate(answer.value, answer.sem, run.spent)


class _Step(NamedTuple):
    """Where an estimate stands after some products."""

    value: Tensor
    sem: Tensor
    square_norm: float  # estimate of ||A||_F^2
    num_samples: int


class _Run:
    """A checked request: what to multiply, how much, and when to stop."""

    def __init__(
        self,
        A: SymmetricOperator | Tensor,
        num_matvecs: int | None,
        minimum: int,
        generator: torch.Generator,
        rtol: float | None,
        atol: float | None,
        block_size: int,
        progress: Progress | None,
    ) -> None:
        for name, target in (("rtol", rtol), ("atol", atol)):
            if target is not None and not (math.isfinite(target) and target > 0):
                raise InputError(f"{name} must be positive and finite, or None, got {target}")
        if block_size < 1:
            raise InputError(f"block_size must be at least 1, got {block_size}")
        self.A = as_operator(A)
        self.n, self.start = self.A.shape[0], self.A.num_matvecs
        self.rtol, self.atol = rtol or 0.0, atol or 0.0
        self.has_target = rtol is not None or atol is not None
        self.generator, self.block_size, self.progress = generator, block_size, progress
        if num_matvecs is None:
            num_matvecs = 2 * self.n if self.has_target else _DEFAULT_BUDGET
        if num_matvecs < min(minimum, self.n):
            raise InputError(
                f"num_matvecs must be at least {minimum}, or n = {self.n} for the exact answer, "
                f"got {num_matvecs}"
            )
        self.exact = num_matvecs >= self.n
        self.sampling = num_matvecs
        if self.exact:  # n products are set aside, and without a target nothing else is needed
            self.sampling = min(num_matvecs - self.n, self.n) if self.has_target else 0
            if self.sampling < minimum // 2 * _MIN_SAMPLES:
                self.sampling = 0  # too few samples for a target to stop at

    @property
    def spent(self) -> int:
        """Products done."""
        return self.A.num_matvecs - self.start

    def draw(self, kind: ProbeKind, most: int, Q: Tensor | None = None) -> Tensor:
        """Draw a block of probes, at most so many, orthogonal to the columns of Q."""
        A, k, rows = self.A, min(most, self.block_size), None if Q is None else Q.mT
        return draw_probes(
            kind, self.n, k, self.generator, dtype=A.dtype, device=A.device, orthogonal_to=rows
        )

    def multiply(self, V: Tensor) -> Tensor:
        """Return ``A V`` and report progress."""
        if V.shape[1] == 0:
            return V
        AV = self.A.matmat(V)
        if self.progress is not None:
            self.progress(self.spent, self.sampling + self.n * self.exact)
        return AV

    def stop(self, steps: Iterator[_Step]) -> _Step:
        """Return the first step that meets the target, or else the last."""
        for step in steps:
            error, value = (float(torch.linalg.vector_norm(x)) for x in (step.sem, step.value))
            goal = max(self.atol, self.rtol * max(value, math.sqrt(step.square_norm)))
            if self.has_target and step.num_samples >= _MIN_SAMPLES and error <= goal:
                break
        return step


def _hutchinson(
    run: _Run, kind: ProbeKind, form: _Form, Q: Tensor | None = None
) -> Iterator[_Step]:
    """Average ``form`` over probes orthogonal to Q, merging mean and variance block by block."""
    count, square_norm = 0, 0.0
    mean = M2 = torch.zeros((), dtype=torch.float64, device=run.A.device)
    while run.spent < run.sampling:
        V = run.draw(kind, run.sampling - run.spent, Q)
        AV = run.multiply(V)
        samples, k = form(V, AV), V.shape[1]
        shift = samples.mean(-1) - mean
        mean = mean + shift * (k / (count + k))
        M2 = M2 + k * samples.var(-1, correction=0) + shift.square() * (count * k / (count + k))
        square_norm += float(_square_norm(V, AV).sum())
        count += k
        if count >= 2:
            yield _Step(mean, (M2 / (count - 1) / count).sqrt(), square_norm / count, count)


def _unit_vectors(run: _Run, form: _Form) -> Iterator[_Step]:
    """Sum ``form`` over the unit vectors, where the budget allows: the exact answer."""
    total = torch.zeros((), dtype=torch.float64, device=run.A.device)
    for first in range(0, run.n if run.exact else 0, run.block_size):
        rows = range(first, min(first + run.block_size, run.n))
        unit = torch.zeros(run.n, len(rows), dtype=run.A.dtype, device=run.A.device)
        unit[rows, range(len(rows))] = 1
        total = total + form(unit, run.multiply(unit)).sum(-1)
    if run.exact:
        yield _Step(total, torch.zeros_like(total), 0.0, run.n)


def _hutchpp(run: _Run, kind: ProbeKind, rank: int) -> Iterator[_Step]:
    """Add the trace on a sketch to Hutchinson's average on its complement."""
    rank = min(rank, run.sampling // 3)
    _require_room(run, 2 * rank)
    Q, Z, C = _empty_sketch(run)
    while C.shape[1] < rank:
        Q, Z, C = _extend(run, Q, Z, C, run.draw(kind, rank - C.shape[1]))
    low_rank, square_norm = inner(Q, Z).trace(), float(inner(Z, Z).trace())
    for mean, sem, rest, count in _hutchinson(run, kind, _quadratic_form, Q):
        # ||A||_F^2 = ||A Q||_F^2 + ||A (I - Q Q^T)||_F^2
        yield _Step(low_rank + mean, sem, square_norm + rest, count)


def _leave_one_out(run: _Run, kind: ProbeKind, form: _LeaveOneOut) -> Iterator[_Step]:
    """Average ``form`` over probes, each left out in turn of the sketch that all of them make."""
    num_probes, m = run.sampling // 2, 0
    Q, Z, C = _empty_sketch(run)
    Omega = Q
    while m < num_probes:
        W = run.draw(kind, num_probes - m)
        planned = m + W.shape[1] if run.has_target else num_probes
        _require_room(run, 3 * (planned - m) + m)  # appending copies one of the three
        Q, Z, C = _extend(run, Q, Z, C, W)
        Omega, m = torch.cat([Omega, W], 1), m + W.shape[1]
        if m == num_probes or (run.has_target and m >= _MIN_SAMPLES):
            yield _Step(*form(Omega, Q, Z, C), float(C.square().sum()) / m, m)


def _extend(run: _Run, Q: Tensor, Z: Tensor, C: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grow an orthonormal Q by the range of ``A W``, with ``Z = A Q`` and ``A [... W] = Q C``."""
    Y = run.multiply(W)
    norm = max(float(torch.linalg.vector_norm(X, dtype=torch.float64)) for X in (Y, C))
    B = inner(Q, Y)
    P, R = torch.linalg.qr(Y - Q @ B.to(Y.dtype))
    # Directions below the products' round-off are dropped; those just above it do no harm.
    U, sigma, Vh = torch.linalg.svd(R.double())
    keep = sigma > 10 * run.A.unit_roundoff * norm
    P, R = P @ U[:, keep].to(Y.dtype), sigma[keep, None] * Vh[keep]
    correction = inner(Q, P)  # the second pass of Gram-Schmidt
    P, factor = torch.linalg.qr(P - Q @ correction.to(Y.dtype))
    B, R = B + correction @ R, factor.double() @ R
    C = torch.cat([torch.nn.functional.pad(C, (0, 0, 0, len(R))), torch.cat([B, R])], 1)
    return torch.cat([Q, P], 1), torch.cat([Z, run.multiply(P)], 1), C


def _quadratic_form(V: Tensor, AV: Tensor) -> Tensor:
    """``v^T A v`` (k,)."""
    return entries(V, AV).sum(0)


def _square_norm(V: Tensor, AV: Tensor) -> Tensor:
    """``||A v||^2`` (k,)."""
    return AV.double().square().sum(0)


def _root(step: _Step) -> _Step:
    """Turn an estimate of ``||A||_F^2`` into one of the norm, by the delta method."""
    root = step.value.sqrt()
    return step._replace(value=root, sem=torch.where(root > 0, step.sem / (2 * root), 0.0))


def _empty_sketch(run: _Run) -> tuple[Tensor, Tensor, Tensor]:
    """Q and Z (n, 0), C (0, 0)."""
    Q = torch.empty(run.n, 0, dtype=run.A.dtype, device=run.A.device)
    return Q, Q, torch.empty(0, 0, dtype=torch.float64, device=run.A.device)


def _require_room(run: _Run, num_columns: int) -> None:
    """Raise InputError unless so many vectors fit into memory."""
    size = num_columns * run.n * run.A.dtype.itemsize
    require_memory(size, "the sketch (method='hutchinson' has none)", run.A.device)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
