"""Derivatives compared with central differences, whose own error is measured with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: A vector in parts, by name; a part that is missing is zero. Large vectors stay in parts, since
#: much memory that is asked for at once is slow to come.
Parts = Mapping[str, Tensor]
#: A function's value and gradient at a point.
ValueAndGradient = Callable[[Parts], tuple[float, Parts]]

# A difference says something if its own error is at most so much of what it is compared with: more
# where digits are few.
_CONCLUSIVE = {True: 0.02, False: 0.2}


@dataclass(frozen=True)
class Comparison:
    """How far a derivative is from differences.

    Attributes:
        is_conclusive: whether the differences were exact enough to say so.
        defect: what is not explained by the error of the differences, relative to the derivative.
    """

    is_conclusive: bool
    defect: float


def compare(
    f: ValueAndGradient,
    theta: Parts,
    here: tuple[float, Parts],
    v: Parts,
    product: Parts,
    u: float,
    enough: float,
) -> tuple[Comparison, Comparison]:
    """Compare ``A v`` with differences of a gradient, and the gradient with those of the function.

    Differences at ``theta +- h v`` are off by their round-off, some ``u ||g|| / h``, by what is
    left of higher derivatives, and by kinks: where one lies between the two points the gradient
    jumps by J, and its difference by ``J / 2h``, for every h. All three show in the second
    difference ``g+ - 2 g + g-``, which has the size of the round-off, ``h^2 |D^3 f|`` and J:
    divided by h it tells the error, if not where kinks happen to cancel. Where one difference to
    one side agrees, ``h = u^0.6 ||theta||``, nothing more is asked. Otherwise a small step comes
    first, ``h = u^(1/2) ||theta||``, between whose points few kinks lie, then a smaller one,
    ``u^(2/3) ||theta||``, and where round-off is too large for these a larger one,
    ``u^(1/3) ||theta||``, at which round-off and third derivatives balance. A fault stays at each.

    Args:
        f: the function.
        theta: the point.
        here: the value and the gradient at it.
        v: the direction, of norm 1.
        product: ``A v``.
        u: unit round-off of the function.
        enough: a defect that is small enough to stop at.

    Returns:
        The comparison of the product, and that of the gradient.

    Reference:
        Gill, Murray & Wright, Practical Optimization, section 8.6, on the choice of h.
    """
    value, gradient = here
    # At a point that is 0 but for round-off, as a critical one may be, a step relative to it would
    # be lost in the round-off of the gradient.
    scale = norm(theta) if norm(theta) > u**0.5 else 1.0
    slope = inner(gradient, v)
    by_product, by_value = Comparison(False, 0.0), Comparison(False, 0.0)
    h = u**0.6 * scale
    above, g_above = f(moved(theta, h, v))
    rise = h * (slope + inner(g_above, v)) / 2
    size = max(norm(product), norm(gradient) / scale)
    off = distance((1 / h, g_above), (-1 / h, gradient), (-1, product))
    if off <= enough * size and abs(above - value - rise) <= enough * abs(rise):
        return Comparison(True, 0.0), Comparison(True, 0.0)
    for h in (u**0.5 * scale, u ** (2 / 3) * scale, u ** (1 / 3) * scale):
        above, g_above = f(moved(theta, h, v))
        below, g_below = f(moved(theta, -h, v))
        by_product = _better(
            by_product,
            _judge(
                distance((0.5 / h, g_above), (-0.5 / h, g_below), (-1, product)),
                (4 * distance((1, g_above), (1, g_below), (-2, gradient)) + 16 * u * norm(gradient))
                / h,
                max(norm(product), distance((0.5 / h, g_above), (-0.5 / h, g_below))),
                norm(gradient) / scale,
                u,
            ),
        )
        by_value = _better(
            by_value,
            _judge(
                abs((above - below) / (2 * h) - slope),
                (4 * abs(above - 2 * value + below) + 16 * u * abs(value)) / h,
                max(abs(slope), abs(above - below) / (2 * h)),
                0.0,
                u,
            ),
        )
        if all(c.is_conclusive and c.defect <= enough for c in (by_product, by_value)):
            break
    return by_product, by_value


def _judge(difference: float, error: float, size: float, scale: float, u: float) -> Comparison:
    """Judge a difference.

    Args:
        difference: between a derivative and its approximation.
        error: what the approximation itself may be off.
        size: of the derivative, or of its approximation, whichever is larger.
        scale: below which, times the share that is conclusive, a derivative is nothing.
        u: unit round-off.
    """
    if not math.isfinite(difference + error + size):
        return Comparison(False, 0.0)
    is_conclusive = error <= _CONCLUSIVE[u < 1e-10] * max(size, scale)
    defect = max(0.0, difference - error) / size if size else 0.0
    return Comparison(is_conclusive, defect if is_conclusive else 0.0)


def slope_defect(value: float, above: float, below: float, slope: float, u: float) -> float:
    """How far a slope is from the difference of two values on both sides, relative to it.

    Args:
        value: of the function at a point.
        above: a step further.
        below: a step back.
        slope: how much the function should rise with a step.
        u: unit round-off of the function.

    Returns:
        The relative defect; 0 where round-off and what second differences tell of higher
        derivatives and kinks explain it.
    """
    defect = abs((above - below) / 2 - slope)
    error = 16 * u * abs(value) + abs(above - 2 * value + below) / 16
    return defect / max(abs(slope), abs(above - below) / 2) if defect > error else 0.0


def _better(before: Comparison, now: Comparison) -> Comparison:
    """What two steps say together: agreement at either is agreement."""
    if not (before.is_conclusive and now.is_conclusive):
        return before if before.is_conclusive else now
    return min(before, now, key=lambda comparison: comparison.defect)


def inner(x: Parts, y: Parts) -> float:
    """The inner product of two vectors."""
    return sum(float((x[name] * y[name]).sum()) for name in x if name in y)


def norm(x: Parts) -> float:
    """The norm of a vector."""
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in x.values()))


def distance(*terms: tuple[float, Parts]) -> float:
    """The norm of a sum of vectors, each times a factor."""
    norms = []
    for name in dict.fromkeys(name for _, x in terms for name in x):
        total, *others = (factor * x[name] for factor, x in terms if name in x)
        for other in others:
            total.add_(other)
        norms.append(float(torch.linalg.vector_norm(total)))
    return math.hypot(*norms)


def moved(theta: Parts, t: float, v: Parts) -> dict[str, Tensor]:
    """``theta + t v``; parts that ``theta`` lacks stay out."""
    return {
        name: torch.add(part, v[name], alpha=t) if name in v else part.clone()
        for name, part in theta.items()
    }
