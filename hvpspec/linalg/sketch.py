"""Leave-one-out estimates from a sketch ``A Omega = Q C``, with Q orthonormal and ``Z = A Q``.

Shapes: Omega (n, m); Q and Z (n, r); C (r, m); everything small is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows converted to float64 at once.
_STRIPE = 65536


def left_out(C: Tensor) -> Tensor:
    """The unit vectors s_i (r, m) that range(C) loses without column i; 0 where it loses none.

    Without probe i the projection ``Q Q^T`` becomes ``Q (I - s_i s_i^T) Q^T``. If C is square,
    ``s_i`` is along column i of ``C^-T``; in general column i matters if e_i is in the row space.
    """
    if len(C) == 0:
        return C
    U, sigma, Vh = torch.linalg.svd(C, full_matrices=False)
    eps = torch.finfo(torch.float64).eps
    S = U @ (Vh * (sigma[-1] / sigma.clamp_min(eps * float(sigma[0])))[:, None])
    matters = Vh.square().sum(0) > 1 - 10 * C.shape[1] * eps
    return torch.where(matters, S / torch.linalg.vector_norm(S, dim=0), 0.0)


def xtrace_samples(
    Omega: Tensor, Q: Tensor, Z: Tensor, C: Tensor, S: Tensor, *, normalise: bool
) -> Tensor:
    """``tr(Q_i^T A Q_i) + v_i^T A v_i`` (m,), where ``v_i = (I - Q_i Q_i^T) omega_i``."""
    H, W = inner(Q, Z), inner(Q, Omega)
    X = W - S * (S * W).sum(0)  # Q_i Q_i^T omega_i = Q x_i
    remainder = ((W - 2 * X) * C).sum(0) + (X * (H @ X)).sum(0)
    if normalise:
        dim = Omega.shape[0] - Q.shape[1] + S.any(0).double()
        norms = torch.linalg.vector_norm(Omega, dim=0, dtype=torch.float64)
        remainder *= dim / (norms.square() - X.square().sum(0))
    return H.trace() - (S * (H @ S)).sum(0) + remainder


def xdiag_samples(Omega: Tensor, Q: Tensor, Z: Tensor, C: Tensor, S: Tensor) -> Tensor:
    """``diag(Q_i Q_i^T A) + omega_i * (I - Q_i Q_i^T) A omega_i`` (n, m)."""
    QS, ZS = Q @ S.to(Q.dtype), Z @ S.to(Q.dtype)
    # A omega_i = Q c_i, of which Q_i misses the part along Q s_i.
    remainder = Omega.double() * QS * (S * C).sum(0)
    return entries(Q, Z).sum(1, keepdim=True) - entries(QS, ZS) + remainder


def entries(V: Tensor, AV: Tensor) -> Tensor:
    """``v * (A v)`` (n, k)."""
    return V.double() * AV.double()


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """``X^T Y`` in float64, converted a stripe at a time."""
    stripes = [slice(i, i + _STRIPE) for i in range(0, len(X), _STRIPE)]
    return torch.stack([X[rows].double().mT @ Y[rows].double() for rows in stripes]).sum(0)
