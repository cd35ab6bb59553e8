import numpy as np
import pytest
import torch

from hvpspec import spectral_measure
from hvpspec.errors import InputError
from hvpspec.plotting import plot_density, save_figure


def _measure(values, probes=4, **options):
    generator = torch.Generator().manual_seed(0)
    A = torch.diag(torch.tensor(values, dtype=torch.float64))
    return spectral_measure(A, probes, 30, generator=generator, **options)


SPECTRUM = [*np.linspace(-0.1, 0.3, 50).tolist(), 3.0, 5.0, -2.0]


@pytest.mark.parametrize("symlog", [False, True])
@pytest.mark.parametrize("probes", [1, 4])
def test_picture(tmp_path, symlog, probes):
    measure = _measure(SPECTRUM, probes)
    figure = plot_density(measure, symlog=symlog, title="a title")
    (ax,) = figure.axes
    x, y = ax.lines[0].get_data()
    if symlog:  # as wide as on the axis
        x = np.arcsinh(x / measure.log_density(sigma=0.2).linthresh)
    mass = np.trapezoid(y, x) if hasattr(np, "trapezoid") else np.trapz(y, x)
    assert mass == pytest.approx(53 * (np.log(10) if symlog else 1), rel=0.05)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "outliers resolved: 1 below, 2 above" in labels
    note = figure.get_supxlabel()
    assert f"{probes} probe{'s' * (probes > 1)} × 30 steps" in note
    assert ("a factor of 1.22" in note) == symlog
    assert ("no standard error" in note) == (probes == 1)
    save_figure(figure, tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 5000


@pytest.mark.parametrize("symlog", [False, True])
def test_panels_share_axes_and_kernels(tmp_path, symlog):
    measures = {f"layer {i}": _measure([x * i for x in SPECTRUM]) for i in range(1, 5)}
    figure = plot_density(measures, symlog=symlog)
    assert len(figure.axes) == 4
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert figure.axes[3].get_title().startswith("layer 4: 53 parameters")
    save_figure(figure, tmp_path / "layers.pdf")


@pytest.mark.parametrize("symlog", [False, True])
def test_legends_of_panels_cover_no_peak(symlog):
    measures = dict.fromkeys("abc", _measure([0.0] * 900 + SPECTRUM))
    figure = plot_density(measures, symlog=symlog)
    figure.canvas.draw()
    for ax in figure.axes:
        legend = ax.get_legend().get_window_extent()
        top = ax.transData.transform((0, max(ax.lines[0].get_ydata())))[1]
        assert legend.y0 > top + 0.03 * ax.bbox.height


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0], [-1e-12, 1e12]])
@pytest.mark.parametrize("symlog", [False, True])
def test_odd_spectra(tmp_path, values, symlog):
    save_figure(plot_density(_measure(values), symlog=symlog), tmp_path / "density.svg")


def test_outliers_are_not_claimed_without_orthogonality():
    figure = plot_density(_measure(SPECTRUM, reorthogonalize=False))
    assert len(figure.axes[0].get_legend().get_texts()) == 1


@pytest.mark.parametrize(
    ("measures", "sigma", "cause"),
    [(None, -1.0, "sigma"), (None, 1e-9, "sigma"), ({}, None, "one")],
)
def test_bad_arguments(measures, sigma, cause):
    with pytest.raises(InputError, match=cause):
        plot_density(_measure(SPECTRUM) if measures is None else measures, sigma=sigma)
