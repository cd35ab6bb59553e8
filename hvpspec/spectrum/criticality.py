"""Whether a point is critical, on a scale without units."""

from __future__ import annotations

import math

#: Relative decreases of the loss below which a point counts as critical, and as nearly so. The
#: first is the round-off of a loss that is summed in float64 over many examples.
CRITICAL_BELOW = 1e-12
NEARLY_CRITICAL_BELOW = 1e-6


def relative_decrease(gradient_norm: float, norm: float, loss: float) -> float:
    """How far a point is from critical, on a scale without units.

    A gradient of norm g says nothing by itself: the loss may be multiplied and the parameters
    stretched. A step of length ``g / ||H||`` against the gradient lowers the quadratic model of the
    loss by at least ``g^2 / (2 ||H||)``. Divided by ``|f|`` this has no units: it is the fraction
    of the loss that one safe step still takes away.

    Args:
        gradient_norm: g, the Euclidean norm of the gradient.
        norm: ``||H||``, the spectral norm of the Hessian.
        loss: f.

    Returns:
        ``g^2 / (2 ||H|| |f|)``: 0 at an exact critical point, and infinity where a gradient is left
        but the Hessian or the loss is 0, so that nothing bounds the decrease.

    >>> relative_decrease(0.5, 2.0, 0.25)
    0.25
    """
    if gradient_norm == 0:
        return 0.0
    scale = 2 * norm * abs(loss)
    # Divide twice: the square of a small gradient may underflow.
    return gradient_norm / scale * gradient_norm if scale > 0 else math.inf


def describe_gradient(gradient_norm: float, norm: float, loss: float) -> str:
    """Say in a sentence whether a point is critical, so that its index is that of a saddle.

    Args:
        gradient_norm: Euclidean norm of the gradient.
        norm: spectral norm of the Hessian.
        loss: the loss; the measure is :func:`relative_decrease`.

    >>> describe_gradient(0.0, 5.0, 0.2)
    'a critical point to working precision'
    """
    decrease = relative_decrease(gradient_norm, norm, loss)
    if decrease < CRITICAL_BELOW:
        return "a critical point to working precision"
    measure = f"(‖∇f‖² / 2‖H‖|f| = {decrease:.2g})"
    if decrease < NEARLY_CRITICAL_BELOW:
        return f"nearly a critical point {measure}"
    return f"not a critical point: the index describes the curvature here, not a saddle {measure}"
