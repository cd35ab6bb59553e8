"""Networks trained together: each as alone; where they end, by hand and against the library."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from examples.paper.ensemble import EnsembleSettings, trained_ensemble
from examples.paper.solutions import (
    draw_solutions,
    measure_solution,
    principal_components,
    solution_runs,
    solution_tables,
)
from hvpspec import HessianOperator, zoo
from hvpspec.errors import InputError


def settings(**changes):
    small = {"count": 3, "images": 12, "epochs": 2, "batch_size": 5, "activation": "tanh"}
    return EnsembleSettings(**{"data": "mnist-sample", **small, **changes})


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_every_network_is_trained_as_it_would_be_alone(tmp_path, activation):
    s = settings(activation=activation)
    together = trained_ensemble(s, out=tmp_path, data_dir=None)
    data = zoo.load_data("mnist-sample", subset=12)
    steps = s.epochs * 3
    for seed in range(3):
        alone = zoo.cnn(activation, seed=seed)
        start = nn.utils.parameters_to_vector(alone.parameters()).detach()
        assert torch.equal(together.initial[seed], start)
        history = zoo.train(
            alone, data, zoo.TrainingSettings("adam", epochs=s.epochs, batch_size=5, seed=0)
        )
        weights = nn.utils.parameters_to_vector(alone.parameters()).detach()
        # A step of Adam is lr m / sqrt(v): a gradient's round-off, relative to what cancelled in
        # its sums over pixels, is the step's own. A wrong gradient changes steps by all of lr.
        difference = (together.final[seed] - weights).abs().max()
        assert float(difference) <= steps * s.lr * 784 * torch.finfo(torch.float32).eps
        assert float((weights - start).abs().max()) > s.lr
        assert float(together.losses[seed]) == pytest.approx(history.loss, rel=1e-5)
        assert float(together.accuracies[seed]) == history.accuracy


def test_training_goes_on_where_it_was(tmp_path):
    class Stop(Exception):
        pass

    def stop(epoch, loss):
        if epoch == 1:
            raise Stop

    whole = trained_ensemble(settings(epochs=3), out=tmp_path / "whole", data_dir=None)
    parts, told = tmp_path / "parts", []
    with pytest.raises(Stop):
        trained_ensemble(settings(epochs=3), out=parts, data_dir=None, progress=stop)
    again = trained_ensemble(
        settings(epochs=3), out=parts, data_dir=None, progress=lambda *x: told.append(x[0])
    )
    assert told == [2, 3]
    assert torch.equal(again.final, whole.final)
    (path,) = (parts / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="remove it"):
        trained_ensemble(settings(epochs=3), out=parts, data_dir=None)


def test_principal_components_by_hand():
    # A cross of half-axes 3 and 1 about (5, 5, 5), in the plane of the first and the last axis.
    points = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 0, 1], [0, 0, -1]]) + 5
    placed = principal_components(points)
    assert placed.explained[:2] == pytest.approx([0.9, 0.1])  # 18 and 2 of 20
    assert placed.coordinates[:, 0] == pytest.approx([3, -3, 0, 0])
    assert placed.coordinates[:, 1] == pytest.approx([0, 0, 1, -1])
    assert placed.distances[0] == pytest.approx([0, 6, 10**0.5, 10**0.5])
    assert placed.from_mean == pytest.approx([3, 3, 1, 1])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("solutions")
    runs = solution_runs([settings()], indexed=1)
    records = [
        json.loads(json.dumps({**vars(run), **measure_solution(run, out=out, data_dir=None)}))
        for run in runs
    ]
    return out, records


def test_a_line_says_what_the_library_says(done):
    out, records = done
    ensemble = trained_ensemble(settings(), out=out, data_dir=None)
    theta = ensemble.final.double()
    for i, r in enumerate(records):
        others = [float((theta[i] - theta[j]).norm()) for j in range(3) if j != i]
        assert r["mean_distance"] == pytest.approx(sum(others) / 2)
        assert r["nearest"] == pytest.approx(min(others))
        assert r["from_mean"] == pytest.approx(float((theta[i] - theta.mean(0)).norm()))
        # Three points lie in the plane.
        assert r["pc1"] ** 2 + r["pc2"] ** 2 == pytest.approx(r["from_mean"] ** 2)
        moved = float((theta[i] - ensemble.initial[i].double()).norm())
        assert r["moved"] == pytest.approx(moved)
    assert records[0]["explained"][:2] == pytest.approx(
        [
            sum(r[pc] ** 2 for r in records) / sum(r["from_mean"] ** 2 for r in records)
            for pc in ("pc1", "pc2")
        ]
    )
    model = zoo.cnn("tanh")
    nn.utils.vector_to_parameters(ensemble.final[0], model.parameters())
    few = zoo.load_data("mnist-sample", subset=12).tensors
    H = HessianOperator(model, nn.CrossEntropyLoss(), few, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(H.to_dense())
    assert records[0]["index"] == int((eigenvalues < -records[0]["tau"]).sum())
    assert records[0]["grad_norm"] == pytest.approx(float(H.gradient().norm()))
    assert "index" not in records[1]


def test_tables_and_figure(done):
    _, records = done
    # A line without the index beside one with it: the network counts once, with its index.
    extra = {key: records[0][key] for key in records[1]} | {"indexed": False}
    lines = pd.DataFrame([extra, *records])
    solutions, sample = solution_tables(lines)
    (row,) = solutions.frame.to_numpy().tolist()
    assert row[:5] == ["cnn tanh", "mnist-sample", "3", "12", "2"]
    assert sample.frame["index"].tolist() == [f"{records[0]['index']:.1f}"]
    figure = draw_solutions(lines)["solutions"]
    points = figure.axes[0].collections[0].get_offsets()
    assert np.asarray(points) == pytest.approx(np.array([[r["pc1"], r["pc2"]] for r in records]))
    assert [text.get_text() for text in figure.axes[0].texts] == [str(records[0]["index"])]
    assert [table.title for table in solution_tables(lines[2:])] == [solutions.title]
