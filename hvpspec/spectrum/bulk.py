"""The bulk of a spectrum, the outliers that Lanczos resolved, and the gaps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hvpspec.linalg.krylov import LanczosRun
from hvpspec.results import Result, Row, Subject, number

#: An eigenvalue is resolved when its error bound is this part of the distance to its neighbour.
_RESOLVED = 0.01
#: A Ritz value with less weight than this part of an eigenvalue's average 1/n is hardly there.
_FAINT = 1e-3
#: The narrowest gap: in widths of the whole spectrum (to be seen on a linear axis), and in mean
#: spacings of the bulk (the extreme spacings of few random eigenvalues are wide).
_PART_OF_RANGE = 0.01
_SPACINGS = 3


@dataclass(frozen=True, repr=False)
class Outlier(Result):
    """An isolated eigenvalue.

    Attributes:
        value: its Ritz value, of the probe with the smallest residual.
        residual: there is an eigenvalue within this distance.
        multiplicity: estimate of how many there are: n times the mean weight, with a relative
            standard error of about ``sqrt(2 / (multiplicity * num_probes))``.
    """

    value: float
    residual: float
    multiplicity: float


@dataclass(frozen=True, repr=False)
class Outliers(Result):
    """The two ends of a spectrum.

    Attributes:
        bottom: isolated eigenvalues below the bulk, ascending.
        top: isolated eigenvalues above the bulk, ascending.
        bulk: from the smallest to the largest Ritz value of the bulk.
        gap_below: distance from the bulk to the nearest of ``bottom``, None if there is none.
        gap_above: distance from the bulk to the nearest of ``top``, None if there is none.
    """

    bottom: tuple[Outlier, ...]
    top: tuple[Outlier, ...]
    bulk: tuple[float, float]
    gap_below: float | None
    gap_above: float | None

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """The lines of the table, from the top of the spectrum down."""
        rows: list[Row] = []
        for where, outliers, gap in (
            ("above", self.top, self.gap_above),
            ("below", self.bottom, self.gap_below),
        ):
            if gap is not None:
                rows.append((where, number(gap), "gap between the bulk and these"))
            for one in reversed(outliers):
                many = f", about {one.multiplicity:.0f} of them" if one.multiplicity >= 1.75 else ""
                rows.append(("  outlier", f"{one.value:.5g}", f"± {one.residual:.1e}{many}"))
            if where == "above":
                low, high = self.bulk
                meaning = "the eigenvalues without an outer gap"
                rows.append(("bulk", f"[{low:.3g}, {high:.3g}]", meaning))
        return rows


def split_bulk(
    runs: Sequence[LanczosRun], dim: int, unit_roundoff: float, scale: float, min_gap: float
) -> Outliers:
    """Tell the bulk from the outliers.

    1. Each probe's Ritz values are cleaned of the traces of round-off. Within reach of it, Lanczos
       finds second copies of repeated eigenvalues: while such a copy travels there from the bulk it
       is unresolved and has next to no weight, and is left out; once there, it is merged. (While
       it passes another eigenvalue that one is unresolved too, and a few steps more or less help.)
    2. From each end inwards, the i-th values of all probes make one eigenvalue, as long as they
       agree within their residuals ``beta_m |s_mi|``, each of which is less than 1% of the distance
       to the probe's next value. The first failure ends the list.
    3. The bulk starts as the smallest interval that holds the central half of the mean measure and
       every value not on these lists.
    4. It absorbs the values nearer to it than ``min_gap`` times its width, 1% of the range of the
       spectrum or three mean spacings of the bulk, and grows, until none is. Listed eigenvalues
       left outside are the outliers.

    Every step compares distances with distances, so that scaling A scales the answer, and -A
    mirrors it.

    Args:
        runs: one per probe, reorthogonalised.
        dim: n.
        unit_roundoff: u, of the products.
        scale: ``||A||``; residuals below ``10 u`` times it are round-off.
        min_gap: the narrowest gap, in widths of the bulk.

    Reference:
        Papyan, Measurements of three-level hierarchical structure in the outliers in the spectrum
        of deepnet Hessians (2019), for the observation; Parlett, The Symmetric Eigenvalue Problem,
        theorem 4.5.1, for the residual bound.
    """
    probes = [_seen(run, dim, unit_roundoff, scale) for run in runs]
    fewest = min(seen.shape[1] for seen in probes)
    bottom = _common(torch.stack([seen[:, :fewest] for seen in probes]), dim)
    top = _common(torch.stack([seen[:, -fewest:].flip(1) for seen in probes]), dim)
    unlisted = [seen[0, len(bottom) : max(seen.shape[1] - len(top), 0)] for seen in probes]
    pairs = torch.cat(probes, 1)[:2].T.tolist()
    measure = sorted((value, weight / len(probes)) for value, weight in pairs)
    return _outside(bottom, top[::-1], torch.cat(unlisted).tolist(), measure, dim, min_gap)


def split_eigenvalues(eigenvalues: Tensor, *, noise_floor: float, min_gap: float = 0.1) -> Outliers:
    """Tell the bulk from the outliers where all eigenvalues are known.

    As `split_bulk` from its third step, with every eigenvalue resolved: the bulk starts as the
    smallest interval that holds the central half of the eigenvalues, and grows. Those that cannot
    be told apart are one, of their mean value.

    Args:
        eigenvalues: in any order, at least one, shape (n,).
        noise_floor: bound on the error of each.
        min_gap: the narrowest gap, in widths of the bulk.

    Returns:
        The bulk, the outliers and the gaps; ``residual`` is the noise floor.
    """
    values = eigenvalues.double().sort().values
    dim = len(values)
    ends = (torch.nonzero(values.diff() > 2 * noise_floor).flatten() + 1).tolist()
    groups = values.tensor_split(ends)
    measure = [(float(group.mean()), len(group) / dim) for group in groups]
    listed = [Outlier(x, noise_floor, dim * weight) for x, weight in measure]
    return _outside(listed, listed, [], measure, dim, min_gap)


def _outside(
    bottom: Sequence[Outlier],
    top: Sequence[Outlier],
    unlisted: Sequence[float],
    measure: Sequence[tuple[float, float]],
    dim: int,
    min_gap: float,
) -> Outliers:
    """Grow the bulk from the central half and what is not listed; what is left are the outliers.

    ``bottom`` and ``top`` are the eigenvalues known from either end, ascending; ``unlisted`` are
    values on neither list; ``measure`` is all values, ascending, with their weights.
    """
    first, last = _first_quartile(measure), -_first_quartile([(-x, w) for x, w in measure[::-1]])
    core = [first, *unlisted, last]
    low, high = _grow(min(core), max(core), measure, dim, min_gap)
    below = tuple(outlier for outlier in bottom if outlier.value < low)
    above = tuple(outlier for outlier in top if outlier.value > high)
    return Outliers(
        bottom=below,
        top=above,
        bulk=(low, high),
        gap_below=low - below[-1].value if below else None,
        gap_above=above[0].value - high if above else None,
    )


def _seen(run: LanczosRun, dim: int, unit_roundoff: float, scale: float) -> Tensor:
    """What one probe saw, in ascending order, cleaned of the traces of round-off.

    Returns:
        Ritz values, their weights, residuals, and the most a residual may be for the value to count
        as resolved, shape (4, k). Those that cannot be told apart are one.
    """
    nodes, vectors = torch.linalg.eigh(run.T)
    weights = vectors[0] ** 2
    residuals = (run.betas[-1] * vectors[-1].abs()).clamp(min=10 * unit_roundoff * scale)
    distances = _neighbour_distances(nodes)
    kept = (residuals <= _RESOLVED * distances) | (weights >= _FAINT / dim)
    nodes, weights, residuals = nodes[kept], weights[kept], residuals[kept]

    # Residuals enter eigenvalues squared: a copy is at most this far off once its own is sqrt(u).
    apart = torch.nonzero(nodes.diff() > unit_roundoff**0.5 * scale).flatten() + 1
    groups = torch.arange(len(nodes)).tensor_split(apart.tolist())
    best = torch.stack([group[residuals[group].argmin()] for group in groups])
    together = torch.stack([weights[group].sum() for group in groups])
    limits = _RESOLVED * _neighbour_distances(nodes[best])
    return torch.stack([nodes[best], together, residuals[best], limits])


def _common(seen: Tensor, dim: int) -> list[Outlier]:
    """The eigenvalues that all probes saw (num_probes, 4, k), up to the first that they did not."""
    values, weights, residuals, limits = seen.unbind(1)
    best = residuals.argmin(0, keepdim=True)
    value, residual = values.gather(0, best), residuals.gather(0, best)
    agree = (residuals <= limits) & ((values - value).abs() <= residuals + residual)
    k = int(agree.all(0).int().cumprod(0).sum())
    columns = value[0, :k], residual[0, :k], dim * weights.mean(0)[:k]
    return [Outlier(*one) for one in torch.stack(columns, 1).tolist()]


def _neighbour_distances(nodes: Tensor) -> Tensor:
    """Distance of each of the ascending nodes to the nearest other one."""
    end = torch.tensor([torch.inf], dtype=nodes.dtype)
    steps = torch.cat([end, nodes.diff(), end])
    return torch.minimum(steps[:-1], steps[1:])


def _first_quartile(measure: Sequence[tuple[float, float]]) -> float:
    """The first node up to which a measure, in ascending order, has a quarter of its mass."""
    total = accumulate(weight for _, weight in measure)
    return next(x for (x, _), mass in zip(measure, total, strict=True) if mass >= 0.25)


def _grow(
    low: float, high: float, measure: Sequence[tuple[float, float]], dim: int, min_gap: float
) -> tuple[float, float]:
    """Widen an interval by the nodes near to it until none is near."""
    whole = measure[-1][0] - measure[0][0]
    while True:
        mass = sum(weight for x, weight in measure if low <= x <= high)
        width = high - low
        reach = max(min_gap * width, _SPACINGS * width / (dim * mass), _PART_OF_RANGE * whole)
        near = [x for x, _ in measure if low - reach <= x <= high + reach]
        if (near[0], near[-1]) == (low, high):
            return low, high
        low, high = near[0], near[-1]
