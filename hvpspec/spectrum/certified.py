"""The certificate: probe, bracket, harvest, until the count is proven or the budget is spent.

Read it beside docs/certificate.md, whose letters these are: A, the operator, and tau; W, converged
directions, and Q, negative ones, which are taken out, together D; B = P A P with P = I - D D^T; z,
a probe in the complement of D; X = z^T 1[B < -tau] z, its mass there, between L and U; r, the
number of eigenvalues of B below -tau; epsilon, what couples W to the rest; eta, the risk of a
round, and k, its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from hvpspec.linalg.krylov import KrylovSpace, LanczosRun, lanczos
from hvpspec.linalg.operator import DenseOperator, SymmetricOperator
from hvpspec.linalg.probes import probes_for, require_count
from hvpspec.linalg.quadrature import mass_bracket
from hvpspec.spectrum.beta import beta_interval
from hvpspec.spectrum.matrix_free import MatrixFree, Question
from hvpspec.spectrum.results import Rung

U64 = torch.finfo(torch.float64).eps / 2


@dataclass(frozen=True, kw_only=True)
class Certified(MatrixFree):
    """The count from products alone, with a proof at a stated confidence.

    Negative directions are harvested, which bounds the count from below for certain, and what is
    left is bounded from above with a confidence, until the two meet or the budget is spent; then
    the answer is an interval.

    Attributes:
        confidence: of the interval, for each tau.
        num_probes: random vectors that advance together. One takes the fewest products; more make
            better use of a pass over the data.
        num_steps: the most steps of a Krylov space, which is ``num_probes`` times that many vectors
            in memory.
        max_matvecs: the most products to spend, beside some 20 that measure the noise floor.
        watch: called with the interval that is being worked on.

    Reference:
        The page "The certificate" of the documentation.
    """

    num_probes: int = 1
    num_steps: int = 1000
    max_matvecs: int = 4000
    watch: Callable[[Rung], None] | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "certified"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("max_matvecs", self.max_matvecs)

    def _ladder(self, question: Question) -> tuple[Rung, ...]:
        taus, floor = question.taus, question.noise.floor
        fine = [tau for tau in taus if tau < floor]
        # Weyl: at tau there are at least as many as the products show at tau + floor, and at most
        # as many as they show at tau - floor < 0, which is not asked: zero lies on the far side.
        safe = [fine[0] + floor] if fine else []

        def report(spent: int, rung: Rung) -> None:
            """Pass on how far it has come."""
            if question.progress is not None:
                question.progress(spent, self.max_matvecs)
            if self.watch is not None:
                self.watch(rung)

        asked = sorted({*(tau for tau in taus if tau >= floor), *safe}, reverse=True)
        rungs = count_below(question.A, asked, self, question.generator, question.bound, report)
        answers = {rung.tau: rung for rung in rungs}
        for tau in fine:
            known = answers[safe[0]]
            answers[tau] = question.rung(tau, known.lower, question.bound, known.estimate)
        return tuple(answers[tau] for tau in taus)


@dataclass
class Interval:
    """What is known so far of the number of eigenvalues of A below ``-tau``.

    Attributes:
        tau: the resolution.
        least: it is at least this, for certain.
        most: it is at most this, for certain.
        lower: it is at least this, with the confidence asked for.
        upper: it is at most this, with the confidence asked for.
        estimate: the best guess at it.
    """

    tau: float
    least: int
    most: int
    lower: int
    upper: int
    estimate: float

    def narrow(self, lower: int, upper: int, estimate: float) -> None:
        """Intersect with an interval that holds with some probability."""
        if upper - lower > self.upper - self.lower:  # a rougher look than one before
            estimate = self.estimate
        self.lower, self.upper = max(self.lower, lower), min(self.upper, upper)
        self._reconcile(estimate)

    def prove(self, least: int, most: int) -> None:
        """Intersect with an interval that holds for certain."""
        least, most = max(self.least, least), min(self.most, most)
        if least > most:  # an eigenvalue within round-off of -tau was counted, and was not
            self.least, self.most = most, least
            self.lower, self.upper = most, least
        else:
            self.least, self.most = least, most
        self.lower, self.upper = max(self.lower, self.least), min(self.upper, self.most)
        self._reconcile(self.estimate)

    def _reconcile(self, estimate: float) -> None:
        """Fall back on what is certain where probable bounds contradict it or each other."""
        if self.lower > self.upper:
            self.lower, self.upper = self.least, self.most
        self.estimate = min(max(estimate, self.lower), self.upper)

    @property
    def settled(self) -> bool:
        """Whether the count is known."""
        return self.lower == self.upper

    @property
    def rung(self) -> Rung:
        """The interval as it stands."""
        return Rung(self.tau, self.lower, self.upper, self.estimate)


@dataclass(frozen=True)
class Deflated:
    """Directions taken out: W, nearly invariant, and Q, on which A is negative.

    Attributes:
        vectors: orthonormal rows, W before Q, shape (w + q, n), of which each of several processes
            has its share of the columns.
        G: A compressed to them, float64, shape (w + q, w + q).
        residuals: bounds on ``||A x||`` outside of all vectors, for the rows of W, shape (w,).
    """

    vectors: Tensor
    G: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    residuals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def w(self) -> int:
        """Number of rows of W."""
        return len(self.residuals)

    @property
    def q(self) -> int:
        """Number of rows of Q."""
        return len(self.G) - self.w

    @property
    def epsilon(self) -> float:
        """What A differs by from an operator that couples W to nothing beyond W and Q."""
        return float(torch.linalg.vector_norm(self.residuals))

    @cached_property
    def theta(self) -> Tensor:
        """The eigenvalues of A compressed to W, ascending, shape (w,)."""
        values: Tensor = torch.linalg.eigvalsh(self.G[: self.w, : self.w])
        return values


def count_below(
    A: SymmetricOperator,
    taus: Sequence[float],
    effort: Certified,
    generator: torch.Generator,
    bound: int,
    report: Callable[[int, Rung], None],
) -> tuple[Rung, ...]:
    """Count the eigenvalues below ``-tau`` for each of several taus: probe, bracket, harvest.

    Args:
        A: the operator.
        taus: in descending order, all positive.
        effort: the confidence, and what to spend.
        generator: the source of probes.
        bound: no more than this are negative, for certain.
        report: called with the products spent and the interval being worked on.

    Returns:
        What is certain for each tau.

    Reference:
        docs/certificate.md; Golub & Meurant, ch. 6 and 10, for the brackets.
    """
    n, before, k, dropped = A.shape[0], A.num_matvecs, 0, 0.0
    intervals = [Interval(tau, 0, bound, 0, bound, bound / 2) for tau in taus]
    D = Deflated(torch.empty(0, A.ranks.share_size(n), dtype=A.dtype, device=A.device))
    for interval in intervals:
        tau = interval.tau
        D = refit(D, tau)
        while not interval.settled and len(D.vectors) < n and tau > dropped:
            left = effort.max_matvecs - (A.num_matvecs - before)
            if left < effort.num_probes:
                break
            k += 1
            # The rounds share the risk: sum 1 / k^2 = pi^2 / 6.
            eta = 6 / math.pi**2 * (1 - effort.confidence) / k**2
            space = probe(A, D, effort, left, generator)
            for m in _looks(space):
                # Looks within a round are free: it is the same X, and all brackets contain it.
                closed = bracket(A, space, D, m, eta, [interval])
                report(A.num_matvecs - before, interval.rung)
                if interval.settled or (closed and _is_sharp(space, tau)):
                    break
            dropped = max(dropped, space.dropped)
            # What the round says of finer resolutions is free as well.
            bracket(A, space, D, m, eta, [i for i in intervals if not i.settled])
            # Converged enough for the next taus, too, but not for the finest of a long ladder.
            D = harvest(space, D, tau, max(taus[-1], tau / 100))
            ritz_values = torch.linalg.eigvalsh(D.G)
            for i in intervals:  # Cauchy: at least as many of A's lie below -tau
                i.prove(int((ritz_values < -i.tau).sum()), bound)
    return tuple(interval.rung for interval in intervals)


def probe(
    A: SymmetricOperator, D: Deflated, effort: Certified, left: int, generator: torch.Generator
) -> KrylovSpace:
    """Draw fresh Gaussian probes z and begin their Krylov space for B.

    A used probe is no evidence: its directions below ``-tau`` are those that have been harvested.
    """
    s = min(effort.num_probes, A.shape[0] - len(D.vectors))
    z = probes_for(A, "gaussian", s, generator)
    # Half of what is left, so that a harvest can still be certified.
    capacity = min(effort.num_steps * s, max(left // 2, s))
    return KrylovSpace(A, z, capacity, D.vectors, limit="num_steps")


def _looks(space: KrylovSpace) -> Iterator[int]:
    """Expand a space until it is full, and stop for a look after each tenth of the steps."""
    m, next_look = 0, 8
    while m == 0 or not space.full:
        space.expand()
        m += 1
        if m >= next_look or space.full:
            next_look = m + max(4, m // 10)
            yield m


def bracket(
    A: SymmetricOperator,
    space: KrylovSpace,
    D: Deflated,
    m: int,
    eta: float,
    intervals: Sequence[Interval],
) -> bool:
    """Narrow intervals by what the probes say after m steps.

    For each tau: ``L <= X <= U`` by Gauss-Radau, from these an interval for r by the law of X, and
    from that one for the count of A by interlacing over Q and by Weyl over W.

    Returns:
        Whether a bracket has closed so far that it would certify but for what it sees below
        ``-tau``: that of the last interval.
    """
    dim = A.shape[0] - len(D.G)  # of the complement of D, n' in the documentation
    if space.size == dim:  # the compression is A itself
        values = torch.linalg.eigvalsh(compression(space, D))
        for interval in intervals:
            count = int((values < -interval.tau).sum())
            interval.prove(count, count)
        return True
    runs, epsilon, closed = _probe_runs(space, m), D.epsilon, False
    # The probes' coefficients are those of an operator without what W couples to and without what
    # the space dropped (Weyl).
    off = epsilon + space.dropped
    # Each deflated direction leaves its round-off in the probe: without allowing for it, a weight
    # of 1e-30 below -tau would prove that something is there.
    slack = (len(D.G) + 1) * (10 * A.unit_roundoff) ** 2
    total = sum(run.norm**2 for run in runs)
    s = len(runs)
    for interval in intervals:
        tau = interval.tau
        if off >= tau:  # W, or the space, is too rough for so fine a question
            continue
        L = U = 0.0  # of the probes' mass below -tau, as a share of all that they have
        for run in runs:
            low, high = mass_bracket(run, -tau - off, -tau + off)
            # Rounded outwards: weights of total 1 carry float64's round-off.
            L += max(0.0, low - slack) * run.norm**2 / total
            U += (high + 10 * U64) * run.norm**2 / total
        r_low, r_high = beta_interval(L, U, s, eta, dim)
        surely = int((D.theta < -(tau + epsilon)).sum())
        below = int((D.theta < -(tau - epsilon)).sum()) + D.q
        # The mean of the share is r / dim.
        interval.narrow(surely + r_low, below + r_high, below + dim * (L + U) / 2)
        closed = beta_interval(0.0, U - L, s, eta / 2, dim)[1] == 0
    return closed


def _probe_runs(space: KrylovSpace, m: int) -> list[LanczosRun]:
    """Each probe's own Lanczos coefficients, from the operator compressed to the block's space.

    The space contains each probe's Krylov space, so Lanczos on the compression, bordered by the
    coupling to the next block, gives the coefficients that Lanczos on the operator would.
    """
    known, size = space.size + space.width, space.size
    if len(space.start) == 1 and space.start.shape[1] == 1:  # T is tridiagonal as it stands
        residual = torch.linalg.vector_norm(space.coupling).reshape(1)
        return [
            LanczosRun(
                space.T.diagonal().clone(),
                torch.cat([space.T.diagonal(1), residual]),
                float(space.start.abs()),
                exhausted=space.width == 0,
            )
        ]
    bordered = torch.zeros(known, known, dtype=torch.float64)
    bordered[:size, :size] = space.T
    bordered[size:, :size], bordered[:size, size:] = space.coupling, space.coupling.T
    start = torch.zeros(known, space.start.shape[1], dtype=torch.float64)
    start[: len(space.start)] = space.start
    num_steps = m if space.width else size
    return list(lanczos(DenseOperator(bordered), start, num_steps))


def _is_sharp(space: KrylovSpace, tau: float) -> bool:
    """Whether the space holds directions below ``-tau`` that are fit to be harvested.

    A residual rho moves what is left by ``rho^2 / |theta|``: no more than a part of tau.
    """
    theta, _, rho = space.ritz()
    negative = theta < -tau
    small = rho[negative] ** 2 <= 0.01 * tau * theta[negative].abs()
    return bool(negative.any()) and bool(small.all())


def compression(space: KrylovSpace, D: Deflated) -> Tensor:
    """A compressed to everything seen: the deflated directions and the round's basis."""
    return torch.cat([torch.cat([D.G, space.C], 1), torch.cat([space.C.T, space.T], 1)])


def harvest(space: KrylovSpace, D: Deflated, tau: float, finest: float) -> Deflated:
    """Take out the round's converged Ritz vectors, which join W, and others below ``-tau``, Q."""
    theta, S, residuals = space.ritz()
    d, w = len(D.G), D.w
    converged = residuals <= _tolerance(finest, len(theta) + w)
    negative = ~converged & (theta < -tau)
    if not bool((converged | negative).any()):
        return D
    # Coordinates in the basis of everything seen: D before the round's.
    G = compression(space, D)
    old = torch.eye(len(G), d, dtype=torch.float64)
    ritz = torch.cat([torch.zeros(d, len(theta), dtype=torch.float64), S])
    W = torch.cat([old[:, :w], ritz[:, converged]], 1)
    Q = torch.cat([old[:, w:], ritz[:, negative]], 1)
    residuals = torch.cat([D.residuals, residuals[converged]])
    X, residuals = _rayleigh_ritz(G, W, residuals, Q, tau)
    vectors = X[:d].T.to(D.vectors) @ D.vectors + space.rotate(X[d:])
    return Deflated(vectors, X.T @ G @ X, residuals)


def refit(D: Deflated, tau: float) -> Deflated:
    """Make what was taken out for a coarser tau fit a finer one.

    Rows of W whose residual is now too large join Q, which need not be invariant.
    """
    w, basis = D.w, torch.eye(len(D.G), dtype=torch.float64)
    fits = D.residuals <= _tolerance(tau, w)
    W, Q = basis[:, :w][:, fits], torch.cat([basis[:, w:], basis[:, :w][:, ~fits]], 1)
    X, residuals = _rayleigh_ritz(D.G, W, D.residuals[fits], Q, tau)
    return Deflated(X.T.to(D.vectors) @ D.vectors, X.T @ D.G @ X, residuals)


def _tolerance(tau: float, count: int) -> float:
    """The residual of which so many move no eigenvalue by more than a part of tau."""
    return 0.05 * tau / math.sqrt(max(count, 1))


def _rayleigh_ritz(
    G: Tensor, W: Tensor, residuals: Tensor, Q: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Rotate Q to its Ritz vectors and let go of those that are not below ``-tau``.

    Args:
        G: A compressed to a basis, shape (k, k).
        W: coordinates in that basis, shape (k, w).
        residuals: bounds on ``||A x||`` outside of the basis for the columns of W, shape (w,).
        Q: coordinates, orthonormal with those of W, shape (k, q).
        tau: the resolution.

    Returns:
        The coordinates of W and what is left of Q, and bounds on ``||A x||`` outside of these.
    """
    values, Y = torch.linalg.eigh(Q.T @ G @ Q)
    kept, let_go = Q @ Y[:, values < -tau], Q @ Y[:, values >= -tau]
    # What couples W to a direction that is let go lies outside of all vectors from now on.
    outside = torch.linalg.vector_norm(let_go.T @ G @ W, dim=0)
    return torch.cat([W, kept], 1), torch.hypot(residuals, outside)
