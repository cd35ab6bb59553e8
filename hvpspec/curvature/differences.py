"""Derivatives compared with central differences, whose own error is measured with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: A function's value and gradient at a point.
ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]

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
    theta: Tensor,
    here: tuple[float, Tensor],
    v: Tensor,
    product: Tensor,
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
        theta: the point, shape (n,).
        here: the value and the gradient at it.
        v: the direction, of norm 1, shape (n,).
        product: ``A v``, shape (n,).
        u: unit round-off of the function.
        enough: a defect that is small enough to stop at.

    Returns:
        The comparison of the product, and that of the gradient.

    Reference:
        Gill, Murray & Wright, Practical Optimization, section 8.6, on the choice of h.
    """
    value, gradient = here
    scale = _norm(theta) or 1.0
    slope = float(gradient @ v)
    by_product, by_value = Comparison(False, 0.0), Comparison(False, 0.0)
    h = u**0.6 * scale
    above, g_above = f(torch.add(theta, v, alpha=h))
    rise = h * (slope + float(g_above @ v)) / 2
    size = max(_norm(product), _norm(gradient) / scale)
    is_same = _norm((g_above - gradient).div_(h).sub_(product)) <= enough * size
    if is_same and abs(above - value - rise) <= enough * abs(rise):
        return Comparison(True, 0.0), Comparison(True, 0.0)
    for h in (u**0.5 * scale, u ** (2 / 3) * scale, u ** (1 / 3) * scale):
        above, g_above = f(torch.add(theta, v, alpha=h))
        below, g_below = f(torch.add(theta, v, alpha=-h))
        off = _norm((g_above + g_below).sub_(gradient, alpha=2))
        slopes = (g_above - g_below).div_(2 * h)
        size = _norm(slopes)
        by_product = _better(
            by_product,
            _judge(
                _norm(slopes.sub_(product)),
                (4 * off + 16 * u * _norm(gradient)) / h,
                max(_norm(product), size),
                _norm(gradient) / scale,
                u,
            ),
        )
        off = abs(above - 2 * value + below)
        by_value = _better(
            by_value,
            _judge(
                abs((above - below) / (2 * h) - slope),
                (4 * off + 16 * u * abs(value)) / h,
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


def _norm(x: Tensor) -> float:
    """The norm of a vector."""
    return float(torch.linalg.vector_norm(x))
