"""The dimension of an eigenspace from the share that random vectors have in it."""

from __future__ import annotations

from collections.abc import Callable

from scipy.special import betainc

from hvpspec.errors import InputError

#: A share is a sum of weights, which together are 1. The eigenvectors of m nodes that LAPACK
#: computes are orthonormal within a small multiple of m u, and so are sums of their squared entries
#: known: for thousands of nodes, within this.
_ROUND_OFF = 1e-12


def beta_interval(
    lower: float, upper: float, num_probes: int, eta: float, dim: int
) -> tuple[int, int]:
    """Bound a dimension r by ``X = sum |P z_i|^2 / sum |z_i|^2``, known up to an interval.

    P projects onto an unknown eigenspace of dimension r in dimension n, and z_1, ..., z_s are
    standard Gaussian vectors. Then ``sum |P z_i|^2`` follows chi-squared with ``s r`` degrees of
    freedom, independently of the rest of ``sum |z_i|^2``, which follows chi-squared with
    ``s (n - r)``; hence X follows Beta(sr / 2, s (n - r) / 2), exactly. The law grows with r and is
    inverted. Where X is so unlikely for every r that the bounds cross, the interval between them is
    returned.

    Args:
        lower: at most X, at least 0.
        upper: at least X, at most 1.
        num_probes: s, the number of independent Gaussian probes, at least 1.
        eta: probability, in (0, 1), that the interval may miss r; half of it on each side.
        dim: n.

    Returns:
        The lower and the upper bound, in [0, dim].

    Raises:
        InputError: ``0 <= lower <= upper <= 1`` fails, ``num_probes`` or ``eta`` is out of range.

    Reference:
        Exact (Clopper-Pearson) inversion of a one-parameter family: Casella & Berger, Statistical
        Inference, section 9.2.3; Muirhead, Aspects of Multivariate Statistical Theory, theorem
        1.5.7 (the law).

    Example:
        >>> beta_interval(0.0, 1e-8, num_probes=1, eta=0.01, dim=1000)
        (0, 0)
        >>> beta_interval(0.10, 0.11, num_probes=8, eta=0.01, dim=1000)
        (89, 123)
        >>> beta_interval(1.0, 1.0, num_probes=8, eta=0.01, dim=1000)
        (1000, 1000)
    """
    if not -_ROUND_OFF <= lower <= upper + _ROUND_OFF:
        raise InputError(f"the bounds must satisfy 0 <= lower <= upper, got {lower} and {upper}")
    if upper > 1 + _ROUND_OFF:
        raise InputError(f"a share is at most 1, got {upper}")
    if num_probes < 1:
        raise InputError(f"num_probes must be at least 1, got {num_probes}")
    if not 0 < eta < 1:
        raise InputError(f"eta must lie between 0 and 1, got {eta}")
    lower, upper = max(lower, 0.0), max(upper, 0.0)
    lower, half = min(lower, upper), num_probes / 2

    def most(share: float) -> int:
        """The largest r for which a share so small is not too unlikely."""
        if share >= 1 - _ROUND_OFF:
            return dim
        return _last(lambda r: betainc(half * r, half * (dim - r), share) > eta / 2, dim - 1)

    # At least r of n in it is at most n - r outside of it.
    least, greatest = dim - most(1 - lower), most(upper)
    return min(least, greatest), max(least, greatest)


def _last(holds: Callable[[int], bool], dim: int) -> int:
    """The last of 0, ..., dim at which a condition holds, which holds at 0 and is lost for good."""
    low, high = 0, dim + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
