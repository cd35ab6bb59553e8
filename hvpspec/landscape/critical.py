"""Critical points, with a proof that they are there (Newton-Kantorovich)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.landscape.landscapes import Landscape
from hvpspec.landscape.lipschitz import estimated_lipschitz
from hvpspec.landscape.steps import MAX_GRADIENTS, Observer, Walk, minimise, norm, towards
from hvpspec.linalg.extremes import eigsh
from hvpspec.linalg.probes import require_count, seeded
from hvpspec.results import Result, Row
from hvpspec.spectrum.exact import Exact, Inertia
from hvpspec.spectrum.morse import index
from hvpspec.spectrum.results import IndexResult

#: Up to this size the index of the end point comes from all eigenvalues; up to the next that of a
#: minimum from two factorisations of the matrix; and beyond from a certificate in probability.
EXACT_UP_TO, INERTIA_UP_TO = 4000, 15_000

#: At a gradient-flat point ``||H g|| <= FLAT ||H|| ||g||`` (Frye et al. 2021 call r = 1e-3 flat).
FLAT = 1e-3

# Round-off that was seen in three draws may be a few times as large elsewhere.
_SAFETY = 8.0

# Isolation is proved up to this distance, relative to the point's norm. Lipschitz constants grow
# little over so small a ball, and different critical points are further apart.
_ISOLATION = 1e-6

# A unit whose argument is as near to its kink as round-off of a sum is on it.
_ON_A_KINK = 1e-9

#: What a point is looked for: a minimum, whatever is near, or a saddle of index k.
Target = Literal["minimum", "nearest"] | int


@dataclass(frozen=True, eq=False, repr=False)
class CriticalPoint(Result):
    """A point at which the gradient vanishes as far as can be computed, with what is proved of it.

    Attributes:
        theta: the point, shape (n,).
        value: f there.
        value_error: bound on the difference to f at the true critical point; NaN if unproved.
        gradient_norm: Euclidean norm of the gradient.
        gradient_floor: bound on the round-off of the gradient, measured and taken eight times.
        index: number of directions in which f goes down.
        kind: "minimum", "saddle of index k", "degenerate", "gradient-flat", "kink" or "not
            reached".
        gap: the smallest absolute value of an eigenvalue, or a lower bound on it; NaN if unknown.
        lipschitz: Lipschitz constant of the Hessian around the point; NaN if none is known.
        lipschitz_kind: "proved", "estimated", "given" or "none".
        h: ``beta K eta``, which proves a critical point if it is at most 1/2.
        radius: the true critical point is within this distance; infinite if h is above 1/2.
        isolation: within this distance there is no other.
        certified: whether a critical point of this index is proved to be there.
        reason: why it is not certified; empty if it is.
        num_gradients: gradients spent.
        num_matvecs: Hessian products spent.
        kink_distance: the least absolute value of what enters a kink of f; infinite for a smooth f.

    Reference:
        Kantorovich & Akilov, Functional Analysis, ch. XVIII: with ``beta >= ||H^-1||``, ``eta >=
        beta ||g||`` and K a Lipschitz constant of H on the ball of radius ``2 eta``, ``h = beta K
        eta <= 1/2`` implies one critical point within ``2 eta / (1 + sqrt(1 - 2 h))``.
    """

    theta: Tensor
    value: float
    value_error: float
    gradient_norm: float
    gradient_floor: float
    index: IndexResult
    kind: str
    gap: float
    lipschitz: float
    lipschitz_kind: str
    h: float
    radius: float
    isolation: float
    certified: bool
    reason: str
    num_gradients: int
    num_matvecs: int
    kink_distance: float = math.inf

    _FORMAT = "hvpspec-critical-point"

    @property
    def ball(self) -> float:
        """The radius, and 0 where it is infinite: nothing but the point itself is known."""
        return self.radius if math.isfinite(self.radius) else 0.0

    def holds(self, distances: Tensor, radii: Tensor | float) -> Tensor:
        """Which balls hold the same critical point as this one's.

        Those that lie where it is proved to be the only one do. An estimated constant may be far
        too small for that, as where a symmetry makes all third derivatives vanish; then it is those
        that meet this one's.

        Args:
            distances: of their centres, shape (s,).
            radii: theirs, shape (s,).
        """
        if self.isolation > 0 and self.lipschitz_kind != "estimated":
            return distances + radii < self.isolation
        return distances <= self.ball + radii

    def rows(self, subject: Any = None) -> list[Row]:
        """The lines of the table."""
        proof = "proved" if self.certified else f"not proved: {self.reason}"
        error = f"within {self.value_error:.1e} of the true point's"
        if math.isnan(self.value_error):
            error = "here, where no critical point is known to be near"
        rows: list[Row] = [
            ("kind", self.kind, proof),
            ("f", f"{self.value:.12g}", error),
            ("gradient norm", f"{self.gradient_norm:.2e}", f"round-off {self.gradient_floor:.1e}"),
            ("index", _interval(self.index), f"of {self.index.dim}, by {self.index.method}"),
            ("gap", f"{self.gap:.3e}", "smallest absolute value of an eigenvalue"),
            (
                "Lipschitz constant",
                f"{self.lipschitz:.2e}",
                f"of the Hessian, {self.lipschitz_kind}",
            ),
            ("h", f"{self.h:.1e}", "a critical point is there if h <= 1/2"),
            ("radius", f"{self.radius:.1e}", "the true critical point is this near"),
            ("cost", f"{self.num_gradients:,}", f"gradients, and {self.num_matvecs:,} products"),
        ]
        if math.isfinite(self.kink_distance) or math.isnan(self.kink_distance):
            rows.append(("kink", f"{self.kink_distance:.1e}", "least argument of a kink"))
        return rows

    def _title(self) -> str:
        """What it is."""
        return f"Critical point of a function of {len(self.theta):,} parameters"

    def _brief(self) -> dict[str, object]:
        """What ``repr`` shows."""
        names = ("kind", "value", "gradient_norm", "gap", "h", "radius", "certified")
        return {name: getattr(self, name) for name in names}


def _interval(result: IndexResult) -> str:
    """The index, or the interval it is in."""
    return str(result.lower) if result.lower == result.upper else f"{result.lower}-{result.upper}"


def critical_point(
    F: Landscape,
    theta: Tensor,
    *,
    target: Target = "minimum",
    lipschitz: Literal["proved", "estimated"] | float = "proved",
    max_gradients: int = MAX_GRADIENTS,
    generator: torch.Generator | None = None,
    observer: Observer | None = None,
) -> CriticalPoint:
    """Go to a critical point, and prove that it is there if possible.

    Args:
        F: the landscape.
        theta: where to begin, shape (n,); for a network ``F.start`` is where it is.
        target: "minimum" goes down to a point with no negative eigenvalue, "nearest" follows
            Newton's steps to whatever is near, and a number k looks for a saddle of index k by
            going up along the k lowest eigenvectors and down along all others.
        lipschitz: "proved" takes a proved Lipschitz constant of the Hessian where there is one, and
            an estimate elsewhere; "estimated" an estimate; a number is taken as proved by you.
        max_gradients: after which the search stops where it is, at a point "not reached".
        generator: the source of random numbers; None for one with seed 0.
        observer: called with each point that is accepted, f and the norm of the gradient there.

    Returns:
        The point, its index, and what is proved of it.

    Raises:
        InputError: an argument is not allowed.
        HvpspecError: f or its derivatives cannot be computed.

    Reference:
        Cerjan & Miller, J. Chem. Phys. 75 (1981), for steps towards saddles; Frye et al., Critical
        point-finding methods reveal gradient-flat regions of deep network losses (2021).

    Example:
        >>> from hvpspec.landscape import FunctionLandscape
        >>> F = FunctionLandscape(2, lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2)
        >>> p = critical_point(F, torch.tensor([0.1, 0.3]), target=1, lipschitz=48.0)
        >>> p.kind, p.certified, p.value
        ('saddle of index 1', True, 1.0)
    """
    theta = F.point(theta)
    k = require_target(target, F.n)
    _require_lipschitz(lipschitz)
    require_count("max_gradients", max_gradients)
    walk = Walk(F, observer, max_gradients)
    theta = minimise(walk, theta) if k == 0 else towards(walk, theta, k)
    return certify(F, theta, lipschitz=lipschitz, generator=generator, walk=walk)


def require_target(target: Target, n: int) -> int | None:
    """The index that is looked for; None for any.

    Raises:
        InputError: there is no such target.
    """
    if target in ("minimum", "nearest"):
        return 0 if target == "minimum" else None
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target <= n:
        raise InputError(
            f"target must be 'minimum', 'nearest' or an index from 0 to {n}, got {target!r}"
        )
    return target


def _require_lipschitz(lipschitz: Any) -> None:
    """Raise InputError for something that is no choice of a Lipschitz constant."""
    if lipschitz in ("proved", "estimated"):
        return
    is_number = isinstance(lipschitz, int | float) and not isinstance(lipschitz, bool)
    if not (is_number and math.isfinite(lipschitz) and lipschitz >= 0):
        raise InputError(
            f"lipschitz must be 'proved', 'estimated' or a number of at least 0, got {lipschitz!r}"
        )


def certify(
    F: Landscape,
    theta: Tensor,
    *,
    lipschitz: Literal["proved", "estimated"] | float = "proved",
    generator: torch.Generator | None = None,
    walk: Walk | None = None,
) -> CriticalPoint:
    """Say what a point is, and prove it if possible, without moving it.

    Args:
        F: the landscape.
        theta: the point, shape (n,).
        lipschitz: as for :func:`critical_point`.
        generator: likewise.
        walk: what was spent before; None for nothing.

    Returns:
        As for :func:`critical_point`.

    Raises:
        InputError: the point has another shape, or is not finite.
        HvpspecError: f or its derivatives cannot be computed.
    """
    theta, walk = F.point(theta), walk or Walk(F)
    generator = seeded(generator)
    F.check(theta)
    walk.num_gradients += 1
    (value, g), H = F.value_and_gradient(theta), F.hessian(theta)
    g_norm = norm(g)
    floor, nearest, value_floor = _roundoff(walk, theta, value, g, H, generator)
    found, gap = _index_and_gap(H)
    flat = norm(H.matvec(g)) <= FLAT * found.norm * g_norm
    walk.num_matvecs += H.num_matvecs
    distance = F.kink_distance(theta)
    margin = gap - found.noise_floor
    reached = g_norm <= floor + nearest
    # Round-off is some u of what is added up. More is a jump, at a kink that no name tells.
    u = torch.finfo(theta.dtype).eps / 2
    jumps = margin > 0 and floor > u**0.5 * (found.norm * max(norm(theta), 1.0) + g_norm)

    K, K_kind, unproved, h, radius, isolation = math.nan, "none", "", math.inf, math.inf, 0.0
    if margin > 0:
        beta = 1 / margin
        eta = beta * (g_norm + floor)
        # Existence needs K within 2 eta, isolation as far as it is claimed.
        ball = max(2 * eta, _ISOLATION * max(norm(theta), 1.0))
        K, K_kind, unproved = _lipschitz(F, theta, ball, lipschitz, generator)
        h = beta * K * eta
        if h <= 0.5:
            root = math.sqrt(1 - 2 * h)
            radius = 2 * eta / (1 + root)
            isolation = (1 + root) / (beta * K) if K else math.inf
            if K_kind != "given":  # which holds everywhere
                isolation = min(isolation, ball)
    there = h <= 0.5 and (reached or K_kind != "estimated")
    if jumps or (F.kinks and not distance > _ON_A_KINK):
        kind = "kink"
    elif margin <= 0 and reached:
        kind = "degenerate"
    elif reached or there:
        kind = "minimum" if found.upper == 0 else f"saddle of index {_interval(found)}"
    else:
        kind = "gradient-flat" if flat else "not reached"
    reason = _reason(walk, found, kind, unproved, h)
    value_error = math.nan
    if math.isfinite(radius):
        taylor = found.norm * radius**2 / 2 + K * radius**3 / 6
        value_error = (g_norm + floor) * radius + taylor + value_floor
    return CriticalPoint(
        theta=theta,
        value=value,
        value_error=value_error,
        gradient_norm=g_norm,
        gradient_floor=floor,
        index=found,
        kind=kind,
        gap=gap,
        lipschitz=K,
        lipschitz_kind=K_kind,
        h=h,
        radius=radius,
        isolation=isolation,
        certified=not reason,
        reason=reason,
        num_gradients=walk.num_gradients,
        num_matvecs=walk.num_matvecs,
        kink_distance=distance,
    )


def _reason(walk: Walk, found: IndexResult, kind: str, unproved: str, h: float) -> str:
    """Why a point is not certified; empty if it is."""
    kinks = walk.landscape.kinks
    if kinks:
        return f"f is not twice differentiable everywhere: {kinks[0]}"
    if kind == "kink":
        return "the gradient jumps at the point, or has lost half of its digits"
    if kind == "degenerate":
        return (
            f"an eigenvalue is zero at the noise floor {found.noise_floor:.1e}, as with continuous "
            "symmetries; give each parameter its own l2, or add a tilt"
        )
    if kind == "gradient-flat":
        return (
            "the gradient is not zero, but lies in the null space of the Hessian; start elsewhere"
        )
    if found.confidence < 1 or not found.certified or found.lower != found.upper:
        return "the index is known with a probability only, or within an interval"
    if not h <= 0.5:
        spent = f"; {walk.num_gradients:,} gradients are spent" if not walk.left else ""
        if math.isinf(h):
            return f"no gap around 0 is known in the spectrum of the Hessian{spent}"
        return f"h is {h:.1e}, above 1/2: the gradient is too large for the gap{spent}"
    return f"the Lipschitz constant is estimated: {unproved}" if unproved else ""


def _roundoff(
    walk: Walk, theta: Tensor, value: float, g: Tensor, H: Any, generator: torch.Generator
) -> tuple[float, float, float]:
    """Bounds on the round-off of the gradient and of f at a point.

    At points ``theta + e`` a few units of round-off away the gradient is ``g + H e`` up to
    ``||e||^2``, and what it differs by is the round-off of two gradients. All operations
    contribute, other than between two orders of summation over the examples.

    Returns:
        The bound for the gradient; the gradient's size at the floating-point numbers next to a true
        critical point, ``||H e||``; and the bound for f.
    """
    u = torch.finfo(theta.dtype).eps / 2
    typical = norm(theta) / len(theta) ** 0.5 or 1.0
    g_off, f_off, nearest = u * norm(g), u * abs(value), 0.0
    for _ in range(3):
        xi = torch.randn(len(theta), generator=generator, dtype=theta.dtype).to(theta.device)
        # What is added in fact, after rounding.
        near = theta + 4 * u * xi * (theta.abs() + typical)
        e = near - theta
        change = H.matvec(e)
        nearest = max(nearest, norm(change))
        walk.num_gradients += 1
        value_near, g_near = walk.landscape.value_and_gradient(near)
        g_off = max(g_off, norm(g_near - g - change))
        f_off = max(f_off, abs(value_near - value - float(g @ e)))
    return _SAFETY * g_off, nearest, _SAFETY * f_off


def _index_and_gap(H: Any) -> tuple[IndexResult, float]:
    """The index, and a lower bound on the absolute values of eigenvalues; NaN if none is known."""
    n = H.shape[0]
    if n > EXACT_UP_TO:
        # Where no eigenvalue is negative the lowest tells where the gap ends, and factorisations
        # prove that it is empty. At a saddle a positive one may be nearer to 0.
        lowest = float(eigsh(H, k=1, which="SA", tol=1e-6).values[0])
        if n > INERTIA_UP_TO:
            return (index(H, 0.9 * lowest), 0.9 * lowest) if lowest > 0 else (index(H), math.nan)
        if lowest > 0:
            found = index(H, 0.9 * lowest, method=Inertia())
            if found.nullity == 0:
                return found, found.tau
    found = index(H, method=Exact())
    assert found.eigenvalues is not None
    return found, float(found.eigenvalues.abs().min())


def _lipschitz(
    F: Landscape,
    theta: Tensor,
    radius: float,
    lipschitz: str | float,
    generator: torch.Generator,
) -> tuple[float, str, str]:
    """A Lipschitz constant of the Hessian on a ball, its kind, and why it is not proved."""
    if not isinstance(lipschitz, str):
        return float(lipschitz), "given", ""
    unproved = "as asked for"
    if lipschitz == "proved":
        try:
            return F.proved_lipschitz(theta, radius), "proved", ""
        except InputError as error:
            unproved = str(error)
    return estimated_lipschitz(F, theta, generator=generator), "estimated", unproved
