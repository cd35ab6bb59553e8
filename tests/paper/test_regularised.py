"""What λ does to index and nullity: by hand, against shifted matrices, and after training."""

import json

import pandas as pd
import pytest
import torch
from torch import nn

from examples.paper.points import Protocol, Spectrum, read_spectrum
from examples.paper.regularised import (
    by_lambda,
    draw_regularised,
    measure_regularised,
    regularised_runs,
    regularised_tables,
)
from hvpspec import HessianOperator, zoo
from hvpspec.errors import InputError


def runs(retrained=(), seeds=1):
    protocol = Protocol("short", epochs=1, batch_size=200)
    return regularised_runs(["cnn"], ["mnist-sample"], ["tanh"], seeds, 5, protocol, retrained)


def test_counts_by_hand():
    eigenvalues = torch.tensor([-2.0, -1.0, -1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    found = by_lambda(Spectrum(eigenvalues, noise_floor=0.1))
    assert (found["index"], found["nullity"], found["norm"], found["dim"]) == (3, 2, 3.0, 6)
    for l2, index, nullity, distance in zip(
        *(found[name] for name in ("lambdas", "indices", "nullities", "distances")), strict=True
    ):
        expected = min(abs(mu + 2 * l2) for mu in eigenvalues.tolist())
        assert distance == pytest.approx(expected)
        assert index == sum(mu + 2 * l2 < -0.1 for mu in eigenvalues.tolist())
        assert nullity == sum(abs(mu + 2 * l2) <= 0.1 for mu in eigenvalues.tolist())
    assert found["shown"]["0.1"]["index"] == 3
    assert found["shown"]["0.1"]["nullity"] == 0
    # −2λ within 0.1 of 0, −1 or −2: λ in [0, 0.05], [0.45, 0.55] and [0.95, 1.05].
    assert found["nondegenerate_from"] == pytest.approx(0.05)
    assert found["positive_from"] == pytest.approx(1.05)
    assert found["degenerate_part"] == pytest.approx((0.05 + 0.1 + 0.1) / 1.05)


def test_overlapping_intervals_are_not_counted_twice():
    eigenvalues = torch.tensor([-1.0, -0.95, -0.1, 1.0], dtype=torch.float64)
    found = by_lambda(Spectrum(eigenvalues, noise_floor=0.1))
    # λ in [0, 0.1] about −0.1, and [0.425, 0.55] about −0.95 and −1.
    assert found["nondegenerate_from"] == pytest.approx(0.1)
    assert found["degenerate_part"] == pytest.approx((0.1 + 0.125) / 0.55)


def test_without_an_eigenvalue_near_0_no_lambda_is_needed():
    found = by_lambda(Spectrum(torch.tensor([-1.0, 1.0], dtype=torch.float64), noise_floor=1e-9))
    assert found["nondegenerate_from"] == 0
    positive = by_lambda(Spectrum(torch.tensor([1.0, 2.0], dtype=torch.float64), noise_floor=1e-9))
    assert positive["positive_from"] == positive["degenerate_part"] == 0
    assert set(positive["indices"]) == set(positive["nullities"]) == {0}


def matrix(model, l2=0.0):
    few = zoo.load_data("mnist-sample", subset=5).tensors
    H = HessianOperator(model, nn.CrossEntropyLoss(), few, l2=l2, dtype=torch.float64)
    return H.to_dense()


def test_fixed_weights_against_shifted_matrices(tmp_path):
    run = runs()[1]
    record = json.loads(json.dumps(measure_regularised(run, out=tmp_path, data_dir=None)))
    assert record["state"] == "random"
    for l2, counts in record["shown"].items():
        shifted = torch.linalg.eigvalsh(matrix(zoo.cnn("tanh"), l2=float(l2)))
        assert counts["index"] == int((shifted < -counts["tau"]).sum())
        assert counts["nullity"] == int((shifted.abs() <= counts["tau"]).sum())


def test_kept_spectra_are_read_again_and_damaged_ones_refused(tmp_path):
    run = runs()[1]
    first = measure_regularised(run, out=tmp_path, data_dir=None)
    (path,) = (tmp_path / "spectra").iterdir()
    assert read_spectrum(path).norm == first["norm"]
    modified = path.stat().st_mtime_ns
    assert measure_regularised(run, out=tmp_path, data_dir=None) == first
    assert path.stat().st_mtime_ns == modified
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="remove it"):
        measure_regularised(run, out=tmp_path, data_dir=None)


def test_trained_with_lambda(tmp_path):
    run = runs([0.05])[2]
    record = json.loads(json.dumps(measure_regularised(run, out=tmp_path, data_dir=None)))
    model, data = zoo.cnn("tanh"), zoo.load_data("mnist-sample")
    zoo.train(model, data, zoo.TrainingSettings("adam", batch_size=200, epochs=1, l2=0.05))
    plain = torch.linalg.eigvalsh(matrix(model))
    tau = record["tau"]
    assert record["index"] == int((plain + 0.1 < -tau).sum())
    assert record["nullity"] == int((plain + 0.1).abs().le(tau).sum()) == 0
    assert record["nondegenerate"]
    assert record["distance"] == pytest.approx(float((plain + 0.1).abs().min()))
    assert record["squared_norm"] == pytest.approx(
        sum(float(p.detach().square().sum()) for p in model.parameters())
    )
    assert record["loss"] == pytest.approx(record["data_loss"] + 0.05 * record["squared_norm"])
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.stem.endswith("-l20.05")


def test_tables_and_figure(tmp_path):
    records = []
    for run in runs([0.05]):
        measured = measure_regularised(run, out=tmp_path, data_dir=None)
        records.append({**vars(run), **measured})
    lines = pd.DataFrame(records)
    fixed, retrained = regularised_tables(lines)
    assert fixed.frame[["network", "data", "state"]].to_numpy().tolist() == [
        ["cnn tanh", "mnist-sample", "random"],
        ["cnn tanh", "mnist-sample", "trained"],
    ]
    shown = records[1]["shown"]["0.01"]["index"]
    assert fixed.frame["index, λ = 0.01"].iloc[0] == f"{shown:,}"
    (row,) = retrained.frame.to_dict("records")
    assert (row["λ"], row["index"]) == ("0.05", f"{records[2]['index']:,}")
    assert [table.title for table in regularised_tables(lines[:2])] == [fixed.title]
    figure = draw_regularised(lines)["regularised"]
    indices, nullities = figure.axes
    assert (indices.get_ylabel(), nullities.get_ylabel()) == ("index", "nullity")
    assert len(indices.lines) == len(nullities.lines) == 3
    assert [0.05, records[2]["index"]] in indices.lines[2].get_xydata().tolist()
