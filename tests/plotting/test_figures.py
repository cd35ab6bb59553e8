import numpy as np
import pytest
import torch

import hvpspec
from hvpspec.errors import InputError
from hvpspec.linalg.operator import IndexBound, PointFacts
from hvpspec.plotting import (
    check_picture,
    plot_index_curve,
    plot_spectrum,
    save_figure,
    spectrum_histogram,
)

SPECTRA = {
    "both signs": np.concatenate([-np.geomspace(1e-8, 1e-1, 30), np.zeros(50), [1e-5, 1, 5.5]]),
    "negative": -np.geomspace(1e-3, 10, 20),
    "positive": np.geomspace(1e-3, 10, 20),
    "zero": np.zeros(4),
    "one": np.array([2.0]),
    "one tiny": np.array([-1e-300, 3.0]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("bins", [1, 7, 100])
@pytest.mark.parametrize("symlog", [False, True])
@pytest.mark.parametrize("floor", [0.0, 1e-9])
def test_every_eigenvalue_is_counted_once(name, bins, symlog, floor):
    values = SPECTRA[name]
    histogram = spectrum_histogram(values, noise_floor=floor, symlog=symlog, bins=bins)
    edges, counts = histogram.edges, histogram.counts
    assert (np.diff(edges) > 0).all()
    assert histogram.num_zero == (np.abs(values) <= floor).sum()
    assert counts.sum() + histogram.num_zero == len(values)
    # no bin mixes signs
    assert counts[edges[1:] <= 0].sum() == (values < -floor).sum()
    assert counts[edges[:-1] >= 0].sum() == (values > floor).sum()


def test_bins_of_a_symlog_axis_are_equally_wide_on_it():
    histogram = spectrum_histogram([-1.0, 0.0, 1.0], noise_floor=1e-4, symlog=True, bins=20)
    widths = np.diff(np.log10(histogram.edges[histogram.edges > 0]))
    assert widths == pytest.approx(np.full(len(widths), widths[0]))
    assert histogram.linear_threshold == 1e-4


@pytest.mark.parametrize(
    ("values", "options", "cause"),
    [
        ([], {}, "expected finite eigenvalues"),
        ([np.nan], {}, "expected finite eigenvalues"),
        ([[1.0]], {}, "expected finite eigenvalues"),
        ([1.0], {"noise_floor": -1.0}, "noise_floor"),
        ([1.0], {"bins": 0}, "bins"),
    ],
)
def test_bad_histograms(values, options, cause):
    with pytest.raises(InputError, match=cause):
        spectrum_histogram(values, **{"noise_floor": 1e-9, **options})


# A picture of both has the other two as its panels.
@pytest.mark.parametrize(
    ("name", "scale", "panels"),
    [("both signs", "linear", 1), ("both signs", "symlog", 1), *((n, "both", 2) for n in SPECTRA)],
)
def test_spectrum_pictures(tmp_path, name, scale, panels):
    figure = plot_spectrum(SPECTRA[name], noise_floor=1e-9, scale=scale, title="a title")
    assert len(figure.axes) == panels
    for ax in figure.axes:
        assert ax.get_yscale() == "log"
        assert ax.get_xlabel().startswith("eigenvalue λ")
        assert ax.get_ylabel() == "number of eigenvalues"
    save_figure(figure, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 5000


def test_heights_are_counts():
    figure = plot_spectrum([-1.0, -1.0, 0.0, 3.0], noise_floor=1e-9, bins=4)
    heights = sorted(bar.get_height() for bar in figure.axes[0].patches)
    assert heights == [0, 0, 1, 2]


def test_linear_threshold_is_stated():
    figure = plot_spectrum([1.0], noise_floor=0.5, scale="symlog")
    assert "linear within ±0.5" in figure.axes[0].get_xlabel()


def test_unknown_scale():
    with pytest.raises(InputError, match="scale"):
        plot_spectrum([1.0], noise_floor=0.0, scale="log")


def _result(values, tau=None, bound=None, method="exact"):
    """The index of a rotated diagonal matrix, so that there is round-off."""
    generator = torch.Generator().manual_seed(0)
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    A = Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.mT

    class Known(hvpspec.DenseOperator):
        def facts(self):
            return PointFacts(index_bound=bound)

    return hvpspec.index(Known((A + A.mT) / 2), tau, method=method)


def _line(figure):
    line = figure.axes[0].lines[0]
    return line.get_xdata(), line.get_ydata()


def test_curve_is_the_exact_staircase(tmp_path):
    result = _result([0.0] * 30 + [-1e-3, -0.5, -2.0, 4.0], bound=IndexBound(5, 29, "reason"))
    figure = plot_index_curve(result, title="a title")
    taus, counts = _line(figure)
    assert figure.axes[0].lines[0].get_drawstyle() == "steps-post"
    for tau, count in ((1e-5, 3), (0.01, 2), (1.0, 1), (3.0, 0)):
        assert counts[np.searchsorted(taus, tau, side="right") - 1] == count
    assert counts[0] > 3  # round-off is shown
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "structural upper bound: 5" in labels
    assert any("round-off" in label and str(result.raw_count) in label for label in labels)
    assert "index 3" in figure.axes[0].texts[0].get_text()
    save_figure(figure, tmp_path / "curve.pdf")
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")


def test_curve_of_an_interval():
    figure = plot_index_curve(_result([0.0] * 30 + [-1.0, 2.0], tau=1e-18))
    assert figure.axes[0].texts[0].get_text().startswith("index [1, 31] at")


def test_round_off_that_dwarfs_the_index_is_on_a_logarithm():
    figure = plot_index_curve(_result([0.0] * 100 + [-1.0, 2.0]))
    assert figure.axes[0].get_yscale() == "symlog"


@pytest.mark.parametrize(
    ("values", "tau"), [([0.0, 0.0], None), ([2.0], 0.0), ([-2.0], 5.0), ([-1e-130, 1e-130], None)]
)
def test_curves_of_odd_spectra(tmp_path, values, tau):
    save_figure(plot_index_curve(_result(values, tau)), tmp_path / "curve.png")


def test_curve_needs_eigenvalues():
    with pytest.raises(InputError, match="method='exact'"):
        plot_index_curve(_result([1.0, -1.0], method="inertia"))


@pytest.mark.parametrize("method", ["certified", "quadrature", "filtered"])
def test_curve_of_brackets(tmp_path, method):
    values = torch.diag(torch.tensor([0.0] * 30 + [-1e-3, -0.5, -2.0, 4.0], dtype=torch.float64))
    ladder = [1.0, 0.01, 1e-5]
    result = hvpspec.index(values, method=method, tau_ladder=ladder)
    figure = plot_index_curve(result, title="a title")
    ax = figure.axes[0]
    for lines, bound in ((ax.lines[0], "lower"), (ax.lines[1], "upper")):
        # fine to coarse; the band between two resolutions is what both allow
        known = [getattr(rung, bound) for rung in result.ladder[::-1]]
        expected = [*known[1:], 0, 0] if bound == "lower" else [*known, known[-1]]
        assert lines.get_ydata().tolist() == expected
        assert lines.get_drawstyle() == "steps-post"
    texts = [text.get_text() for text in ax.texts]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any(label.startswith("certified") for label in labels) == (method == "certified")
    if method == "certified":
        assert texts == ["1", "2", "3"]
    save_figure(figure, tmp_path / "curve.png")
    assert ("may be counted or not" in ax.get_xlabel()) == (method == "filtered")
    legend = ax.get_legend().get_window_extent()
    assert not any(legend.overlaps(text.get_window_extent()) for text in ax.texts)


@pytest.mark.parametrize("name", ["x.gif", "x", "missing/x.png"])
def test_pictures_that_cannot_be_written(tmp_path, name):
    with pytest.raises(InputError, match="cannot write"):
        check_picture(tmp_path / name)
    with pytest.raises(InputError, match="cannot write"):
        save_figure(plot_spectrum([1.0], noise_floor=0.0), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
