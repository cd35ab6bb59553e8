"""The index along training: what is trained, what a line holds, what the lines are made into."""

import json

import pandas as pd
import pytest
import torch
from torch import nn

import hvpspec
from examples.paper.curves import curve_runs, curve_tables, draw_curves, measure_curve, trajectories
from examples.paper.points import network_at
from hvpspec import zoo


def runs(**changes):
    settings = {
        "nets": ["cnn"],
        "data": {"mnist-sample": 2000},
        "activations": ["tanh"],
        "optimizers": ["sgd", "adam", "lbfgs"],
        "seeds": 1,
        "epochs": [0, 1, 2],
        "images": 5,
    }
    return curve_runs(**{**settings, **changes})


def test_the_initial_weights_are_shared_and_the_last_epochs_come_first():
    planned = runs()
    assert [(r.epochs, r.optimizer, r.lr, r.batch_size) for r in planned] == [
        (2, "sgd", 0.1, 64),
        (2, "adam", 1e-3, 64),
        (2, "lbfgs", 1.0, 2000),
        (1, "sgd", 0.1, 64),
        (1, "adam", 1e-3, 64),
        (1, "lbfgs", 1.0, 2000),
        (0, None, None, None),
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lbfgs"])
def test_who_trains_further_passes_by_the_points_of_shorter_trainings(tmp_path, optimizer):
    late, early = (r for r in runs(nets=["mlp2"], optimizers=[optimizer], epochs=[1, 2]))
    network_at(late, out=tmp_path / "both", data_dir=None, milestones=[0, 1, 2])
    kept = zoo.load_checkpoint(tmp_path / "both" / "checkpoints" / f"{early.stem}.pt")
    network_at(early, out=tmp_path / "one", data_dir=None)
    alone = zoo.load_checkpoint(tmp_path / "one" / "checkpoints" / f"{early.stem}.pt")
    assert kept.settings == alone.settings
    assert kept.history == alone.history
    for name, weights in alone.model.state_dict().items():
        assert torch.equal(weights, kept.model.state_dict()[name])
    assert len(list((tmp_path / "both" / "checkpoints").iterdir())) == 2


def test_a_line_says_what_the_library_says(tmp_path):
    (run,) = runs(optimizers=["adam"], epochs=[1])
    measured = measure_curve(run, epochs=[1], out=tmp_path, data_dir=None)
    record = json.loads(json.dumps(measured))
    model, data = zoo.cnn("tanh", seed=0), zoo.load_data("mnist-sample")
    zoo.train(model, data, zoo.TrainingSettings("adam", batch_size=64, epochs=1))
    few = data.subset(5)
    H = hvpspec.HessianOperator(model, nn.CrossEntropyLoss(), few.tensors, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(H.to_dense())
    assert record["index"] == int((eigenvalues < -record["tau"]).sum())
    assert record["index_fraction"] == record["index"] / 552
    assert record["ladder"]["1e-03"] == int((eigenvalues < -1e-3 * record["norm"]).sum())
    assert record["loss"] == pytest.approx(H.loss())
    assert record["grad_norm"] == pytest.approx(float(H.gradient().norm()))


def line(optimizer, seed, epochs, loss, index):
    return {
        **{"net": "mlp2", "data": "mnist", "activation": "tanh", "optimizer": optimizer},
        **{"lr": 0.1 if optimizer else None, "batch_size": 64 if optimizer else None},
        **{"images": 100, "seed": seed, "epochs": epochs, "loss": loss, "index": index},
        **{"accuracy": 0.5, "grad_norm": 1.0, "index_fraction": index / 7960, "tau": 1e-12},
        **{"raw_count": index + 9, "nullity": 3, "bound": 7850},
    }


LINES = pd.DataFrame(
    [
        line("sgd", 0, 2, 0.5, 30),
        line("sgd", 0, 1, 1.0, 40),
        line("adam", 0, 1, 0.7, 60),
        line("sgd", 1, 1, 1.5, 20),
        line(None, 0, 0, 2.0, 50),
        line(None, 1, 0, 2.5, 10),
    ]
)


def test_trajectories_begin_at_the_initial_weights_of_their_seed():
    told = {
        key: list(zip(own["epochs"], own["index"], strict=True))
        for key, own in trajectories(LINES).groupby(["optimizer", "seed"])
    }
    assert told == {
        ("sgd", 0): [(0, 50), (1, 40), (2, 30)],
        ("adam", 0): [(0, 50), (1, 60)],
        ("sgd", 1): [(0, 10), (1, 20)],
    }


def test_tables_by_hand():
    points, correlations = curve_tables(LINES)
    indices = points.frame.set_index(["optimizer", "images", "epoch", "runs"])["index"]
    assert indices["sgd", "100", "1", "2"] == "30.0 ± 14.1"  # of 40 and 20: 10 root 2
    assert indices["(initial)", "100", "0", "2"] == "30.0 ± 28.3"
    # Falls with the loss for seed 0 of sgd, grows as it falls for the others.
    assert correlations.frame.iloc[:, 2:].to_numpy().tolist() == [
        ["adam", "100", "1", "-1.00"],
        ["sgd", "100", "2", "0.00 ± 1.41"],
    ]
    # Nothing goes together with an index that never changes.
    same = [line("sgd", 0, 1, 1.0, 5), line("sgd", 0, 2, 0.5, 5), line(None, 0, 0, 2.0, 5)]
    _, none = curve_tables(pd.DataFrame(same))
    assert none.frame.iloc[0, 2:].tolist() == ["sgd", "100", "0", "–"]


def test_the_figure():
    figure = draw_curves(LINES)["curves"]
    against_loss, against_epochs = figure.axes
    assert against_loss.get_title() == "tanh: mlp2 on mnist, Hessian of 100 images"
    assert against_loss.get_xscale() == "log"
    assert against_loss.xaxis_inverted()
    drawn = [line.get_xydata().tolist() for line in against_epochs.lines]
    assert [[0, 50], [1, 40], [2, 30]] in drawn
    assert len(drawn) == 3
    assert "10^{-12}" in figure.get_supxlabel()
    assert "(0, 1)" in figure.get_supxlabel()
    assert draw_curves(LINES[LINES["epochs"] == 0]) == {}
