"""Sampling an operator by random products, step by step, until a budget or a target is met.

Each method yields its estimate after every block of products (`Step`); questions differ only in the
integrand. A `Run` holds what was asked for, and picks the step to stop at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.krylov import require_scale
from hvpspec.linalg.memory import require_memory
from hvpspec.linalg.operator import SymmetricOperator, as_operator, unit_columns
from hvpspec.linalg.probes import ProbeKind, draw_probes, seeded
from hvpspec.linalg.ranks import Ranks
from hvpspec.linalg.sketch import entries, inner, qr
from hvpspec.linalg.tiles import largest_entry
from hvpspec.progress import Progress, shown

#: Products spent when neither a budget nor a target is given.
DEFAULT_BUDGET = 100
#: Samples before a target may stop the sampling: a standard error from k samples is itself known to
#: about 1 / sqrt(2 (k - 1)), 24% at 10, and the smallest of many looks at fewer would mislead.
_MIN_SAMPLES = 10


#: V, AV (n, k) to samples (k,), or (n, k) for a diagonal.
Form = Callable[[Tensor, Tensor], Tensor]
#: n, the processes, and their shares of Omega (n, m), Q and Z (n, r), with C (r, m), to an estimate
#: and its standard error, () or (n,).
LeaveOneOut = Callable[[int, Ranks, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """Where an estimate stands after some products."""

    value: Tensor
    sem: Tensor
    square_norm: float  # estimate of ||A||_F^2
    num_samples: int


class Run:
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

    @property
    def spent(self) -> int:
        """Products done."""
        return self.A.num_matvecs - self.start

    def draw(self, kind: ProbeKind, most: int, Q: Tensor | None = None) -> Tensor:
        """Draw a block of probes, at most so many, orthogonal to the shared columns of Q."""
        return draw_probes(
            kind,
            self.n,
            min(most, self.block_size),
            self.generator,
            dtype=self.A.dtype,
            device=self.A.device,
            orthogonal_to=None if Q is None else Q.mT,
            ranks=self.ranks,
        )

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
            self.progress(self.spent, self.sampling + self.n * self.exact)
        return AV

    def stop(self, steps: Iterator[Step]) -> Step:
        """Return the first step that meets the target, or else the last."""
        with shown(self.wanted, "products") as self.progress:
            for step in steps:
                error, value = (float(torch.linalg.vector_norm(x)) for x in (step.sem, step.value))
                goal = max(self.atol, self.rtol * max(value, math.sqrt(step.square_norm)))
                if self.has_target and step.num_samples >= _MIN_SAMPLES and error <= goal:
                    break
        require_scale(self.scale, self.A.dtype)
        return step


def hutchinson(run: Run, kind: ProbeKind, form: Form, Q: Tensor | None = None) -> Iterator[Step]:
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
        square_norm += float(square_length(V, AV).sum())
        count += k
        if count >= 2:
            yield Step(mean, (M2 / (count - 1) / count).sqrt(), square_norm / count, count)


def unit_vectors(run: Run, form: Form) -> Iterator[Step]:
    """Sum ``form`` over the unit vectors, where the budget allows: the exact answer."""
    total = torch.zeros((), dtype=torch.float64, device=run.A.device)
    for first in range(0, run.n if run.exact else 0, run.block_size):
        unit = unit_columns(run.A, range(first, min(first + run.block_size, run.n)))
        total = total + form(unit, run.multiply(unit)).sum(-1)
    if run.exact:
        yield Step(total, torch.zeros_like(total), 0.0, run.n)


def hutchpp(run: Run, kind: ProbeKind, rank: int) -> Iterator[Step]:
    """Add the trace on a sketch to Hutchinson's average on its complement."""
    rank = min(rank, run.sampling // 3)
    _require_room(run, 2 * rank)
    Q, Z, C = _empty_sketch(run)
    while C.shape[1] < rank:
        Q, Z, C = _extend(run, Q, Z, C, run.draw(kind, rank - C.shape[1]))
    low_rank = inner(Q, Z, run.ranks).trace()
    square_norm = float(inner(Z, Z, run.ranks).trace())
    for mean, sem, rest, count in hutchinson(run, kind, quadratic_form, Q):
        # ||A||_F^2 = ||A Q||_F^2 + ||A (I - Q Q^T)||_F^2
        yield Step(low_rank + mean, sem, square_norm + rest, count)


def leave_one_out(run: Run, kind: ProbeKind, form: LeaveOneOut) -> Iterator[Step]:
    """Average ``form`` over probes, each left out in turn of the sketch that all of them make."""
    num_probes, m = run.sampling // 2, 0
    Q, Z, C = _empty_sketch(run)
    Omega = Q
    while m < num_probes:
        W = run.draw(kind, num_probes - m)
        planned = m + W.shape[1] if run.has_target else num_probes
        _require_room(run, 3 * (planned - m) + m)  # appending copies one of the three
        Q, Z, C = _extend(run, Q, Z, C, W)
        Omega, m = torch.cat([Omega, W[run.own]], 1), m + W.shape[1]
        if m == num_probes or (run.has_target and m >= _MIN_SAMPLES):
            yield Step(*form(run.n, run.ranks, Omega, Q, Z, C), float(C.square().sum()) / m, m)


def _extend(run: Run, Q: Tensor, Z: Tensor, C: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grow an orthonormal Q by the range of ``A W``, with ``Z = A Q`` and ``A [... W] = Q C``."""
    Y = run.multiply(W)
    norm = max(float(torch.linalg.vector_norm(X, dtype=torch.float64)) for X in (Y, C))
    Y, ranks = Y[run.own], run.ranks
    B = inner(Q, Y, ranks)
    P, R = qr(Y - Q @ B.to(Y.dtype), ranks)
    # Directions below the products' round-off are dropped; those just above it do no harm.
    U, sigma, Vh = torch.linalg.svd(R.double())
    keep = sigma > 10 * run.A.unit_roundoff * norm
    P, R = P @ U[:, keep].to(Y.dtype), sigma[keep, None] * Vh[keep]
    correction = inner(Q, P, ranks)  # the second pass of Gram-Schmidt
    P, factor = qr(P - Q @ correction.to(Y.dtype), ranks)
    B, R = B + correction @ R, factor.double() @ R
    C = torch.cat([torch.nn.functional.pad(C, (0, 0, 0, len(R))), torch.cat([B, R])], 1)
    AP = run.multiply(ranks.whole(P.mT, run.n).mT)[run.own]
    return torch.cat([Q, P], 1), torch.cat([Z, AP], 1), C


def quadratic_form(V: Tensor, AV: Tensor) -> Tensor:
    """``v^T A v`` (k,)."""
    return entries(V, AV).sum(0)


def square_length(V: Tensor, AV: Tensor) -> Tensor:
    """``||A v||^2`` (k,)."""
    return AV.double().square().sum(0)


def root(step: Step) -> Step:
    """Turn an estimate of ``||A||_F^2`` into one of the norm, by the delta method."""
    root = step.value.sqrt()
    return step._replace(value=root, sem=torch.where(root > 0, step.sem / (2 * root), 0.0))


def _empty_sketch(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Q and Z (share of n, 0), C (0, 0)."""
    Q = torch.empty(run.ranks.share_size(run.n), 0, dtype=run.A.dtype, device=run.A.device)
    return Q, Q, torch.empty(0, 0, dtype=torch.float64, device=run.A.device)


def _require_room(run: Run, num_columns: int) -> None:
    """Raise InputError unless so many vectors fit into memory."""
    size = num_columns * run.ranks.share_size(run.n) * run.A.dtype.itemsize
    require_memory(size, "the sketch (method='hutchinson' has none)", run.A.device)
