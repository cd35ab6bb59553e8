"""What stochastic Lanczos quadrature leaves: a discrete measure per probe, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hvpspec.errors import InputError
from hvpspec.linalg.estimates import Estimate
from hvpspec.linalg.krylov import LanczosRun
from hvpspec.linalg.probes import ProbeKind
from hvpspec.linalg.quadrature import Rule, gauss, mass_bracket
from hvpspec.results import Drawn, Result, Row, Subject, plain
from hvpspec.spectrum.archive import load_measure, save_measure
from hvpspec.spectrum.beta import beta_interval
from hvpspec.spectrum.bulk import Outliers, split_bulk
from hvpspec.spectrum.smoothing import (
    Density,
    Distribution,
    LogDensity,
    default_grid,
    mean_and_sem,
    smooth,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class CountResult(Result):
    """How many eigenvalues lie below a number.

    Attributes:
        below: the number.
        estimate: mean over the probes of the middle of their brackets.
        sem: its standard error from the randomness of the probes; NaN for a single probe.
        bracket: means of the ends of the brackets: how far quadrature alone leaves it open.
        lower: at least this many, at the stated confidence; None where nothing is proven.
        upper: at most this many.
        confidence: probability that ``lower`` and ``upper`` hold; None where there are none.
        resolution: eigenvalues this near to ``below`` may be counted or not.
    """

    below: float
    estimate: float
    sem: float
    bracket: tuple[float, float]
    lower: int | None
    upper: int | None
    confidence: float | None
    resolution: float


@dataclass(frozen=True, eq=False, repr=False)
class SpectralMeasure(Drawn):
    """What Lanczos saw of a spectrum from a few random vectors; questions cost no more products.

    Attributes:
        dim: size n of the operator.
        runs: the Lanczos coefficients, one run per probe, without bases.
        probes: distribution of the probes.
        reorthogonalized: whether the bases were kept orthogonal. If not, copies of converged
            eigenvalues share their weight, and neither intervals nor outliers are offered.
        dtype: floating-point type of the products.
        num_matvecs: products spent.
    """

    dim: int
    runs: tuple[LanczosRun, ...]
    probes: ProbeKind
    reorthogonalized: bool
    dtype: torch.dtype
    num_matvecs: int

    _FORMAT: ClassVar[str] = "hvpspec-measure"

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The Gauss rule of each probe: mass 1, fewer nodes where the run was exhausted early."""
        return tuple(gauss(run) for run in self.runs)

    @property
    def nodes(self) -> tuple[Tensor, ...]:
        """Ritz values of each probe, ascending, float64, shape (m_i,) each."""
        return tuple(rule.nodes for rule in self.rules)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Their weights, which sum up to 1, shape (m_i,) each."""
        return tuple(rule.weights for rule in self.rules)

    @property
    def resolution(self) -> float:
        """``10 u ||T||``: to Lanczos, differences below this are round-off of the products."""
        return 10 * self._unit_roundoff * self._scale

    @property
    def _unit_roundoff(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    @property
    def _scale(self) -> float:
        """The size of the products, as Lanczos judges a breakdown by it."""
        return max(run.scale for run in self.runs)

    def density(self, grid: Tensor | None = None, sigma: float | None = None) -> Density:
        """The density of eigenvalues, of integral 1, each node spread by a Gaussian kernel.

        The width is a choice of display, not an error bar: narrow ones show single Ritz values.

        Args:
            grid: where, shape (k,); None for a uniform grid that holds and resolves all kernels.
            sigma: width of the kernels; None for a 200th of the range of the nodes.

        Returns:
            The density with its standard error; times ``dim`` it counts eigenvalues.

        Raises:
            InputError: ``sigma`` is not positive, or the grid is not finite or would be too long.

        Reference:
            Lin, Saad & Yang (2016), section 3.2.3.
        """
        nodes = torch.cat(self.nodes)
        if sigma is None:
            # Nodes of a multiple of the identity differ by round-off, which is not to be shown.
            low, high = (float(x) for x in nodes.aminmax())
            sigma = max(high - low, 1e-6 * max(high, -low)) / 200 or 1 / 200
        grid = default_grid(nodes, sigma) if grid is None else grid.double()
        return Density(grid, *smooth(self.rules, grid, sigma), sigma)

    def log_density(
        self,
        t: Tensor | None = None,
        sigma: float = 0.2,
        *,
        linthresh: float | None = None,
    ) -> LogDensity:
        """The density over ``asinh(lambda / linthresh)``, which shows the bulk around 0.

        Args:
            t: where, shape (k,); None for a uniform grid that holds and resolves all kernels.
            sigma: width of the kernels in t; 0.2 is a factor of 1.2 in an eigenvalue.
            linthresh: eigenvalues below it are on the linear part of the axis; None for a
                millionth of the largest node.

        Returns:
            The density with its standard error. No mass is lost: its integral over t is 1.

        Raises:
            InputError: ``sigma`` or ``linthresh`` is not positive, or the grid is not usable.

        Reference:
            Papyan, Measurements of three-level hierarchical structure in the outliers in the
            spectrum of deepnet Hessians (2019), the log-spectrum; with asinh, both signs and 0.
        """
        if linthresh is None:
            # The zero matrix sits at t = 0 on every such axis.
            linthresh = 1e-6 * float(torch.cat(self.nodes).abs().max()) or 1.0
        if not (math.isfinite(linthresh) and linthresh > 0):
            raise InputError(f"linthresh must be positive and finite, got {linthresh}")
        rules = [Rule(torch.asinh(rule.nodes / linthresh), rule.weights) for rule in self.rules]
        t = default_grid(torch.cat([rule.nodes for rule in rules]), sigma) if t is None else t
        t = t.double()
        return LogDensity(t, linthresh * t.sinh(), *smooth(rules, t, sigma), sigma, linthresh)

    def cdf(self, x: float | Tensor) -> Distribution:
        """The fraction of eigenvalues below each x, within brackets of about two weights.

        :meth:`count` has the sharpest brackets there are, at one number.

        Args:
            x: numbers, shape (k,), or one.

        Raises:
            InputError: an x is not finite.

        Reference:
            The Chebyshev-Markov-Stieltjes inequalities; Szego, Orthogonal Polynomials, section
            3.41.
        """
        x = torch.as_tensor(x, dtype=torch.float64).reshape(-1)
        if not bool(torch.isfinite(x).all()):
            raise InputError("x must be finite")
        brackets = []
        for rule, run in zip(self.rules, self.runs, strict=True):
            # The mass below a node lies between the weights before it, without and with its own.
            # Nodes within the resolution of x are inside the upper end and outside the lower.
            mass = torch.cat([torch.zeros(1, dtype=torch.float64), rule.weights.cumsum(0)])
            spare = 0 if run.exhausted else 1
            first = torch.searchsorted(rule.nodes, x - self.resolution) - spare
            last = torch.searchsorted(rule.nodes, x + self.resolution) + spare
            ends = torch.stack([first, last]).clamp(0, len(rule.nodes))
            brackets.append(mass[ends] / mass[-1])
        bounds = torch.stack(brackets)  # (num_probes, 2, k)
        values, sem = mean_and_sem(bounds.mean(1))
        lower, upper = bounds.mean(0)
        return Distribution(x, values, lower, upper, sem)

    def count(
        self, below: float, confidence: float = 0.95, *, resolution: float | None = None
    ) -> CountResult:
        """Count the eigenvalues below a number, with an interval that is proven.

        For each probe z, quadrature brackets the share of ``|z|^2`` on the eigenvectors in question
        (Chebyshev-Markov-Stieltjes). For Gaussian probes, the law of that share is known exactly
        and gives the interval (:func:`~hvpspec.spectrum.beta.beta_interval`). What Ritz values
        prove on their own (Cauchy-Poincare: k of them on one side of a number make k eigenvalues
        there) is used as well. For other probes and for runs without reorthogonalisation there is
        no such law, and no interval.

        Args:
            below: the number.
            confidence: probability that the interval holds, in (0, 1).
            resolution: bound on the error of an eigenvalue, at least 0: ``lower`` counts those
                below ``below - resolution``, ``upper`` those below ``below + resolution``. None for
                ``10 u ||T||``, the round-off of Lanczos; the products of a large network may be
                less exact.

        Raises:
            InputError: an argument is out of range.

        Reference:
            Golub & Meurant, Matrices, Moments and Quadrature, section 6.2.1, for the bracket;
            Horn & Johnson, Matrix Analysis, theorem 4.3.28, for interlacing.
        """
        resolution = self.resolution if resolution is None else resolution
        if not math.isfinite(below):
            raise InputError(f"below must be finite, got {below}")
        if not 0 < confidence < 1:
            raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
        if not (math.isfinite(resolution) and resolution >= 0):
            raise InputError(f"resolution must be finite and at least 0, got {resolution}")
        first, last = below - resolution, below + resolution
        brackets = [mass_bracket(run, first, last) for run in self.runs]
        ends = torch.tensor(brackets, dtype=torch.float64)  # (num_probes, 2)
        estimate, sem = mean_and_sem(ends.mean(1) * self.dim)
        low, high = (ends.mean(0) * self.dim).tolist()
        least, most, proven = None, None, self.probes == "gaussian" and self.reorthogonalized
        if proven:
            squares = torch.tensor([run.norm**2 for run in self.runs], dtype=torch.float64)
            # k Ritz values of one run on one side make k eigenvalues there, for certain.
            surely = max(int((nodes < first).sum()) for nodes in self.nodes)
            surely_not = max(int((nodes > last).sum()) for nodes in self.nodes)
            lower, upper = (squares @ ends / squares.sum()).tolist()
            interval = beta_interval(lower, upper, len(self.runs), 1 - confidence, self.dim)
            least, most = (min(max(r, surely), self.dim - surely_not) for r in interval)
        return CountResult(
            below=below,
            estimate=float(estimate),
            sem=float(sem),
            bracket=(low, high),
            lower=least,
            upper=most,
            confidence=confidence if proven else None,
            resolution=resolution,
        )

    def expectation(self, f: Callable[[Tensor], Tensor]) -> Estimate[float]:
        """Estimate ``tr f(A)``, the sum of ``f`` over the eigenvalues.

        The standard error is that of the probes. Quadrature adds its own error, none for
        polynomials of degree below ``2 num_steps``, and one that vanishes geometrically for f
        analytic around the spectrum. A step function is better asked of :meth:`count`.

        Args:
            f: takes nodes, float64, shape (k,), and returns its values there, shape (k,). For
                example ``lambda x: torch.log(x + s)`` for the log-determinant of ``A + s I``.

        Raises:
            InputError: ``f`` returns another shape, or NaN or infinity at a node, which is named.

        Reference:
            Ubaru, Chen & Saad, Fast estimation of tr f(A) via stochastic Lanczos quadrature (2017).

        Example:
            >>> from hvpspec.spectrum.measure import spectral_measure
            >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
            >>> measure = spectral_measure(A, generator=torch.Generator().manual_seed(0))
            >>> round(measure.expectation(torch.ones_like).value, 9)
            3.0
        """
        nodes = torch.cat(self.nodes)
        values = f(nodes.clone())
        if values.shape != nodes.shape:
            raise InputError(
                f"f must return values of shape {tuple(nodes.shape)}, got {tuple(values.shape)}"
            )
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            raise InputError(
                f"f is {float(values[bad][0])} at the node {float(nodes[bad][0]):.6g}; it must be "
                f"finite on [{float(nodes.min()):.6g}, {float(nodes.max()):.6g}]"
            )
        pieces = torch.split(values.double(), [len(rule.nodes) for rule in self.rules])
        products = [torch.dot(v, w) for v, w in zip(pieces, self.weights, strict=True)]
        mean, sem = mean_and_sem(torch.stack(products) * self.dim)
        return Estimate(float(mean), float(sem), self.num_matvecs)

    def outliers(self, min_gap: float = 0.1) -> Outliers:
        """Find the bulk, the isolated eigenvalues on its two sides, and the gaps between.

        Args:
            min_gap: how wide a gap must be, in widths of the bulk.

        Returns:
            What :func:`~hvpspec.spectrum.bulk.split_bulk` found.

        Raises:
            InputError: ``min_gap`` is not positive, or the runs were not reorthogonalised.
        """
        if not (math.isfinite(min_gap) and min_gap > 0):
            raise InputError(f"min_gap must be positive and finite, got {min_gap}")
        if not self.reorthogonalized:
            raise InputError(
                "outliers cannot be told from their copies in runs with reorthogonalize=False; "
                "measure with reorthogonalize=True"
            )
        return split_bulk(self.runs, self.dim, self._unit_roundoff, self._scale, min_gap)

    def _draw(self, ax: Axes | None) -> Figure:
        from hvpspec.plotting import plot_density

        return plot_density(self, ax=ax)

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """The lines of the table, from the top of the spectrum down."""
        kind = f"matrix-vector products, {len(self.runs)} {self.probes} probes"
        products = "products", f"{self.num_matvecs:,}", kind
        if self.reorthogonalized:
            return [*self.outliers().rows(), products]
        low, high = (float(x) for x in torch.cat(self.nodes).aminmax())
        copies = "without outliers: copies hide them"
        return [("spectrum", f"[{low:.3g}, {high:.3g}]", copies), products]

    def to_dict(
        self,
        *,
        subject: Subject | None = None,
        seconds: float | None = None,
        layers: Mapping[str, SpectralMeasure] | None = None,
        gauss_newton: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Plain data, as ``hvpspec density --json`` writes them.

        Args:
            subject: what the measure is of.
            seconds: how long it took.
            layers: measures of diagonal blocks, by name.
            gauss_newton: what :meth:`content` has of the Gauss-Newton matrix and its blocks.
        """
        whole = super().to_dict(subject=subject, seconds=seconds)
        return {**whole, **self.content(layers), "gauss_newton": gauss_newton}

    def content(self, layers: Mapping[str, SpectralMeasure] | None = None) -> dict[str, Any]:
        """The fields of a file that tell of a matrix and of its diagonal blocks."""
        blocks = {name: layer._content() for name, layer in layers.items()} if layers else None
        return {**self._content(), "layers": blocks}

    def _content(self) -> dict[str, Any]:
        outliers = self.outliers() if self.reorthogonalized else None
        names = ("bulk", "gap_below", "gap_above", "bottom", "top")
        return {
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "probes": self.probes,
            "num_matvecs": self.num_matvecs,
            "norm": float(torch.cat(self.nodes).abs().max()),
            "resolution": self.resolution,
            "reorthogonalized": self.reorthogonalized,
            **{name: plain(getattr(outliers, name, None)) for name in names},
            "norms": [run.norm for run in self.runs],
            "nodes": plain(self.nodes),
            "weights": plain(self.weights),
        }

    def _title(self) -> str:
        return f"spectral measure of a matrix of size {self.dim:,}"

    def _brief(self) -> dict[str, object]:
        steps = max(len(run.alphas) for run in self.runs)
        return {
            "dim": self.dim,
            "num_probes": len(self.runs),
            "num_steps": steps,
            "probes": self.probes,
            "num_matvecs": self.num_matvecs,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the coefficients to an npz file, whole or not at all; a file there is replaced.

        Raises:
            InputError: the file cannot be written.
        """
        save_measure(self, Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SpectralMeasure:
        """Read what :meth:`save` wrote; the round trip is exact.

        Raises:
            InputError: the file is missing, damaged, or another kind of file.
        """
        return cls(**load_measure(Path(path)))
