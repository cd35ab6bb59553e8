"""Down: past saddles, and off degenerate points where a third derivative shows the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.landscape.critical import CriticalPoint, certify
from hvpspec.landscape.landscapes import Landscape
from hvpspec.landscape.lipschitz import third_derivative
from hvpspec.landscape.steps import MAX_GRADIENTS, Observer, Walk, downhill, minimise, norm
from hvpspec.linalg.probes import require_count, seeded
from hvpspec.results import Result, Row
from hvpspec.spectrum.morse import index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Starts and steps of the power iteration for the largest third derivative, enough where the null
# space has a few tens of dimensions.
_STARTS, _STEPS = 8, 60

# Steps off degenerate points before the search stops; each lowers f.
_MOST_STEPS = 20


@dataclass(frozen=True, eq=False, repr=False)
class Descent(Result):
    """A way down, on which f never rises.

    Attributes:
        points: the first and the last, some after 8, 64, 512, ... steps of L-BFGS, and those at
            which it turned, shape (k, n).
        values: f there, shape (k,).
        gradient_norms: shape (k,).
        indices: how many eigenvalues lie below ``-tau`` there, for each of ``taus``, shape (k, t).
        taus: shape (t,).
        third_order: the largest ``|D^3 f[v, v, v]|`` over unit vectors v of the null space at the
            end; 0 where there is none, or where it was not asked for.
        end: what the last point is.
    """

    points: Tensor
    values: Tensor
    gradient_norms: Tensor
    indices: Tensor
    taus: Tensor
    third_order: float
    end: CriticalPoint

    _FORMAT = "hvpspec-descent"

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw f and the index side by side.

        Args:
            title: one line above the picture.

        Returns:
            The figure, which a notebook shows.
        """
        from hvpspec.plotting import plot_descent

        return plot_descent(self, title=title)

    def rows(self, subject: object = None) -> list[Row]:
        """The lines of the table: each point on the way."""
        lines: list[Row] = []
        for k, (f, g, counts) in enumerate(
            zip(self.values, self.gradient_norms, self.indices, strict=True)
        ):
            told = ", ".join(
                f"{int(count)} below {-tau:.2g}"
                for tau, count in zip(self.taus.tolist(), counts, strict=True)
            )
            lines.append((f"point {k}", f"f = {float(f):.9g}", f"|g| = {float(g):.1e}; {told}"))
        return [*lines, *self.end.rows()]

    def _brief(self) -> dict[str, object]:
        """What ``repr`` shows."""
        values = self.values.tolist()
        return {"points": len(values), "f": values[0], "to": values[-1], "end": self.end.kind}


def lower_index(
    F: Landscape,
    theta: Tensor,
    *,
    order: Literal[2, 3] = 2,
    taus: tuple[float, ...] = (1e-2, 1e-4, 1e-6),
    lipschitz: Literal["proved", "estimated"] | float = "proved",
    max_gradients: int = MAX_GRADIENTS,
    generator: torch.Generator | None = None,
    observer: Observer | None = None,
) -> Descent:
    """Go down from a point until no direction of negative curvature is left.

    Args:
        F: the landscape.
        theta: where to begin, shape (n,).
        order: 2 ends where no eigenvalue is negative; 3 leaves such a point, too, where f has a
            third derivative along its null space, as at a monkey saddle. Above 2,000 parameters
            one vector of that space is looked at.
        taus: thresholds of the indices that are told on the way.
        lipschitz: as for :func:`critical_point`.
        max_gradients: likewise.
        generator: likewise.
        observer: likewise.

    Returns:
        The way, and what it ends at.

    Raises:
        InputError: an argument is not allowed.
        HvpspecError: f or its derivatives cannot be computed.

    Reference:
        Anandkumar & Ge, Efficient approaches for escaping higher order saddle points in non-convex
        optimization (COLT 2016).

    Example:
        >>> from hvpspec.landscape import FunctionLandscape
        >>> F = FunctionLandscape(2, lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2)
        >>> way = lower_index(F, torch.zeros(2), lipschitz=48.0)
        >>> way.values.tolist(), way.end.kind
        ([1.0, 0.0], 'minimum')
    """
    if order not in (2, 3):
        raise InputError(f"order must be 2 or 3, got {order!r}")
    require_count("max_gradients", max_gradients)
    points = [F.point(theta)]
    num_steps, third = 0, 0.0

    def note(theta: Tensor, value: float, gradient_norm: float) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps in (8, 64, 512, 4096):
            points.append(theta.clone())
        if observer is not None:
            observer(theta, value, gradient_norm)

    generator, walk = seeded(generator), Walk(F, note, max_gradients)
    for _ in range(_MOST_STEPS):
        theta = minimise(walk, points[-1])
        if F.value(theta) < F.value(points[-1]):
            points.append(theta)
        if order == 2:
            break
        v, third, floor = _steepest_cubic(walk, points[-1], generator)
        if v is None or third <= floor:
            break
        lower = downhill(walk, points[-1], -v, torch.zeros_like(v), 0.0)
        if lower is None:
            break
        points.append(lower)
    end = certify(F, points[-1], lipschitz=lipschitz, generator=generator, walk=walk)
    ladders = [index(F.hessian(point), tau_ladder=taus, generator=generator) for point in points]
    counts = [[round(rung.estimate) for rung in found.ladder] for found in ladders]
    values, gradients = zip(*map(F.value_and_gradient, points), strict=True)
    return Descent(
        points=torch.stack(points),
        values=torch.tensor(values, dtype=F.dtype),
        gradient_norms=torch.tensor(list(map(norm, gradients)), dtype=F.dtype),
        indices=torch.tensor(counts),
        taus=torch.tensor(sorted(taus, reverse=True), dtype=F.dtype),
        third_order=third,
        end=end,
    )


def _steepest_cubic(
    walk: Walk, theta: Tensor, generator: torch.Generator
) -> tuple[Tensor | None, float, float]:
    """The unit vector of the null space along which ``|D^3 f[v, v, v]|`` is largest.

    By ``v <- normalise(P D^3 f[v, v, .])`` from several starts, P the projection on the null space:
    a symmetric power iteration, shifted by the largest value so far, which makes it ascend (Kolda &
    Mayo 2011).

    Returns:
        The vector, signed so that f rises along it, the value, and its floor; None without a null
        space.
    """
    H = walk.curvature(theta)
    null = H.vectors[:, H.values.abs() <= max(H.floor, 1e-8 * max(H.norm, 1.0))]
    if not null.shape[1]:
        return None, 0.0, 0.0
    best, most = null[:, 0], 0.0
    for _ in range(_STARTS):
        c = torch.randn(null.shape[1], generator=generator, dtype=null.dtype).to(null.device)
        v = null @ (c / torch.linalg.vector_norm(c))
        for _ in range(_STEPS):
            moved = null @ (null.T @ third_derivative(walk.landscape, theta, v))
            value = float(moved @ v)
            if abs(value) > most:
                best, most = (v if value > 0 else -v), abs(value)
            moved = moved + (abs(value) if value >= 0 else -abs(value)) * v
            if norm(moved) == 0:
                break
            v = moved / norm(moved)
    # Differences of products at points a step t = u^(1/3) apart are off by some u^(2/3) ||H||.
    u = torch.finfo(theta.dtype).eps / 2
    return best, most, 1e2 * u ** (2 / 3) * max(H.norm, 1.0)
