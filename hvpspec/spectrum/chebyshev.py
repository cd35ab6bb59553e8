"""Counting by a Chebyshev filter, in the memory of a few vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvpspec.linalg.operator import Progress, SymmetricOperator
from hvpspec.linalg.probes import draw_probes


def chebyshev_moments(
    A: SymmetricOperator,
    radius: float,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Estimate ``tr T_k(A / radius)`` for k up to ``2 num_steps``, one row a probe.

    A step of the three-term recurrence gives two moments, since ``2 T_j T_k = T_(j+k) + T_(j-k)``.

    Args:
        A: the operator.
        radius: its spectrum lies within ``[-radius, radius]``.
        num_probes: Rademacher probes, which advance together.
        num_steps: block products.
        generator: the source of the probes.
        progress: called with the number of products done and their total.

    Returns:
        float64, shape (num_probes, 2 num_steps + 1).

    Reference:
        Weisse, Wellein, Alvermann & Fehske, The kernel polynomial method, Rev. Mod. Phys. 78
        (2006), section II.B-D; Di Napoli, Polizzi & Saad (2016).
    """
    n = A.shape[0]
    Z = draw_probes(
        "rademacher", n, num_probes, generator, dtype=A.dtype, device=A.device, ranks=A.ranks
    )
    previous, current = Z, A.matmat(Z) / radius
    first, second = _inner(Z, Z), _inner(Z, current)
    moments = [first, second, 2 * _inner(current, current) - first]
    for step in range(1, num_steps):
        previous, current = current, A.matmat(current) * (2 / radius) - previous
        moments.append(2 * _inner(current, previous) - second)
        moments.append(2 * _inner(current, current) - first)
        if progress is not None:
            progress((step + 1) * num_probes, num_steps * num_probes)
    return torch.stack(moments, 1)


def damped_step(x: float, num_moments: int) -> Tensor:
    """Chebyshev coefficients of a smoothed step that is 1 below ``x`` and 0 above.

    Jackson's kernel is positive, so that the smoothed step stays between 0 and 1; its width at 0 is
    :func:`jackson_width`.

    Args:
        x: where the step is, in units of the radius, within [-1, 1] or beyond.
        num_moments: N.

    Returns:
        float64, shape (N,): with moments, the trace of the step of the operator.
    """
    N, k = num_moments, torch.arange(num_moments, dtype=torch.float64)
    theta = math.acos(min(1.0, max(-1.0, x)))
    step = torch.empty(N, dtype=torch.float64)
    step[0] = 1 - theta / math.pi
    step[1:] = -2 / math.pi * torch.sin(k[1:] * theta) / k[1:]
    angle = math.pi / (N + 1)
    jackson = (N - k + 1) * torch.cos(angle * k) + torch.sin(angle * k) / math.tan(angle)
    return step * jackson / (N + 1)


def evaluate(coefficients: Tensor, x: Tensor) -> Tensor:
    """Values of a Chebyshev series at points within [-1, 1], shape (k,)."""
    k = torch.arange(len(coefficients), dtype=torch.float64)
    return torch.cos(torch.acos(x)[:, None] * k) @ coefficients


def jackson_width(num_moments: int) -> float:
    """Standard deviation of Jackson's kernel at 0, in units of the radius."""
    return math.pi / num_moments


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    """Inner products of columns in float64, shape (k,), on the CPU."""
    return torch.sum(X * Y, 0, dtype=torch.float64).cpu()
