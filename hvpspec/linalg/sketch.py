"""Leave-one-out estimates from a sketch ``A Omega = Q C``, with Q orthonormal and ``Z = A Q``.

Sample ``x_i`` tests with probe i what the sketch by all others leaves. ``d_ij`` is its change by
probe j: ``x_i`` less what it would be had j been left out of the sketch as well.

Shapes: Omega (n, m); Q and Z (n, r); C (r, m); everything small is float64. Of several processes
each has its share of the rows of the first three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpspec.linalg.ranks import ALONE, Ranks

#: Rows converted to float64 at once.
_STRIPE = 16384


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


def xtrace(
    n: int, ranks: Ranks, Omega: Tensor, Q: Tensor, Z: Tensor, C: Tensor, *, normalise: bool
) -> tuple[Tensor, Tensor]:
    """The mean of the samples ``x_i = tr(Q_i^T A Q_i) + v_i^T A v_i``, and its standard error.

    Here ``v_i = (I - Q_i Q_i^T) omega_i``, and Q_i is a basis of the sketch without probe i.
    """
    S = left_out(C)
    G, p = _pairs(S)
    H, W = inner(Q, Z, ranks), inner(Q, Omega, ranks)
    F = C - H @ W  # Q^T A (I - Q Q^T) Omega
    K, M, N = S.mT @ H @ S, S.mT @ W, S.mT @ F
    k, mu, nu = (X.diagonal()[:, None] for X in (K, M, N))
    # v_i = (I - Q Q^T) omega_i + mu_i Q s_i. Without probe j it grows by (t^T w_i) Q t, t = t_ij.
    # Row i and column j of tW is t^T w_i, of tF t^T f_i, of tHs t^T H s_i.
    tW, tF, tHs = (p * (X.mT - G * X.diagonal()[:, None]) for X in (M, N, K))
    tHt = p * (p * (k.mT - G * K) - G * tHs)
    form = mu.square() * k + 2 * mu * nu - (W * F).sum(0)[:, None]
    form_without = form + tW.square() * tHt + 2 * tW * (tF + mu * tHs)
    if normalise:
        matters = S.any(0).double()
        dim = n - Q.shape[1] + matters[:, None]
        squares = torch.linalg.vector_norm(Omega, dim=0, dtype=torch.float64).square()
        square = (ranks.sum_(squares) - W.square().sum(0))[:, None] + mu.square()
        form = form * dim / square
        form_without = form_without * (dim + matters * (p > 0)) / (square + tW.square())
    samples = (H.trace() - k + form)[:, 0]
    change = tHt + form - form_without
    return samples.mean(), _standard_error(samples, (change * change.mT).sum())


def xdiag(
    n: int, ranks: Ranks, Omega: Tensor, Q: Tensor, Z: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean of the samples ``diag(Q_i Q_i^T A) + omega_i * (I - Q_i Q_i^T) A omega_i``, (n,).

    The second result is its standard error (n,).
    """
    S = left_out(C)
    G, p = _pairs(S)
    c = (S * C).sum(0)
    values, errors = [], []
    for rows in _stripes(Q):
        x, z = Q[rows].double() @ S, Z[rows].double() @ S
        # A omega_i = Q c_i, of which Q_i misses the part along Q s_i.
        y = Omega[rows].double() * c - z
        samples = entries(Q[rows], Z[rows]).sum(1, keepdim=True) + x * y
        values.append(samples.mean(1))
        errors.append(_standard_error(samples, _changes(x, y, z, G, p)))
    value, error = ranks.whole(torch.stack([torch.cat(values), torch.cat(errors)]), n)
    return value, error


def _changes(x: Tensor, y: Tensor, z: Tensor, G: Tensor, p: Tensor) -> Tensor:
    """The sum over i and j, for each row, of ``d_ij d_ji`` (rows,).

    This is ``d_ij = p_ij^2 (x_j - g_ij x_i) (z_j + g_ij y_i)``, multiplied out for the sake of
    matrix products, and what is equal by symmetry put together.
    """
    w = p**4
    even, odd = w * (1 + G**2), -2 * w * G
    products = (
        (x * z, even, x * z),
        (x * z * y, 2 * even * G, x),
        (x * y, even * G**2, x * y),
        (x * x * z, odd, z),
        (x * x, odd * G, z * y),
        (x * x * y, odd * G**2, y),
        (x * x * z * y, odd * G, torch.ones_like(x)),
    )
    return torch.stack([((left @ B) * right).sum(1) for left, B, right in products]).sum(0)


def _pairs(S: Tensor) -> tuple[Tensor, Tensor]:
    """``G = S^T S`` and p, both (m, m), so that ``t_ij = p_ij (s_j - g_ij s_i)`` is a unit vector.

    It is what range(C) loses without column j once it has lost s_i, or 0 if there is no more to
    lose. (Two probes neither of which matters may do so together. But then, as a rule, the rank of
    A is less than m and the estimate exact; taking t_ij as 0 makes its standard error 0.)
    """
    G = S.mT @ S
    rest = 1 - G.square()
    # Round-off is magnified by 1 / rest. Where half the digits are lost, s_i and s_j are parallel.
    parallel = rest < torch.finfo(torch.float64).eps ** 0.5
    return G, torch.where(parallel, 0.0, rest.rsqrt())


def _standard_error(samples: Tensor, changes: Tensor) -> Tensor:
    """The root of ``var(x) / m + max(c, 0)`` from m samples and the sum of ``d_ij d_ji``, i != j.

    The variance of the mean is the expectation of ``var(x) / m + c`` for ``c = mean(d_ij d_ji)``,
    which is ``cov(x_i, x_j)`` in expectation: whatever the other probes are, x_i has the right mean
    over probe i, and so has ``x_i - d_ij``. The latter does not depend on probe j, hence is
    uncorrelated with x_j and with ``x_j - d_ji``. A negative c is noise; without it the square is
    biased upwards, and no less than if the samples were independent.
    """
    m = samples.shape[-1]
    return (samples.var(-1) / m + changes.clamp_min(0) / (m * (m - 1))).sqrt()


def entries(V: Tensor, AV: Tensor) -> Tensor:
    """``v * (A v)`` (n, k)."""
    return V.double() * AV.double()


def inner(X: Tensor, Y: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """``X^T Y`` in float64, converted a stripe at a time."""
    products = [X[rows].double().mT @ Y[rows].double() for rows in _stripes(X)]
    return ranks.sum_(torch.stack(products).sum(0))


def qr(X: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """``X = Q R`` with orthonormal columns of Q, by a second QR of all processes' factors R.

    Reference:
        Demmel, Grigori, Hoemmen & Langou, Communication-optimal parallel and sequential QR (2012).
    """
    Q, R = torch.linalg.qr(X)
    if ranks.size == 1:
        return Q, R
    factors = ranks.gather(R)
    together, R = torch.linalg.qr(torch.cat(factors))
    start = sum(len(factor) for factor in factors[: ranks.rank])
    return Q @ together[start : start + Q.shape[1]], R


def _stripes(X: Tensor) -> list[slice]:
    """The rows of X in order, so many at a time; one that is empty where there are none."""
    return [slice(i, i + _STRIPE) for i in range(0, max(1, len(X)), _STRIPE)]
