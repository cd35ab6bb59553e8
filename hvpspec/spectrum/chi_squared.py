"""How many eigenvalues a random vector's mass on them betrays, with a stated confidence.

Let P project onto an unknown eigenspace of dimension r in dimension n, and let z_1, ..., z_s be
standard Gaussian vectors. Then ``sum |P z_i|^2`` follows chi-squared with ``s r`` degrees of
freedom, independently of the rest of ``sum |z_i|^2``, which follows chi-squared with ``s (n - r)``.
Both laws hold exactly, grow with r, and are inverted here; the number 0 is chi-squared with 0
degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable

from scipy.special import betainc, gammainc, gammaincc

from hvpspec.errors import InputError

#: A fraction is a sum of weights, which together are 1. The eigenvectors of m nodes that LAPACK
#: computes are orthonormal within a small multiple of m u, and so are sums of their squared entries
#: known: for thousands of nodes, within this.
_ROUND_OFF = 1e-12


def chi_squared_interval(
    lower_sum: float, upper_sum: float, num_probes: int, eta: float, dim: int
) -> tuple[int, int]:
    """Bound a dimension r by ``X = sum |P z_i|^2``, itself known up to an interval.

    The bounds are ``min{r: P(chi2_sr >= lower_sum) > eta / 2}`` and
    ``max{r: P(chi2_sr <= upper_sum) > eta / 2}``. Where X is so unlikely for every r that they
    cross, the interval between them is returned.

    Args:
        lower_sum: at most X, over all probes.
        upper_sum: at least X.
        num_probes: s, the number of independent Gaussian probes, at least 1.
        eta: probability, in (0, 1), that the interval may miss r; half of it on each side.
        dim: n, the largest r there can be.

    Returns:
        The lower and the upper bound, in [0, dim].

    Raises:
        InputError: the sums are not ``0 <= lower_sum <= upper_sum``, or ``num_probes`` or ``eta``
            is out of range.

    Reference:
        Exact (Clopper-Pearson) inversion of a one-parameter family; Casella & Berger, Statistical
        Inference, section 9.2.3.

    Example:
        >>> chi_squared_interval(0.0, 0.001, num_probes=8, eta=0.01, dim=1000)
        (0, 0)
        >>> chi_squared_interval(830.0, 850.0, num_probes=8, eta=0.01, dim=1000)
        (91, 119)
    """
    # The sums are parts of sum |z_i|^2, of which the mean is s n, and have the round-off of that,
    # however small they are themselves.
    slack = _ROUND_OFF * num_probes * dim
    lower_sum, upper_sum = _checked(lower_sum, upper_sum, num_probes, eta, slack)
    half = num_probes / 2

    def unlikely_to_reach(r: int) -> bool:
        return lower_sum > 0 and bool(gammaincc(half * r, lower_sum / 2) <= eta / 2)

    def likely_below(r: int) -> bool:
        return bool(gammainc(half * r, upper_sum / 2) > eta / 2)

    # Of r = 0, X is 0 for certain, which a positive lower bound refutes.
    least = 0 if lower_sum == 0 else min(_last(unlikely_to_reach, dim) + 1, dim)
    most = _last(likely_below, dim)
    return min(least, most), max(least, most)


def beta_interval(
    lower: float, upper: float, num_probes: int, eta: float, dim: int
) -> tuple[int, int]:
    """Bound a dimension r by ``X = sum |P z_i|^2 / sum |z_i|^2``, known up to an interval.

    X follows Beta(sr / 2, s (n - r) / 2). That is sharper than :func:`chi_squared_interval`, which
    does not use the length of what P leaves out: by ``sqrt(1 - r / n)``, so that r = n is found for
    certain; and the two sides of the spectrum are treated alike.

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
        As above; Muirhead, Aspects of Multivariate Statistical Theory, theorem 1.5.7 (the law).

    Example:
        >>> beta_interval(0.10, 0.11, num_probes=8, eta=0.01, dim=1000)
        (89, 123)
        >>> beta_interval(1.0, 1.0, num_probes=8, eta=0.01, dim=1000)
        (1000, 1000)
    """
    lower, upper = _checked(lower, upper, num_probes, eta, _ROUND_OFF)
    if upper > 1 + _ROUND_OFF:
        raise InputError(f"a fraction is at most 1, got {upper}")
    half = num_probes / 2

    def most(fraction: float) -> int:
        """The largest r for which a fraction so small is not too unlikely."""
        if fraction >= 1 - _ROUND_OFF:
            return dim
        return _last(
            lambda r: bool(betainc(half * r, half * (dim - r), fraction) > eta / 2), dim - 1
        )

    least, greatest = dim - most(1 - lower), most(upper)
    return min(least, greatest), max(least, greatest)


def _last(holds: Callable[[int], bool], dim: int) -> int:
    """The last of 0, ..., dim at which a condition holds, which holds at 0 and is lost for good."""
    low, high = 0, dim + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _checked(
    lower: float, upper: float, num_probes: int, eta: float, slack: float
) -> tuple[float, float]:
    """The bounds in order, where only round-off put them out of it; InputError otherwise."""
    if not -slack <= lower <= upper + slack:
        raise InputError(f"the bounds must satisfy 0 <= lower <= upper, got {lower} and {upper}")
    if num_probes < 1:
        raise InputError(f"num_probes must be at least 1, got {num_probes}")
    if not 0 < eta < 1:
        raise InputError(f"eta must lie between 0 and 1, got {eta}")
    upper = max(upper, 0.0)
    return min(max(lower, 0.0), upper), upper
