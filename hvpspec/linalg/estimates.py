"""Stochastic estimates of the trace, the Frobenius norm and the diagonal, with standard errors.

Each method yields its estimate after every block of products (`_Step`); questions differ only in
the integrand. A `_Run` holds what was asked for, and picks the step to stop at.
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
from hvpspec.linalg.operator import SymmetricOperator, as_operator, require_scale, unit_columns
from hvpspec.linalg.probes import ProbeKind, probes_for, seeded
from hvpspec.linalg.ranks import ALONE, Ranks
from hvpspec.linalg.tiles import largest_entry
from hvpspec.progress import Progress, shown
from hvpspec.results import Result, Row, Subject

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]

#: Products spent when neither a budget nor a target is given.
DEFAULT_BUDGET = 100
# Samples before a target may stop the sampling: a standard error from k samples is itself known to
# about 1 / sqrt(2 (k - 1)), 24% at 10, and the smallest of many looks at fewer would mislead.
_MIN_SAMPLES = 10
# Rows converted to float64 at once.
_STRIPE = 16384

#: V, AV (n, k) to samples (k,), or (n, k) for a diagonal.
_Form = Callable[[Tensor, Tensor], Tensor]
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
    probe samples what all others leave, and ``3 n num_matvecs / 2`` numbers are kept. Of several
    processes each keeps its share.

    XTrace is the most accurate. Its samples are exchangeable, not independent; the standard error
    counts their correlation. Its square is unbiased, but for XTrace cut off from below at that of
    independent samples: in our tests it is too large by less than 20% where the spectrum decays
    slowly, by a factor of about 2 where it decays fast, and by more where it drops at the number of
    probes.

    Sampling stops once ``sem <= max(atol, rtol * max(|trace|, ||A||_F))``, the norm being estimated
    on the way. So ``rtol`` means the relative error for a semi-definite matrix, and is reached by
    Hutchinson's method in about ``2 / rtol**2`` products even where the trace is 0. A target that
    the budget does not reach shows in ``sem``.

    Args:
        A: an operator, or a symmetric matrix of shape (n, n).
        num_matvecs: most products to spend, at least 4 (2 for ``"hutchinson"``). From n on they buy
            the exact answer by n unit vectors, with ``sem = 0``, unless those beyond n reach a
            given target first. None is 100 or, with a target, what it takes (at most 2 n).
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
    run = _Run(A, num_matvecs, minimum, generator, rtol, atol, block_size, progress)
    if method == "xtrace":
        steps = _leave_one_out(run, kind, partial(_xtrace, normalise=kind != "rademacher"))
    elif method == "hutch++":
        steps = _hutchpp(run, kind, (num_matvecs or DEFAULT_BUDGET) // 3)
    else:
        steps = _hutchinson(run, kind, _quadratic_form)
    answer = run.stop(chain(steps, _unit_vectors(run, _quadratic_form)))
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

    Arguments and errors are those of :func:`trace`; at least 2 products are spent, and ``rtol`` is
    relative to the norm.

    Example:
        >>> frobenius_norm(torch.eye(4), generator=torch.Generator().manual_seed(0))
        Estimate(value=2.0, sem=0.0, num_matvecs=4)
    """
    run = _Run(A, num_matvecs, 2, generator, rtol, atol, block_size, progress)
    steps = _hutchinson(run, "rademacher", _square_length)
    answer = run.stop(map(_root, chain(steps, _unit_vectors(run, _square_length))))
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
    ``n num_matvecs`` numbers. Sampling stops once ``||sem||_2 <= max(atol, rtol * ||A||_F)``. All
    other arguments, and errors, are those of :func:`trace`.

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
        steps = _leave_one_out(run, "rademacher", _xdiag)
    else:
        steps = _hutchinson(run, "rademacher", _entries)
    answer = run.stop(chain(steps, _unit_vectors(run, _entries)))
    return Estimate(answer.value, answer.sem, run.spent)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


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
        generator: torch.Generator | None,
        rtol: float | None,
        atol: float | None,
        block_size: int,
        progress: Progress | bool | None,
    ) -> None:
        for name, target in (("rtol", rtol), ("atol", atol)):
            if target is not None and not (math.isfinite(target) and target > 0):
                raise InputError(f"{name} must be positive and finite, or None, got {target}")
        if block_size < 1:
            raise InputError(f"block_size must be at least 1, got {block_size}")
        self.A = as_operator(A)
        self.scale = 0.0
        self.n, self.start = self.A.shape[0], self.A.num_matvecs
        self.ranks, self.own = self.A.ranks, self.A.ranks.share(self.n)
        self.rtol, self.atol = rtol or 0.0, atol or 0.0
        self.has_target = rtol is not None or atol is not None
        self.generator, self.block_size = seeded(generator), block_size
        self.wanted: Progress | bool | None = progress
        self.progress: Progress | None = None
        if num_matvecs is None:
            num_matvecs = 2 * self.n if self.has_target else DEFAULT_BUDGET
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
        self.most = self.sampling + self.n * self.exact
        self.A.expect(self.most, block_size)

    @property
    def spent(self) -> int:
        """Products done."""
        return self.A.num_matvecs - self.start

    def draw(self, kind: ProbeKind, most: int, Q: Tensor | None = None) -> Tensor:
        """Draw a block of probes, at most so many, orthogonal to the shared columns of Q."""
        shared = None if Q is None else Q.mT
        return probes_for(self.A, kind, min(most, self.block_size), self.generator, shared)

    def multiply(self, V: Tensor) -> Tensor:
        """Return ``A V`` and report progress."""
        if V.shape[1] == 0:
            return V
        if self.spent == 0:
            self.A.check_symmetry()
        AV = self.A.matmat(V)
        self.scale = max(self.scale, float(largest_entry(AV)))
        if self.scale > 1:  # too small is known at the end
            require_scale(self.scale, self.A.dtype)
        if self.progress is not None:
            self.progress(self.spent, self.most)
        return AV

    def stop(self, steps: Iterator[_Step]) -> _Step:
        """Return the first step that meets the target, or else the last."""
        with shown(self.wanted, "products") as self.progress:
            for step in steps:
                error, value = (float(torch.linalg.vector_norm(x)) for x in (step.sem, step.value))
                goal = max(self.atol, self.rtol * max(value, math.sqrt(step.square_norm)))
                if self.has_target and step.num_samples >= _MIN_SAMPLES and error <= goal:
                    break
        require_scale(self.scale, self.A.dtype)
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
        square_norm += float(_square_length(V, AV).sum())
        count += k
        if count >= 2:
            yield _Step(mean, (M2 / (count - 1) / count).sqrt(), square_norm / count, count)


def _unit_vectors(run: _Run, form: _Form) -> Iterator[_Step]:
    """Sum ``form`` over the unit vectors, where the budget allows: the exact answer."""
    total = torch.zeros((), dtype=torch.float64, device=run.A.device)
    for first in range(0, run.n if run.exact else 0, run.block_size):
        unit = unit_columns(run.A, range(first, min(first + run.block_size, run.n)))
        total = total + form(unit, run.multiply(unit)).sum(-1)
    if run.exact:
        yield _Step(total, torch.zeros_like(total), 0.0, run.n)


class _Sketch:
    """The range of ``A Omega`` for probes Omega: ``A Omega = Q C`` with ``Z = A Q``.

    Shapes: Omega (n, m); Q, with orthonormal columns, and Z (n, r); C (r, m), float64. Of several
    processes each has its share of the rows of the first three.
    """

    def __init__(self, run: _Run) -> None:
        A, self.run, self.n, self.ranks = run.A, run, run.n, run.ranks
        empty = torch.empty(self.ranks.share_size(run.n), 0, dtype=A.dtype, device=A.device)
        self.Omega = self.Q = self.Z = empty
        self.C = torch.empty(0, 0, dtype=torch.float64, device=A.device)

    @property
    def size(self) -> int:
        """Number of probes m."""
        return self.C.shape[1]

    def require_room(self, num_columns: int) -> None:
        """Raise InputError unless so many vectors fit into memory."""
        size = num_columns * len(self.Q) * self.Q.dtype.itemsize
        require_memory(size, "the sketch (method='hutchinson' has none)", self.Q.device)

    def add(self, W: Tensor) -> None:
        """Grow Q by the range of ``A W`` for more probes."""
        run, ranks, Q, C = self.run, self.ranks, self.Q, self.C
        Y = run.multiply(W)
        norm = max(float(torch.linalg.vector_norm(X, dtype=torch.float64)) for X in (Y, C))
        Y = Y[run.own]
        B = _inner(Q, Y, ranks)
        P, R = _qr(Y - Q @ B.to(Y.dtype), ranks)
        # Directions below the products' round-off are dropped; those just above it do no harm.
        U, sigma, Vh = torch.linalg.svd(R.double())
        keep = sigma > 10 * run.A.unit_roundoff * norm
        P, R = P @ U[:, keep].to(Y.dtype), sigma[keep, None] * Vh[keep]
        # The second pass of Gram-Schmidt, without which a short R would leave P along Q.
        correction = _inner(Q, P, ranks)
        P, factor = _qr(P - Q @ correction.to(Y.dtype), ranks)
        B, R = B + correction @ R, factor.double() @ R
        self.C = torch.cat([torch.nn.functional.pad(C, (0, 0, 0, len(R))), torch.cat([B, R])], 1)
        AP = run.multiply(ranks.whole(P.mT, self.n).mT)[run.own]
        self.Q, self.Z = torch.cat([Q, P], 1), torch.cat([self.Z, AP], 1)


def _hutchpp(run: _Run, kind: ProbeKind, rank: int) -> Iterator[_Step]:
    """Add the trace on a sketch to Hutchinson's average on its complement."""
    # A third of the products each for A Omega, for A Q and for the average, as in Algorithm 1 of
    # Meyer et al.
    rank = min(rank, run.sampling // 3)
    sketch = _Sketch(run)
    sketch.require_room(2 * rank)
    while sketch.size < rank:
        sketch.add(run.draw(kind, rank - sketch.size))
    Q, Z = sketch.Q, sketch.Z
    low_rank = _inner(Q, Z, run.ranks).trace()
    square_norm = float(_inner(Z, Z, run.ranks).trace())
    for mean, sem, rest, count in _hutchinson(run, kind, _quadratic_form, Q):
        # ||A||_F^2 = ||A Q||_F^2 + ||A (I - Q Q^T)||_F^2
        yield _Step(low_rank + mean, sem, square_norm + rest, count)


def _leave_one_out(
    run: _Run, kind: ProbeKind, estimate: Callable[[_Sketch], tuple[Tensor, Tensor]]
) -> Iterator[_Step]:
    """Average over probes, each left out in turn of the sketch that all of them make."""
    num_probes, sketch = run.sampling // 2, _Sketch(run)  # two products each: A Omega and A Q
    while sketch.size < num_probes:
        W = run.draw(kind, num_probes - sketch.size)
        planned = sketch.size + W.shape[1] if run.has_target else num_probes
        sketch.require_room(3 * planned - 2 * sketch.size)  # appending copies one of the three
        sketch.add(W)
        sketch.Omega, m = torch.cat([sketch.Omega, W[run.own]], 1), sketch.size
        if m == num_probes or (run.has_target and m >= _MIN_SAMPLES):
            yield _Step(*estimate(sketch), float(sketch.C.square().sum()) / m, m)


# Leave-one-out estimates. Sample ``x_i`` tests with probe i what the sketch by all others leaves.
# ``d_ij`` is its change by probe j: ``x_i`` less what it would be had j been left out of the sketch
# as well.


def _left_out(C: Tensor) -> Tensor:
    """The unit vectors s_i (r, m) that range(C) loses without column i; 0 where it loses none.

    Without probe i the projection ``Q Q^T`` becomes ``Q (I - s_i s_i^T) Q^T``. If C is square,
    ``s_i`` is along column i of ``C^-T``; in general column i matters if e_i is in the row space.
    """
    if len(C) == 0:
        return C
    U, sigma, Vh = torch.linalg.svd(C, full_matrices=False)
    eps = torch.finfo(torch.float64).eps
    S = U @ (Vh * (sigma[-1] / sigma.clamp_min(eps * float(sigma[0])))[:, None])
    matters = Vh.square().sum(0) > 1 - 10 * C.shape[1] * eps
    return torch.where(matters, S / torch.linalg.vector_norm(S, dim=0), 0.0)


def _xtrace(sketch: _Sketch, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """The mean of the samples ``x_i = tr(Q_i^T A Q_i) + v_i^T A v_i``, and its standard error.

    Here ``v_i = (I - Q_i Q_i^T) omega_i``, and Q_i is a basis of the sketch without probe i.
    """
    Omega, Q, Z, ranks = sketch.Omega, sketch.Q, sketch.Z, sketch.ranks
    S = _left_out(sketch.C)
    G, p = _pairs(S)
    H, W = _inner(Q, Z, ranks), _inner(Q, Omega, ranks)
    F = sketch.C - H @ W  # Q^T A (I - Q Q^T) Omega
    K, M, N = S.mT @ H @ S, S.mT @ W, S.mT @ F
    k, mu, nu = (X.diagonal()[:, None] for X in (K, M, N))
    # v_i = (I - Q Q^T) omega_i + mu_i Q s_i. Without probe j it grows by (t^T w_i) Q t, t = t_ij.
    # Row i and column j of tW is t^T w_i, of tF t^T f_i, of tHs t^T H s_i.
    tW, tF, tHs = (p * (X.mT - G * X.diagonal()[:, None]) for X in (M, N, K))
    tHt = p * (p * (k.mT - G * K) - G * tHs)
    form = mu.square() * k + 2 * mu * nu - (W * F).sum(0)[:, None]
    form_without = form + tW.square() * tHt + 2 * tW * (tF + mu * tHs)
    if normalise:
        matters = S.any(0).double()
        dim = sketch.n - Q.shape[1] + matters[:, None]
        squares = torch.linalg.vector_norm(Omega, dim=0, dtype=torch.float64).square()
        square = (ranks.sum_(squares) - W.square().sum(0))[:, None] + mu.square()
        form = form * dim / square
        form_without = form_without * (dim + matters * (p > 0)) / (square + tW.square())
    samples = (H.trace() - k + form)[:, 0]
    change = tHt + form - form_without
    return samples.mean(), _standard_error(samples, (change * change.mT).sum())


def _xdiag(sketch: _Sketch) -> tuple[Tensor, Tensor]:
    """The mean of the samples ``diag(Q_i Q_i^T A) + omega_i * (I - Q_i Q_i^T) A omega_i``, (n,).

    The second result is its standard error (n,).
    """
    Omega, Q, Z = sketch.Omega, sketch.Q, sketch.Z
    S = _left_out(sketch.C)
    G, p = _pairs(S)
    c = (S * sketch.C).sum(0)
    values, errors = [], []
    for rows in _stripes(Q):
        x, z = Q[rows].double() @ S, Z[rows].double() @ S
        # A omega_i = Q c_i, of which Q_i misses the part along Q s_i.
        y = Omega[rows].double() * c - z
        samples = _entries(Q[rows], Z[rows]).sum(1, keepdim=True) + x * y
        values.append(samples.mean(1))
        errors.append(_standard_error(samples, _changes(x, y, z, G, p)))
    shares = torch.stack([torch.cat(values), torch.cat(errors)])
    value, error = sketch.ranks.whole(shares, sketch.n)
    return value, error


def _changes(x: Tensor, y: Tensor, z: Tensor, G: Tensor, p: Tensor) -> Tensor:
    """The sum over i and j, for each row, of ``d_ij d_ji`` (rows,).

    This is ``d_ij = p_ij^2 (x_j - g_ij x_i) (z_j + g_ij y_i)``, multiplied out for the sake of
    matrix products, and what is equal by symmetry put together.
    """
    w = p**4
    even, odd = w * (1 + G**2), -2 * w * G
    products = (
        (x * z, even, x * z),
        (x * z * y, 2 * even * G, x),
        (x * y, even * G**2, x * y),
        (x * x * z, odd, z),
        (x * x, odd * G, z * y),
        (x * x * y, odd * G**2, y),
        (x * x * z * y, odd * G, torch.ones_like(x)),
    )
    return torch.stack([((left @ B) * right).sum(1) for left, B, right in products]).sum(0)


def _pairs(S: Tensor) -> tuple[Tensor, Tensor]:
    """``G = S^T S`` and p, both (m, m), so that ``t_ij = p_ij (s_j - g_ij s_i)`` is a unit vector.

    It is what range(C) loses without column j once it has lost s_i, or 0 if there is no more to
    lose. (Two probes neither of which matters may do so together. But then, as a rule, the rank of
    A is less than m and the estimate exact; taking t_ij as 0 makes its standard error 0.)
    """
    G = S.mT @ S
    rest = 1 - G.square()
    # Round-off is magnified by 1 / rest. Where half the digits are lost, s_i and s_j are parallel.
    parallel = rest < torch.finfo(torch.float64).eps ** 0.5
    return G, torch.where(parallel, 0.0, rest.rsqrt())


def _standard_error(samples: Tensor, changes: Tensor) -> Tensor:
    """The root of ``var(x) / m + max(c, 0)`` from m samples and the sum of ``d_ij d_ji``, i != j.

    The variance of the mean is the expectation of ``var(x) / m + c`` for ``c = mean(d_ij d_ji)``,
    which is ``cov(x_i, x_j)`` in expectation: whatever the other probes are, x_i has the right mean
    over probe i, and so has ``x_i - d_ij``. The latter does not depend on probe j, hence is
    uncorrelated with x_j and with ``x_j - d_ji``. A negative c is noise; without it the square is
    biased upwards, and no less than if the samples were independent.
    """
    m = samples.shape[-1]
    return (samples.var(-1) / m + changes.clamp_min(0) / (m * (m - 1))).sqrt()


def _entries(V: Tensor, AV: Tensor) -> Tensor:
    """``v * (A v)`` (n, k)."""
    return V.double() * AV.double()


def _inner(X: Tensor, Y: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """``X^T Y`` in float64, converted a stripe at a time."""
    products = [X[rows].double().mT @ Y[rows].double() for rows in _stripes(X)]
    return ranks.sum_(torch.stack(products).sum(0))


def _qr(X: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """``X = Q R`` with orthonormal columns of Q, by a second QR of all processes' factors R.

    Reference:
        Demmel, Grigori, Hoemmen & Langou, Communication-optimal parallel and sequential QR (2012).
    """
    Q, R = torch.linalg.qr(X)
    if ranks.size == 1:
        return Q, R
    factors = ranks.gather(R)
    together, R = torch.linalg.qr(torch.cat(factors))
    start = sum(len(factor) for factor in factors[: ranks.rank])
    return Q @ together[start : start + Q.shape[1]], R


def _stripes(X: Tensor) -> list[slice]:
    """The rows of X in order, so many at a time; one that is empty where there are none."""
    return [slice(i, i + _STRIPE) for i in range(0, max(1, len(X)), _STRIPE)]


def _quadratic_form(V: Tensor, AV: Tensor) -> Tensor:
    """``v^T A v`` (k,)."""
    return _entries(V, AV).sum(0)


def _square_length(V: Tensor, AV: Tensor) -> Tensor:
    """``||A v||^2`` (k,)."""
    return AV.double().square().sum(0)


def _root(step: _Step) -> _Step:
    """Turn an estimate of ``||A||_F^2`` into one of the norm, by the delta method."""
    root = step.value.sqrt()
    return step._replace(value=root, sem=torch.where(root > 0, step.sem / (2 * root), 0.0))
