"""Pictures of spectral densities that were estimated from products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hvpspec.errors import InputError
from hvpspec.plotting.figures import NOISE, POSITIVE, Floats, new_figure, short, tick_decades

if TYPE_CHECKING:
    from hvpspec.spectrum import SpectralMeasure

#: Width of the kernels on a logarithmic axis: a factor of 1.2 in the eigenvalue.
_LOG_SIGMA = 0.2
#: Lower end of the axis of densities, relative to the peak of a single eigenvalue's kernel.
_FAINT = 0.03
_MOST_COLUMNS = 3


def plot_density(
    measures: SpectralMeasure | Mapping[str, SpectralMeasure],
    *,
    sigma: float | None = None,
    symlog: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the density of the eigenvalues, estimated by stochastic Lanczos quadrature.

    Each Ritz value is replaced by a Gaussian kernel, whose width is stated in the picture. The band
    is one standard error to either side; it reflects only the randomness of the probes. Isolated
    eigenvalues that Lanczos resolved are marked. Several measures share axes and kernels.

    Args:
        measures: a result of `hvpspec.spectral_measure`, or several by name; the first determines
            the kernels.
        sigma: width of the kernels, in units of the eigenvalues or, with ``symlog``, of their
            natural logarithm; None for a 200th of the range of the Ritz values, or 0.2.
        symlog: use an axis of ``asinh(eigenvalue / c)``, where c is a millionth of the largest
            eigenvalue; it is logarithmic on both sides and shows the bulk around 0.
        title: one line above the picture.
        ax: axes for a single measure; None for a new figure.

    Raises:
        InputError: there is no measure, or several for one ``ax``; or ``sigma`` is not positive or
            too narrow to be drawn.
    """
    named = measures if isinstance(measures, Mapping) else {"": measures}
    if not named:
        raise InputError("measures must hold at least one measure, got none")
    if ax is not None and len(named) > 1:
        raise InputError(f"ax holds one measure, got {len(named)}; leave it out for several")
    first = next(iter(named.values()))
    linthresh = None
    if symlog:
        sigma = _LOG_SIGMA if sigma is None else sigma
        # The same scale for all panels, so that their axes can be shared.
        linthresh = first.log_density(sigma=sigma).linthresh
    elif sigma is None:
        sigma = first.density().sigma
    columns = min(len(named), _MOST_COLUMNS)
    rows = math.ceil(len(named) / columns)
    if ax is None:
        figure = new_figure(rows, columns)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    else:
        figure, panels = cast("Figure", ax.figure), np.array([ax], dtype=object)
    # Height of a single eigenvalue, the smallest feature that a logarithmic axis has to show.
    single = (math.log(10) if symlog else 1) / (sigma * math.sqrt(2 * math.pi))
    tops = []
    for panel, (name, measure) in zip(panels, named.items(), strict=False):
        x, values, sem = _curve(measure, sigma, linthresh)
        tops.append(float((values + sem).max()))
        _draw(panel, x, values, sem, single)
        _mark_outliers(panel, measure)
        if name:
            products = f"{measure.num_matvecs:,} products"
            panel.set_title(f"{name}: {measure.dim:,} parameters, {products}", fontsize=10)
    if linthresh is not None:
        panels[0].set_xscale("asinh", linear_width=linthresh)
        tick_decades(panels[0], linthresh)
    note = _label(panels[: len(named)], columns, sigma, linthresh, first)
    if ax is None:
        figure.supxlabel(note, fontsize=10)
    else:
        ax.set_xlabel(note)
    bottom, top = _FAINT * single, max(*tops, single)
    # Room for the legend above the curves; it needs a larger fraction of a smaller panel.
    panels[0].set_ylim(bottom, top * (top / bottom) ** (0.3 if len(named) == 1 else 0.45))
    for panel in panels[len(named) :]:
        panel.remove()
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _curve(
    measure: SpectralMeasure, sigma: float, linthresh: float | None
) -> tuple[Floats, Floats, Floats]:
    """Return positions, eigenvalues per unit of the axis, and the standard errors of these."""
    if linthresh is None:
        density = measure.density(sigma=sigma)
        x, unit = density.grid, 1.0
        values, sem = density.values, density.sem
    else:
        log_density = measure.log_density(sigma=sigma, linthresh=linthresh)
        # Per decade, not per factor of e.
        x, unit = linthresh * log_density.t.sinh(), math.log(10)
        values, sem = log_density.values, log_density.sem
    scale = measure.dim * unit
    # The standard error of a single probe is NaN; it is drawn as a band of width 0.
    return x.numpy(), scale * values.numpy(), scale * np.nan_to_num(sem.numpy())


def _draw(ax: Axes, x: Floats, values: Floats, sem: Floats, single: float) -> None:
    """Draw one density with its band, on a logarithmic axis."""
    ax.set_yscale("log")
    faint = _FAINT * single / 10  # stands for 0, and lies below the axis
    low, high = np.maximum(values - sem, faint), np.maximum(values + sem, faint)
    # One colour for both signs: near 0 the kernels move mass from one side to the other.
    ax.fill_between(x, low, high, color=POSITIVE, alpha=0.3, lw=0)
    ax.plot(x, np.maximum(values, faint), color=POSITIVE, lw=1.4)
    ax.axhline(single, color=NOISE, lw=0.9, ls=":", label="height of one eigenvalue")
    ax.axvline(0, color="black", lw=0.6, zorder=0)
    ax.grid(axis="y", alpha=0.25)
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _mark_outliers(ax: Axes, measure: SpectralMeasure) -> None:
    """Mark the bulk by a bar along the lower edge, and each resolved outlier by a triangle."""
    if not measure.reorthogonalized:
        return
    found = measure.outliers()
    edge = ax.get_xaxis_transform()  # x in eigenvalues, y as a fraction of the axis
    low, high = found.bulk
    label = f"bulk [{short(low)}, {short(high)}]"
    ax.plot(found.bulk, [0.012, 0.012], transform=edge, color="black", lw=3.5, label=label)
    values = np.array([outlier.value for outlier in (*found.bottom, *found.top)])
    if len(values):
        label = f"outliers resolved: {len(found.bottom)} below, {len(found.top)} above"
        ax.plot(
            values,
            np.full(len(values), 0.035),
            "v",
            transform=edge,
            color="black",
            mfc="white",
            ms=6,
            ls="none",
            label=label,
        )


def _label(
    panels: np.ndarray[tuple[int], np.dtype[np.object_]],
    columns: int,
    sigma: float,
    linthresh: float | None,
    first: SpectralMeasure,
) -> str:
    """Label the axes, and return a note on how the curve was computed."""
    steps = max(len(run.alphas) for run in first.runs)
    count = len(first.runs)
    probes = f"{count} {'probe' if count == 1 else 'probes'} × {steps} steps"
    band = "band: ± one standard error" if count > 1 else "one probe: no standard error"
    if linthresh is None:
        x, y, kernel = "eigenvalue λ (linear axis)", "eigenvalues per unit of λ", short(sigma)
    else:
        x = f"eigenvalue λ (logarithmic axis, linear within ±{short(linthresh)})"
        y, kernel = "eigenvalues per decade", f"a factor of {math.exp(sigma):.3g}"
    for i, ax in enumerate(panels):
        if i % columns == 0:
            ax.set_ylabel(y)
        ax.legend(loc="upper right", fontsize=8 if len(panels) > 1 else 9)
        if i + columns >= len(panels):
            ax.tick_params(labelbottom=True)
    note = f"{x}\nGaussian kernels, σ = {kernel}; {probes}; {band}"
    if linthresh is not None:
        note += "\nwithin the bulk, single peaks are nodes of the quadrature, not eigenvalues"
    return note
