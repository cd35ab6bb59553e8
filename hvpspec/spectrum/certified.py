"""The certificate: probe, harvest, repeat, until the count is proven or the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvpspec.linalg.krylov import KrylovSpace
from hvpspec.linalg.lanczos import LanczosRun, lanczos
from hvpspec.linalg.operator import DenseOperator, SymmetricOperator
from hvpspec.linalg.probes import draw_probes
from hvpspec.linalg.quadrature import mass_below
from hvpspec.spectrum.chi_squared import chi_squared_interval
from hvpspec.spectrum.results import Rung

U64 = torch.finfo(torch.float64).eps / 2


@dataclass
class Bracket:
    """What is known so far of the number of eigenvalues below ``-tau``."""

    tau: float
    lower: int
    upper: int
    estimate: float

    def narrow(self, lower: int, upper: int, estimate: float) -> None:
        """Intersect with another interval, keeping the estimate inside."""
        self.lower = max(self.lower, lower)
        self.upper = max(self.lower, min(self.upper, upper))
        self.estimate = min(max(estimate, self.lower), self.upper)

    @property
    def settled(self) -> bool:
        """Whether the count is known."""
        return self.lower == self.upper

    @property
    def rung(self) -> Rung:
        """The bracket as it stands."""
        return Rung(self.tau, self.lower, self.upper, self.estimate)


@dataclass
class _Deflated:
    """Directions taken out: W, nearly invariant, and Q, on which A is negative.

    Attributes:
        vectors: orthonormal rows, W before Q, shape (w + q, n).
        G: A compressed to them, float64, shape (w + q, w + q).
        residuals: ``||A x - W part||`` outside of all vectors, for the rows of W, shape (w,).
    """

    vectors: Tensor
    G: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    residuals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def num_invariant(self) -> int:
        """Number of rows of W."""
        return len(self.residuals)

    @property
    def error(self) -> float:
        """``||(I - W W^T) A W||_F``: what A differs by from one that W splits off exactly."""
        w = self.num_invariant
        outside = torch.cat([self.residuals, self.G[w:, :w].reshape(-1)])
        return float(torch.linalg.vector_norm(outside))


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
    brackets = [Bracket(tau, 0, upper_bound, upper_bound / 2) for tau in taus]
    deflated = _Deflated(torch.empty(0, n, dtype=A.dtype, device=A.device))
    spent, eta = 0, 1 - confidence
    for bracket in brackets:
        while not bracket.settled and spent + num_probes <= max_matvecs:
            # Looked at round after round, the certificate spends eta/2, eta/4, ...
            eta /= 2
            width = min(num_probes, n - len(deflated.vectors))
            probes = draw_probes("gaussian", n, width, generator, dtype=A.dtype, device=A.device)
            # Half of what is left, so that a harvest can still be certified.
            capacity = min(num_steps * width, max((max_matvecs - spent) // 2, width))
            space = KrylovSpace(A, probes, capacity, deflated.vectors)
            steps, next_look = 0, 8
            while True:
                spent += space.expand()
                steps += 1
                if steps < next_look and not space.full:
                    continue
                next_look = steps + max(4, steps // 10)
                open_brackets = [b for b in brackets if not b.settled]
                done = _look(space, deflated, steps, eta, open_brackets, bracket, A.unit_roundoff)
                report(spent, bracket.rung)
                if done or space.full:
                    break
            deflated = _harvest(A, space, deflated, bracket.tau, taus[-1])
            _narrow_by_ritz_values(deflated, brackets)
    return tuple(bracket.rung for bracket in brackets)


def _look(
    space: KrylovSpace,
    deflated: _Deflated,
    steps: int,
    eta: float,
    brackets: Sequence[Bracket],
    target: Bracket,
    unit_roundoff: float,
) -> bool:
    """Narrow the brackets by what a round's probes say; return whether the round can end."""
    runs = _probe_runs(space, steps)
    complete = len(deflated.G) + space.size == space.dim
    whole = torch.linalg.eigvalsh(_compression(space, deflated))
    w, error = deflated.num_invariant, deflated.error
    invariant = torch.linalg.eigvalsh(deflated.G[:w, :w])
    num_negative = len(deflated.G) - w
    # Weights carry float64's round-off, and each deflated direction leaves its own in the probe:
    # without allowing for it, a weight of 1e-30 below -tau would prove that something is there.
    slack = 10 * U64 + (len(deflated.G) + 1) * (10 * unit_roundoff) ** 2
    done = False
    for bracket in brackets:
        tau = bracket.tau
        found = int((whole < -tau).sum())  # Cauchy: at least as many of A's
        if complete:  # the compression is A itself
            bracket.narrow(found, found, found)
            done = done or bracket is target
            continue
        if error >= tau:
            bracket.narrow(found, bracket.upper, bracket.estimate)
            continue
        low = sum(_mass(run, -tau - error, slack)[0] for run in runs)
        high = sum(_mass(run, -tau + error, slack)[1] for run in runs)
        r_low, r_high = chi_squared_interval(low, high, len(runs), eta, space.dim)
        below = int((invariant < -tau + error).sum())
        surely = int((invariant < -tau - error).sum())
        estimate = below + num_negative + (low + high) / (2 * len(runs))
        bracket.narrow(max(found, surely + max(r_low, 0)), below + num_negative + r_high, estimate)
        if bracket is target:
            _, unresolved = chi_squared_interval(0.0, high - low, len(runs), eta / 2, space.dim)
            theta, _, residuals = space.ritz()
            new = theta < -tau
            # A residual rho moves what is left by rho^2 / |theta|: no more than a part of tau.
            sharp = bool((residuals[new] ** 2 <= 0.01 * tau * theta[new].abs()).all())
            done = bracket.settled or (unresolved == 0 and sharp and bool(new.any()))
    return done


def _mass(run: LanczosRun, x: float, slack: float) -> tuple[float, float]:
    """Bounds on ``z^T 1[B < x] z`` for a run's start vector z, rounded outwards by ``slack``."""
    low, high = mass_below(run, x)
    return max(0.0, low - slack) * run.norm**2, (high + slack) * run.norm**2


def _probe_runs(space: KrylovSpace, steps: int) -> list[LanczosRun]:
    """Each probe's own Lanczos coefficients, from the operator compressed to the block's space.

    The space contains each probe's Krylov space, so Lanczos on the compression, bordered by the
    coupling to the next block, gives the coefficients that Lanczos on the operator would.
    """
    known, size = space.size + space.width, space.size
    bordered = torch.zeros(known, known, dtype=torch.float64)
    bordered[:size, :size] = space.T
    bordered[size:, :size], bordered[:size, size:] = space.coupling, space.coupling.T
    start = torch.zeros(known, space.start.shape[1], dtype=torch.float64)
    start[: len(space.start)] = space.start
    num_steps = steps if space.width else size
    return list(lanczos(DenseOperator(bordered), start, num_steps))


def _compression(space: KrylovSpace, deflated: _Deflated) -> Tensor:
    """A compressed to everything seen: the deflated directions and the round's basis."""
    top = torch.cat([deflated.G, space.C], 1)
    return torch.cat([top, torch.cat([space.C.T, space.T], 1)])


def _harvest(
    A: SymmetricOperator, space: KrylovSpace, deflated: _Deflated, tau: float, finest: float
) -> _Deflated:
    """Take out the round's converged Ritz vectors and all that lie below ``-tau``."""
    theta, S, residuals = space.ritz()
    w = deflated.num_invariant
    # So many of so small a residual move no eigenvalue by more than a part of the finest tau.
    tolerance = 0.05 * finest / math.sqrt(len(theta) + w)
    converged = residuals <= tolerance
    negative = ~converged & (theta < -tau)
    chosen = torch.cat([S[:, converged], S[:, negative]], 1)
    num_converged = int(converged.sum())
    if chosen.shape[1] == 0:
        return deflated
    new, coupling = space.rotate(chosen), space.C @ chosen
    new_theta = torch.cat([theta[converged], theta[negative]])
    invariant, rest = slice(0, num_converged), slice(num_converged, None)

    vectors = torch.cat([deflated.vectors[:w], new[invariant], deflated.vectors[w:], new[rest]])
    order = torch.cat(
        [
            torch.arange(w),
            len(deflated.G) + torch.arange(num_converged),
            torch.arange(w, len(deflated.G)),
            len(deflated.G) + torch.arange(num_converged, len(new_theta)),
        ]
    )
    G = torch.cat(
        [
            torch.cat([deflated.G, coupling], 1),
            torch.cat([coupling.T, torch.diag(new_theta)], 1),
        ]
    )[order][:, order]
    harvested = _Deflated(vectors, G, torch.cat([deflated.residuals, residuals[converged]]))
    return _rayleigh_ritz(harvested, tau)


def _rayleigh_ritz(deflated: _Deflated, tau: float) -> _Deflated:
    """Rotate Q to its Ritz vectors and let go of those that are not below ``-tau``."""
    w = deflated.num_invariant
    values, Y = torch.linalg.eigh(deflated.G[w:, w:])
    Y = Y[:, values < -tau]
    rotation = torch.zeros(len(deflated.G), w + Y.shape[1], dtype=torch.float64)
    rotation[range(w), range(w)] = 1
    rotation[w:, w:] = Y
    vectors = rotation.T.to(deflated.vectors) @ deflated.vectors
    return _Deflated(vectors, rotation.T @ deflated.G @ rotation, deflated.residuals)


def _narrow_by_ritz_values(deflated: _Deflated, brackets: Sequence[Bracket]) -> None:
    """Raise the lower bounds to the number of Ritz values found (Cauchy)."""
    values = torch.linalg.eigvalsh(deflated.G)
    for bracket in brackets:
        bracket.narrow(int((values < -bracket.tau).sum()), bracket.upper, bracket.estimate)
