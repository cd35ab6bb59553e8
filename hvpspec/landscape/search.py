"""All critical points that are found from many starts, and whether they can be all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.landscape.critical import CriticalPoint, certify
from hvpspec.landscape.landscapes import Landscape
from hvpspec.landscape.steps import Walk
from hvpspec.landscape.symmetry import Symmetries
from hvpspec.linalg.probes import seeded
from hvpspec.results import Result

# Newton steps from each start. Those that are not there by then are left out.
_MOST_STEPS = 200

# Points whose Newton step is shorter, relative to their norm, have converged; the last steps are
# quadratic and end at round-off.
_CONVERGED = 1e-9


def critical_points(
    F: Landscape,
    starts: Tensor,
    *,
    max_index: int | None = None,
    symmetries: Symmetries | None = None,
    lipschitz: Literal["proved", "estimated"] | float = "proved",
    generator: torch.Generator | None = None,
) -> tuple[CriticalPoint, ...]:
    """All critical points, of whatever index, that Newton's method finds from many starts.

    All starts move at once, each with a trust region of its own in which the gradient's norm falls.
    Two ends are the same point if one lies where the other is proved to be the only one, and
    different if their balls are disjoint: no tolerance decides, where constants are proved.

    Args:
        F: the landscape, small enough for dense Hessians of all points at once, or of each.
        starts: shape (s, n).
        max_index: leave out points of higher index; None for none.
        symmetries: of the landscape, one point of each orbit of which is returned; None for all.
        lipschitz: as for :func:`critical_point`.
        generator: likewise.

    Returns:
        The points, by their values.

    Raises:
        InputError: an argument is not allowed.
        HvpspecError: f or its derivatives cannot be computed.

    Example:
        >>> from hvpspec.landscape import FunctionLandscape
        >>> F = FunctionLandscape(2, lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2)
        >>> starts = torch.tensor([[1.5, 1.0], [0.1, 0.0], [-2.0, 1.0]], dtype=torch.float64)
        >>> [(p.kind, p.value) for p in critical_points(F, starts, lipschitz=48.0)]
        [('minimum', 0.0), ('minimum', 0.0), ('saddle of index 1', 1.0)]
    """
    starts = torch.as_tensor(starts, device=F.device).detach()
    if starts.ndim != 2 or starts.shape[1] != F.n:
        raise InputError(f"starts must have shape (s, {F.n}), got {tuple(starts.shape)}")
    if starts.is_complex() or not bool(torch.isfinite(starts).all()):
        raise InputError("starts must hold finite real numbers")
    starts = starts.to(F.dtype)
    if max_index is not None and not 0 <= max_index <= F.n:
        raise InputError(f"max_index must be between 0 and {F.n}, got {max_index}")
    generator = seeded(generator)
    ends, steps = _newton_all(F, starts)
    if len(ends):
        # Newton's method sees gradients alone, and may leave the domain of f.
        values = F.values(ends).to(ends.device)
        order = values.argsort()[: int(values.isfinite().sum())]
        ends, steps = ends[order], steps[order]
    found: list[CriticalPoint] = []
    while len(ends):
        point = certify(F, ends[0], lipschitz=lipschitz, generator=generator, walk=Walk(F))
        images = ends[:1] if symmetries is None else symmetries.images(ends[0])
        # Twice a Newton step bounds the distance to the true point where h <= 1/2. Differences, not
        # products, tell nearby points apart.
        distances = torch.cdist(ends, images, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.amin(1)
        others = ~point.holds(distances, 2 * steps)
        others[0] = False
        ends, steps = ends[others], steps[others]
        if point.kind in ("gradient-flat", "not reached", "kink"):
            continue
        if any(_is_among(images, point.ball, known) for known in found):
            continue
        if point.kind == "degenerate" or max_index is None or point.index.lower <= max_index:
            found.append(point)
    return tuple(found)


def _is_among(images: Tensor, radius: float, known: CriticalPoint) -> bool:
    """Whether one of the images of a point is a known point."""
    distances = torch.linalg.vector_norm(images - known.theta, dim=1)
    return bool(known.holds(distances, radius).any())


def _newton_all(F: Landscape, thetas: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method from many points at once, each in a trust region of its own.

    Returns:
        The ends that have converged, shape (m, n), and the lengths of their last steps, shape (m,).
    """
    thetas = thetas.clone()
    sizes = torch.linalg.vector_norm(thetas, dim=1).clamp(min=1.0)
    trust = 0.5 * sizes
    g = F.gradients(thetas)
    done = ~torch.isfinite(g).all(1)  # out of the domain of f
    last = torch.full_like(trust, torch.inf)
    for _ in range(_MOST_STEPS):
        active = (~done).nonzero().flatten()
        if not len(active):
            break
        H = F.hessians(thetas[active])
        is_finite = torch.isfinite(H).flatten(1).all(1)
        done[active[~is_finite]] = True
        active, H = active[is_finite], H[is_finite]
        x, gx = thetas[active], g[active]
        p = _newton_steps(H, gx)
        length = torch.linalg.vector_norm(p, dim=1)
        p = p * (trust[active] / length).clamp(max=1.0)[:, None]
        moved = x + p
        g_new = F.gradients(moved)
        before, after = (torch.linalg.vector_norm(v, dim=1) for v in (gx, g_new))
        accept = after < before
        # At round-off no step lowers the norm, and the step is as short as rounding makes it.
        short = length <= _CONVERGED * sizes[active]
        done[active] = (short & ~accept) | (after == 0)
        last[active] = torch.where(short, length, last[active])
        last[active[after == 0]] = 0.0
        thetas[active[accept]], g[active[accept]] = moved[accept], g_new[accept]
        grown = torch.where(accept, 2 * trust[active], trust[active].minimum(length) / 4)
        trust[active] = grown.minimum(sizes[active])
        done[active[(trust[active] < 1e-14 * sizes[active])]] = True
    there = last < torch.inf
    return thetas[there], last[there]


def _newton_steps(H: Tensor, g: Tensor) -> Tensor:
    """``-H^-1 g`` for a stack of matrices, without the parts of g in their null spaces."""
    values, vectors = torch.linalg.eigh(H)
    floor = len(g[0]) * torch.finfo(g.dtype).eps * values.abs().amax(1, keepdim=True)
    counted = values.abs() > floor
    c = (vectors.mT @ g[:, :, None])[:, :, 0]
    scaled = torch.where(counted, c / torch.where(counted, values, 1.0), 0.0)
    steps: Tensor = -(vectors @ scaled[:, :, None])[:, :, 0]
    return steps


@dataclass(frozen=True, repr=False)
class MorseCheck(Result):
    """Whether critical points can be all that there are, by the Morse inequalities.

    Attributes:
        counts: the number of points of each index, from 0.
        euler_sum: ``sum_k (-1)^k counts[k]``, 1 for all critical points of a function that is
            coercive, as any loss with l2 is.
        complete: False where points must be missing; True where nothing says so.
        message: what that means.
    """

    counts: tuple[int, ...]
    euler_sum: int
    complete: bool
    message: str


def morse_check(
    points: Sequence[CriticalPoint], symmetries: Symmetries | None = None
) -> MorseCheck:
    """Check the Morse inequalities of a coercive function on some of its critical points.

    Args:
        points: distinct ones, as :func:`critical_points` returns them.
        symmetries: those by which the points were taken together; each counts for its orbit.

    Returns:
        The counts, and whether the inequalities hold. That they do does not prove that all are
        found: a saddle and a minimum may be missing together.

    Raises:
        InputError: a point is none or degenerate, or its index is not known, or two are the same.

    Reference:
        Milnor, Morse Theory, section 5: with Betti numbers 1, 0, 0, ... of the whole space, ``c_k -
        c_{k-1} + ... +- c_0 >= (-1)^k`` for each k, and equality for the last.

    Example:
        >>> from hvpspec.landscape import FunctionLandscape
        >>> F = FunctionLandscape(2, lambda x: (x[0] ** 2 - 1) ** 2 + x[1] ** 2)
        >>> starts = torch.tensor([[1.5, 1.0], [0.1, 0.0], [-2.0, 1.0]], dtype=torch.float64)
        >>> morse_check(critical_points(F, starts, lipschitz=48.0)).counts
        (2, 1)
    """
    points = tuple(points)
    for k, point in enumerate(points):
        is_one = point.kind == "minimum" or point.kind.startswith("saddle")
        if not is_one or point.index.index is None:
            raise InputError(
                f"the Morse inequalities need nondegenerate critical points, but one with f = "
                f"{point.value:.6g} is {point.kind}; add l2 or a tilt"
            )
        if any(_is_among(point.theta[None], point.ball, other) for other in points[:k]):
            raise InputError(f"two of the points, with f = {point.value:.6g}, are the same")
    found: Counter[int] = Counter()
    for point in points:
        found[point.index.lower] += 1 if symmetries is None else symmetries.orbit_size(point)
    counts = tuple(found[k] for k in range(max(found, default=-1) + 1))
    alternating, missing = 0, ""
    for k, count in enumerate(counts):
        alternating = count - alternating
        if alternating < (-1) ** k and not missing:
            missing = (
                f"incomplete: too few points of index {k}, since "
                f"c_{k} - c_{k - 1} + ... must be at least {(-1) ** k}, not {alternating}"
            )
    total = sum((-1) ** k * count for k, count in enumerate(counts))
    if not missing and total != 1:
        missing = f"incomplete: sum (-1)^k c_k is {total}, and 1 if no point is missing"
    message = missing or "no point is missing as far as the Morse inequalities tell"
    return MorseCheck(counts, total, not missing, message)
