"""Functions whose critical points are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hvpspec.landscape import FunctionLandscape

DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def muller_brown() -> FunctionLandscape:
    """Müller & Brown 1979: three minima and two saddles."""
    A, a, b = tensor(-200, -100, -170, 15), tensor(-1, -1, -6.5, 0.7), tensor(0, 0, 11, 0.6)
    c, x0, y0 = tensor(-10, -10, -6.5, 0.7), tensor(1, 0, -0.5, -1), tensor(0, 0.5, 1.5, 1)

    def f(p: Tensor) -> Tensor:
        x, y = p[0] - x0, p[1] - y0
        return (A * torch.exp(a * x**2 + b * x * y + c * y**2)).sum()

    return FunctionLandscape(2, f)


def two_factors(lam: float) -> FunctionLandscape:
    """``(a b - 1)^2 / 2 + lam (a^2 + b^2)``."""
    return FunctionLandscape(2, lambda p: (p[0] * p[1] - 1) ** 2 / 2 + lam * p @ p)


def monkey() -> FunctionLandscape:
    """A monkey saddle at 0, with three minima around it."""
    return FunctionLandscape(2, lambda p: p[0] ** 3 - 3 * p[0] * p[1] ** 2 + (p @ p) ** 2)


def gradient_flat() -> FunctionLandscape:
    """No critical point; ``||g||`` has a minimum of 1 at 0."""
    return FunctionLandscape(2, lambda p: p[0] ** 3 / 3 + p[0] + p[1] ** 2 / 2)


def factorisation(M: Tensor, r: int, lam: float = 0.0) -> FunctionLandscape:
    """``||U U^T - M||^2 / 4 + lam ||U||^2``, U of shape (n, r)."""
    n = len(M)

    def f(p: Tensor) -> Tensor:
        U = p.view(n, r)
        return (U @ U.T - M).square().sum() / 4 + lam * p @ p

    return FunctionLandscape(n * r, f)


def deep_linear(M: Tensor, h: int) -> FunctionLandscape:
    """``||W2 W1 - M||^2 / 2`` with h hidden units."""
    dy, dx = M.shape

    def f(p: Tensor) -> Tensor:
        W2, W1 = p[: dy * h].view(dy, h), p[dy * h :].view(h, dx)
        return (W2 @ W1 - M).square().sum() / 2

    return FunctionLandscape(dy * h + h * dx, f)


def two_units() -> FunctionLandscape:
    """``sum_j v_j tanh(w_j x)`` on three examples, lam = 0.01."""
    x, y = tensor(0.5, 1, 2), tensor(1, -0.5, 0.5)

    def f(p: Tensor) -> Tensor:
        w, v = p[:2], p[2:]
        return (v @ torch.tanh(w[:, None] * x) - y).square().sum() / 6 + 0.01 * p @ p

    return FunctionLandscape(4, f)


def xor(h: int, lam: float) -> FunctionLandscape:
    """XOR by a 2-h-1 tanh network with biases, logistic loss, and l2 on all parameters."""
    X = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=DOUBLE)
    t = -X[:, 0] * X[:, 1]

    def f(p: Tensor) -> Tensor:
        W, b, v, c = p[: 2 * h].view(h, 2), p[2 * h : 3 * h], p[3 * h : 4 * h], p[4 * h]
        return F.softplus(-t * (torch.tanh(X @ W.T + b) @ v + c)).mean() + lam * p @ p

    return FunctionLandscape(4 * h + 1, f)


def xor_images(thetas: Tensor) -> Tensor:
    """Starts with their images under the symmetries of XOR by two hidden units.

    What is found from one is found from all: orders and signs of hidden units, an exchange of the
    inputs, and a sign of an input, which changes the sign of the output.
    """
    W, b, v, c = thetas[:, :4].view(-1, 2, 2), thetas[:, 4:6], thetas[:, 6:8], thetas[:, 8:]
    images = [(W, b, v, c)]
    for sign in (tensor(-1, 1), tensor(1, -1)):  # of a hidden unit, and of an input
        images += [(W * sign[:, None], b * sign, v * sign, c) for W, b, v, c in images]
        images += [(W * sign, b, -v, -c) for W, b, v, c in images]
    images += [(W.flip(1), b.flip(1), v.flip(1), c) for W, b, v, c in images]
    images += [(W.flip(2), b, v, c) for W, b, v, c in images]
    return torch.cat([torch.cat([W.flatten(1), b, v, c], dim=1) for W, b, v, c in images])
