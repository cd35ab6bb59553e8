"""The certificate: probe, harvest, repeat, until the count is proven or the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hvpspec.linalg.krylov import KrylovSpace
from hvpspec.linalg.operator import DenseOperator, SymmetricOperator
from hvpspec.linalg.probes import draw_probes
from hvpspec.linalg.quadrature import mass_bracket
from hvpspec.linalg.recurrence import LanczosRun, lanczos
from hvpspec.spectrum.chi_squared import chi_squared_interval
from hvpspec.spectrum.deflation import Deflated, compression, harvest, refit
from hvpspec.spectrum.results import Rung

U64 = torch.finfo(torch.float64).eps / 2


@dataclass
class Bracket:
    """What is known so far of the number of eigenvalues below ``-tau``.

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
        """The bracket as it stands."""
        return Rung(self.tau, self.lower, self.upper, self.estimate)


def count_below(
    A: SymmetricOperator,
    taus: Sequence[float],
    *,
    confidence: float,
    generator: torch.Generator,
    num_probes: int,
    num_steps: int,
    max_matvecs: int,
    upper_bound: int,
    report: Callable[[int, Rung], None],
) -> tuple[Rung, ...]:
    """Bracket the number of eigenvalues below ``-tau`` for each of several taus.

    A round draws fresh Gaussian probes in the complement of what has been deflated and builds their
    Krylov space. The probes' mass below -tau, bracketed by Gauss-Radau, bounds what is left there
    with a confidence (see docs: The certificate). Ritz vectors below -tau are harvested into Q, and
    converged ones anywhere into W, which shortens later rounds; both only ever add certainty, since
    each round's statement is about directions that were fixed before its probes were drawn.

    Args:
        A: the operator.
        taus: resolutions in descending order, all positive.
        confidence: with which each returned bracket holds.
        generator: the source of the probes.
        num_probes: probes in a round.
        num_steps: the most block steps in a round.
        max_matvecs: the most products in all.
        upper_bound: on the counts, from elsewhere.
        report: called with the products spent and the bracket that is being worked on.

    Returns:
        What is certain for each tau.

    Reference:
        docs/certificate.md; Golub & Meurant, ch. 6 and 10, for the brackets.
    """
    n = A.shape[0]
    brackets = [Bracket(tau, 0, upper_bound, 0, upper_bound, upper_bound / 2) for tau in taus]
    deflated = Deflated(torch.empty(0, A.ranks.share_size(n), dtype=A.dtype, device=A.device))
    spent, rounds, dropped = 0, 0, 0.0
    look = partial(_look, unit_roundoff=A.unit_roundoff)
    for bracket in brackets:
        deflated = refit(deflated, bracket.tau)
        while (
            not bracket.settled
            and len(deflated.vectors) < n
            and bracket.tau > dropped
            and spent + num_probes <= max_matvecs
        ):
            # Looked at round after round, each spends its share: sum 1 / k^2 = pi^2 / 6.
            rounds += 1
            eta = 6 / math.pi**2 * (1 - confidence) / rounds**2
            width = min(num_probes, n - len(deflated.vectors))
            probes = draw_probes(
                "gaussian", n, width, generator, dtype=A.dtype, device=A.device, ranks=A.ranks
            )
            # Half of what is left, so that a harvest can still be certified.
            capacity = min(num_steps * width, max((max_matvecs - spent) // 2, width))
            space = KrylovSpace(A, probes, capacity, deflated.vectors, limit="num_steps")
            steps, next_look = 0, 8
            while True:
                spent += space.expand()
                steps += 1
                if steps < next_look and not space.full:
                    continue
                next_look = steps + max(4, steps // 10)
                done = look(space, deflated, steps, eta, [bracket], bracket)
                report(spent, bracket.rung)
                if done or space.full:
                    break
            dropped = max(dropped, space.dropped)
            # What the round says of finer resolutions is free.
            look(space, deflated, steps, eta, [b for b in brackets if not b.settled], bracket)
            # Converged enough for the next rungs, too, but not for the finest of a long ladder.
            finest = max(taus[-1], bracket.tau / 100)
            deflated = harvest(space, deflated, bracket.tau, finest)
            values = torch.linalg.eigvalsh(deflated.G)
            for b in brackets:  # Cauchy: at least as many of A's lie below -tau
                b.prove(int((values < -b.tau).sum()), upper_bound)
    return tuple(bracket.rung for bracket in brackets)


def _look(
    space: KrylovSpace,
    deflated: Deflated,
    steps: int,
    eta: float,
    brackets: Sequence[Bracket],
    target: Bracket,
    *,
    unit_roundoff: float,
) -> bool:
    """Narrow the brackets by what a round's probes say; return whether the round can end."""
    if len(deflated.G) + space.size == space.dim:  # the compression is A itself
        values = torch.linalg.eigvalsh(compression(space, deflated))
        for bracket in brackets:
            count = int((values < -bracket.tau).sum())
            bracket.prove(count, count)
        return True
    runs = _probe_runs(space, steps)
    error = deflated.error
    # The probes' coefficients are those of an operator without what the space dropped (Weyl).
    off = error + space.dropped
    # Each deflated direction leaves its round-off in the probe: without allowing for it, a weight
    # of 1e-30 below -tau would prove that something is there.
    slack = (len(deflated.G) + 1) * (10 * unit_roundoff) ** 2
    done = False
    for bracket in brackets:
        tau = bracket.tau
        if off >= tau:  # what is deflated or dropped is too rough for so fine a question
            continue
        masses = [_mass(run, -tau - off, -tau + off, slack) for run in runs]
        low, high = (sum(ends) for ends in zip(*masses, strict=True))
        r_low, r_high = chi_squared_interval(low, high, len(runs), eta, space.dim)
        below = int((deflated.invariant < -tau + error).sum())
        surely = int((deflated.invariant < -tau - error).sum())
        bracket.narrow(
            surely + r_low,
            below + deflated.num_negative + r_high,
            below + deflated.num_negative + (low + high) / (2 * len(runs)),
        )
        if bracket is target:
            _, unresolved = chi_squared_interval(0.0, high - low, len(runs), eta / 2, space.dim)
            done = bracket.settled or (unresolved == 0 and _is_sharp(space, tau))
    return done


def _is_sharp(space: KrylovSpace, tau: float) -> bool:
    """Whether the space holds directions below ``-tau`` that are fit to be harvested.

    A residual rho moves what is left by ``rho^2 / |theta|``: no more than a part of tau.
    """
    theta, _, residuals = space.ritz()
    new = theta < -tau
    return bool(new.any()) and bool((residuals[new] ** 2 <= 0.01 * tau * theta[new].abs()).all())


def _mass(run: LanczosRun, first: float, last: float, slack: float) -> tuple[float, float]:
    """Bounds on ``z^T 1[B < x] z`` for a run's start vector z and x between two numbers.

    They are rounded outwards: weights of total 1 carry float64's round-off, and the lower bound
    gives away ``slack`` more.
    """
    low, high = mass_bracket(run, first, last)
    return max(0.0, low - slack - 10 * U64) * run.norm**2, (high + 10 * U64) * run.norm**2


def _probe_runs(space: KrylovSpace, steps: int) -> list[LanczosRun]:
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
    num_steps = steps if space.width else size
    return list(lanczos(DenseOperator(bordered), start, num_steps))
