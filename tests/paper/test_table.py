"""The table of indices: what a line holds, against the library; what the tables make of lines."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hvpspec
from examples.paper.points import QUICK, STANDARD, Protocol, hessian_at, network_at
from examples.paper.published import published_text
from examples.paper.table import claims_table, measure_index, table_runs, table_tables
from examples.paper.tables import mean_std
from hvpspec import zoo


def runs(**changes):
    settings = {
        "nets": ["cnn"],
        "data": ["mnist-sample"],
        "activations": ["tanh"],
        "seeds": 1,
        "images": 20,
        "protocol": Protocol("short", epochs=1, batch_size=200),
    }
    return table_runs(**{**settings, **changes})


def test_the_whole_table_is_planned():
    planned = runs(
        nets=["cnn", "mlp2", "mlp3"],
        data=["mnist", "fashion-mnist"],
        activations=["relu", "tanh"],
        seeds=10,
        images=10_000,
        protocol=STANDARD,
    )
    assert len(set(planned)) == 3 * 2 * 2 * 2 * 10
    # The first seed of everything before the second of anything.
    assert [run.seed for run in planned] == sorted(run.seed for run in planned)
    trained = {(r.net, r.optimizer, r.lr, r.batch_size, r.epochs) for r in planned if r.epochs}
    assert trained == {
        ("cnn", "adam", 1e-3, 64, 20),
        ("mlp2", "sgd", 0.1, 64, 20),
        ("mlp3", "sgd", 0.1, 64, 20),
    }
    assert {(r.optimizer, r.lr, r.batch_size) for r in planned if not r.epochs} == {(None,) * 3}


def test_random_weights_are_the_same_point_under_every_protocol():
    assert runs(protocol=QUICK)[1] == runs(protocol=STANDARD)[1]
    assert runs(protocol=QUICK)[0] != runs(protocol=STANDARD)[0]


@pytest.mark.parametrize("state", ["trained", "random"])
def test_a_line_says_what_the_library_says(tmp_path, state):
    run = runs(seeds=2)[0 if state == "trained" else 1]
    record = json.loads(json.dumps(measure_index(run, out=tmp_path, data_dir=None)))
    assert record["state"] == state

    model = zoo.cnn("tanh", seed=0)
    data = zoo.load_data("mnist-sample")
    if state == "trained":
        settings = zoo.TrainingSettings(optimizer="adam", epochs=1, batch_size=200, seed=0)
        zoo.train(model, data, settings)
    few = data.subset(20)
    H = hvpspec.HessianOperator(model, nn.CrossEntropyLoss(), few.tensors, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(H.to_dense())
    assert record["norm"] == pytest.approx(float(eigenvalues.abs().max()))
    assert record["lambda_min"] == pytest.approx(float(eigenvalues[0]))
    assert record["tau"] == record["noise_floor"] > 0
    # Between zeros to some 1e-16 and the rest there is room: the counts do not hang on a digit.
    for ratio in (1e-6, 1e-8, 1e-10):
        expected = int((eigenvalues < -ratio * record["norm"]).sum())
        assert record["ladder"][f"{ratio:.0e}"] == expected
    assert record["index"] == int((eigenvalues < -record["tau"]).sum())
    assert record["nullity"] == int((eigenvalues.abs() <= record["tau"]).sum())
    assert record["index"] <= record["bound"] == 52
    assert record["index"] <= record["raw_count"] <= record["index"] + record["nullity"]
    assert record["grad_norm"] == pytest.approx(float(H.gradient().norm()))
    loss, accuracy = zoo.evaluate(model, few)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["accuracy"] == accuracy
    (spectrum,) = (tmp_path / "spectra").iterdir()
    with np.load(spectrum) as kept:
        assert np.sum(kept["eigenvalues"] < -kept["noise_floor"]) == record["index"]


def test_a_trained_network_is_read_again(tmp_path, monkeypatch):
    run = runs()[0]
    first = network_at(run, out=tmp_path, data_dir=None).state_dict()
    monkeypatch.setattr(zoo, "train", None)
    again = network_at(run, out=tmp_path, data_dir=None).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # Other settings are another file.
    other = runs(protocol=Protocol("other", epochs=1, batch_size=100))[0]
    with pytest.raises(TypeError):
        network_at(other, out=tmp_path, data_dir=None)


def test_the_matrix_is_of_the_precision_asked_for(tmp_path):
    run = runs()[1]
    model = network_at(run, out=tmp_path, data_dir=None)
    data = zoo.load_data("mnist-sample", subset=10)
    for dtype in (torch.float32, torch.float64):
        assert hessian_at(model, data, dtype).to_dense().dtype == dtype


def test_mean_and_deviation_by_hand():
    # (1 + 4 + 16) / 3 = 7; deviations -6, -3, 9: (36 + 9 + 81) / 2 = 63, and its root.
    assert mean_std(pd.Series([1, 4, 16]), ".2f") == "7.00 ± 7.94"
    assert mean_std(pd.Series([1234.5])) == "1,234.5"


def line(net, data, state, seed, raw, **changes):
    trained = state == "trained"
    return {
        **{"net": net, "data": data, "activation": "relu", "state": state, "seed": seed},
        **{"images": 10_000, "dtype": "float64", "protocol": "standard"},
        **{"epochs": 20 if trained else 0, "optimizer": "adam" if trained else None},
        **{"lr": 1e-3 if trained else None, "batch_size": 64 if trained else None},
        **{"raw_count": raw, "index": 50, "nullity": 7, "dim": 552},
        **{"bound": 52, "grad_norm": 0.5, "loss": 0.25, "accuracy": 0.9, "norm": 2.0},
        **{"tau": 1e-12, "ladder": {"1e-03": 40, "1e-04": raw}},
        **changes,
    }


def test_cells_of_the_table():
    records = [
        line("cnn", "mnist", "trained", 0, 70),
        line("cnn", "mnist", "trained", 1, 74),
        line("cnn", "mnist", "random", 0, 60),
        line("cnn", "mnist", "trained", 0, 99, images=60_000),
        line("mlp2", "mnist-sample", "trained", 0, 80, bound=None),
    ]
    counts, points, ladder = table_tables(pd.DataFrame(records))[:3]
    names = ["network", "data", "state", "images", "runs"]
    rows = {tuple(row[n] for n in names): row for row in counts.frame.to_dict("records")}
    assert len(rows) == 4
    trained = rows["cnn relu", "mnist", "trained", "10,000", "2"]
    assert trained["raw"] == "72.0 ± 2.8"  # (4 + 4) / 1 = 8, and its root
    assert trained["index"] == "50.0 ± 0.0"
    assert trained["bound"] == "52"
    assert trained["published"] == "232.9 ± 2.88"
    assert rows["cnn relu", "mnist", "random", "10,000", "1"]["published"] == "182.91 ± 80.17"
    assert rows["cnn relu", "mnist", "trained", "60,000", "1"]["raw"] == "99.0"
    sample = rows["mlp2 relu", "mnist-sample", "trained", "10,000", "1"]
    assert (sample["published"], sample["bound"]) == ("–", "–")
    assert points.frame[names].equals(counts.frame[names])
    assert ladder.frame[names].equals(counts.frame[names])
    assert points.frame.iloc[0, 5:7].tolist() == ["none", "0.5"]
    assert points.frame["training"][1] == "adam 0.001, batch 64, 20 epochs"
    assert ladder.frame.columns[5:].tolist() == ["1e-03 ‖H‖", "1e-04 ‖H‖"]
    assert ladder.frame.iloc[1, 5:].tolist() == ["40.0 ± 0.0", "72.0 ± 2.8"]


def test_claims_by_hand():
    ends = {"1e-04": 10}
    records = [
        line("cnn", "mnist", "random", 0, 60, **ends, index=51),
        line("cnn", "mnist", "trained", 0, 70, **ends, index=20),
        line("cnn", "mnist", "random", 1, 60, **ends, index=49),
        line("cnn", "mnist", "trained", 1, 70, **ends, index=30),
        line("cnn", "mnist", "trained", 2, 70, **ends, index=99),  # nothing to compare it with
        line("mlp2", "mnist", "random", 0, 60, **ends, index=40, bound=None),
        line("mlp2", "mnist", "trained", 0, 60, **{**ends, "1e-04": 11}, index=40, bound=None),
    ]
    cnn, mlp = claims_table(pd.DataFrame(records)).frame.to_dict("records")
    assert (cnn["network"], mlp["network"]) == ("CNN, relu", "2-MLP, relu")
    assert (cnn["index, trained"], cnn["random"]) == ("25.0 ± 7.1", "50.0 ± 1.4")
    assert (cnn["higher"], cnn["bound"], cnn["of n"]) == ("0 of 2", "52", "4.5%")
    assert (cnn["std / mean"], mlp["std / mean"]) == ("28.3%", "–")
    assert (mlp["higher"], mlp["higher at 1e-04 ‖H‖"], mlp["bound"]) == ("0 of 1", "1 of 1", "–")


def test_published_numbers():
    assert published_text("mlp2", "fashion-mnist", "trained") == "3,637.9 ± 119.92"
    assert published_text("mlp2", "mnist-sample", "trained") == "–"
