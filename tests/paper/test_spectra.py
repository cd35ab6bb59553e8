"""Spectra of networks: what a line holds, against the library; what is drawn of them."""

import json

import pandas as pd
import pytest
import torch
from torch import nn

from examples.paper.points import Protocol, Spectrum, read_spectrum, spectrum_path
from examples.paper.spectra import (
    draw_spectra,
    measure_spectra,
    spectra_runs,
    spectra_tables,
    spectrum_record,
)
from hvpspec import GGNOperator, HessianOperator, zoo


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("spectra")
    protocol = Protocol("short", epochs=1, batch_size=500)
    runs = spectra_runs(["cnn"], ["mnist-sample"], ["tanh"], 4, protocol)
    records = [
        json.loads(json.dumps({**vars(run), **measure_spectra(run, out=out, data_dir=None)}))
        for run in runs
    ]
    return out, runs, records


def model_and_data():
    model, data = zoo.cnn("tanh"), zoo.load_data("mnist-sample")
    zoo.train(model, data, zoo.TrainingSettings("adam", batch_size=500, epochs=1))
    return model, nn.CrossEntropyLoss(), data.subset(4).tensors


def test_every_matrix_has_the_eigenvalues_of_the_library(done):
    out, runs, records = done
    H = HessianOperator(*model_and_data(), dtype=torch.float64)
    G = GGNOperator(*model_and_data(), dtype=torch.float64)
    whole, gauss_newton = H.to_dense(), G.to_dense()
    slices = {"conv1": slice(0, 26), "conv2": slice(26, 52), "output": slice(52, 552)}
    expected = {"hessian": whole, "gauss-newton": gauss_newton}
    expected |= {layer: whole[rows, rows] for layer, rows in slices.items()}
    told = {name: found for r in records for name, found in r["spectra"].items()}
    assert list(told) == list(expected)
    for name, matrix in expected.items():
        path = spectrum_path(runs[0], 4, out, name)
        eigenvalues = torch.linalg.eigvalsh(matrix)
        kept = read_spectrum(path)
        # Both matrices sum over the pixels of all images, in different orders.
        error = 4 * 784 * torch.finfo(torch.float64).eps * kept.norm * len(eigenvalues)
        assert float((kept.eigenvalues - eigenvalues).abs().max()) <= error
        found = told[name]
        assert found["dim"] == len(eigenvalues)
        assert found["index"] == int((kept.eigenvalues < -found["tau"]).sum())
        assert found["lambda_max"] == pytest.approx(float(eigenvalues[-1]))
    assert told["gauss-newton"]["index"] == told["output"]["index"] == 0
    difference = torch.linalg.matrix_norm(whole - gauss_newton) / torch.linalg.matrix_norm(whole)
    assert records[1]["relative_difference"] == pytest.approx(float(difference))
    assert records[1]["trace"] == pytest.approx(float(gauss_newton.trace()))
    assert records[1]["trace_hessian"] == pytest.approx(float(whole.trace()))


def test_a_spectrum_by_hand():
    bulk = torch.linspace(-1e-3, 1e-3, 40, dtype=torch.float64)
    found = spectrum_record(
        Spectrum(torch.cat([torch.tensor([-2.0]).double(), bulk, torch.tensor([5.0, 9.0])]), 1e-9)
    )
    assert found["bulk"] == pytest.approx([-1e-3, 1e-3])
    assert found["below"] == [-2.0]
    assert found["above"] == [5.0, 9.0]
    assert found["gap_below"] == pytest.approx(2 - 1e-3)
    assert found["gap_above"] == pytest.approx(5 - 1e-3)
    assert (found["index"], found["nullity"], found["norm"]) == (21, 0, 9.0)
    assert found["around_zero"] == pytest.approx([float(bulk[19]), float(bulk[20])])
    zero = spectrum_record(Spectrum(torch.zeros(3, dtype=torch.float64), 0.0))
    assert zero["around_zero"] == [None, None]


def test_tables_and_figures(done):
    out, _, records = done
    lines = pd.DataFrame(records)
    spectra, differences = spectra_tables(lines)
    assert spectra.frame["matrix"].tolist() == [
        *("hessian", "gauss-newton", "conv1", "conv2", "output"),
    ]
    assert differences.frame.iloc[0, 2:].tolist() == [
        "4",
        f"{records[1]['relative_difference']:.3f}",
        f"{records[1]['trace']:.4g}",
        f"{records[1]['trace_hessian']:.4g}",
    ]
    figures = draw_spectra(lines, out=out)
    assert list(figures) == [f"spectra-tanh-{kind}" for kind in ("linear", "symlog", "parts")]
    (histogram,) = figures["spectra-tanh-symlog"].axes
    assert histogram.get_xscale() == "symlog"
    assert histogram.get_title() == "cnn tanh on mnist-sample, 4 images, seed 0"
    (ranks,) = figures["spectra-tanh-parts"].axes
    assert len(ranks.lines) == 10  # both signs of five matrices
    # Without the Hessian there is no histogram.
    assert list(draw_spectra(lines[1:], out=out)) == ["spectra-tanh-parts"]
