import numpy as np
import pytest
import torch

from hvpspec.zoo import load_checkpoint


def test_trains_and_reports(run, workspace):
    outcome = run(
        "train --net tiny_cli_network:make --net-arg width=2 --data plane.npz --subset 30"
        " --optimizer adam --lr 0.01 --epochs 2 --batch-size 10 --l2 0.001 --seed 3 --out net.pt"
    )
    assert not outcome.code
    assert "training loss" in outcome.out
    assert "training accuracy" in outcome.out
    assert "test_inputs" in outcome.out  # says why there is no test loss
    assert "wrote net.pt" in outcome.out
    assert outcome.err == ""  # no bar where nobody watches
    found = load_checkpoint("net.pt", net="tiny_cli_network:make")
    assert found.network.arguments == {"width": 2}
    assert (found.data.source, found.data.subset) == ("plane.npz", 30)
    assert (found.settings.optimizer, found.settings.l2, found.settings.seed) == ("adam", 0.001, 3)


def test_reports_the_test_split(run, workspace):
    arrays = np.load("plane.npz")
    np.savez("both.npz", **arrays, test_inputs=arrays["inputs"], test_targets=arrays["targets"])
    outcome = run("train --net tiny_cli_network:make --data both.npz --epochs 1 --out net.pt")
    assert "test accuracy" in outcome.out


def test_same_seed_same_weights(run, workspace):
    command = "train --net tiny_cli_network:make --data plane.npz --epochs 2 --seed"
    states = []
    for seed, out in (("1", "a.pt"), ("1", "b.pt"), ("2", "c.pt")):
        run(f"{command} {seed} --out {out}")
        states.append(load_checkpoint(out, net="tiny_cli_network:make").model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_regression(run, workspace):
    arrays = np.load("plane.npz")
    np.savez("values.npz", inputs=arrays["inputs"], targets=arrays["inputs"][:, :1])
    outcome = run(
        "train --net linear --net-arg in_features=2 --data values.npz --loss mse --out net.pt"
    )
    assert not outcome.code
    assert "accuracy" not in outcome.out
    outcome = run("index --model net.pt --exact")
    assert not outcome.code
    assert "mse" in outcome.out


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("--net nothing --data plane.npz", "unknown network 'nothing'"),
        ("--net mlp2 --net-arg activation=cubic --data plane.npz", "unknown activation 'cubic'"),
        ("--net mlp2 --net-arg activation --data plane.npz", "--net-arg takes name=value"),
        ("--net mlp2 --net-arg depth=3 --data plane.npz", "depth"),
        ("--net mlp2 --data nothing", "unknown data 'nothing'"),
        ("--net mlp2 --data missing.npz", "missing.npz does not exist"),
        ("--net mlp2 --data plane.npz", "cannot take inputs of shape"),
        ("--net tiny_cli_network:make --data plane.npz --subset 41", "subset is 41"),
        ("--net tiny_cli_network:make --data plane.npz --lr nan", "lr is nan"),
        ("--net tiny_cli_network:make --data plane.npz --momentum 1", "momentum is 1"),
        ("--net tiny_cli_network:make --data plane.npz --epochs -1", "epochs is -1"),
        ("--net tiny_cli_network:make --data mnist --data-dir nowhere", "nowhere"),
        ("--net no_such_module:make --data plane.npz", "no_such_module"),
    ],
)
def test_bad_input(run, workspace, options, cause):
    before = sorted(workspace.iterdir())
    outcome = run(
        f"train {options} --epochs 1 --out net.pt"
        if "--epochs" not in options
        else f"train {options} --out net.pt"
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert cause in outcome.err
    assert len(outcome.err.splitlines()) <= 2
    assert [p for p in sorted(workspace.iterdir()) if p.name != "__pycache__"] == before


@pytest.mark.parametrize("out", ["missing/net.pt", "."])
def test_target_is_checked_before_the_work(run, workspace, out):
    outcome = run(f"train --net no_such_module:make --data nothing --out {out}")
    assert outcome.code == 2
    assert "cannot write" in outcome.err


def test_divergence_is_a_failure(run, workspace):
    outcome = run(
        "train --net linear --net-arg in_features=2 --net-arg out_features=2"
        " --data plane.npz --l2 10 --lr 1000 --epochs 50 --out net.pt"
    )
    assert outcome.code == 1
    assert "diverged" in outcome.err
    assert not (workspace / "net.pt").exists()
