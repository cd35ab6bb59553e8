import argparse
import json

import torch


def test_describes_a_checkpoint(run, checkpoint):
    outcome = run(f"info {checkpoint} --json info.json")
    assert not outcome.code
    for text in ("output.weight", "2 × 2", "float32", "plane.npz", "lr=0.1", "torch", "l2=0.01"):
        assert text in outcome.out
    with open("info.json") as file:
        content = json.load(file)
    assert (content["format"], content["version"]) == ("hvpspec-checkpoint-info", 1)
    assert content["num_parameters"] == 6
    assert content["tensors"][0] == {
        "name": "output.weight",
        "shape": [2, 2],
        "dtype": "float32",
        "count": 4,
        "kind": "parameter",
    }
    assert content["data"]["source"] == "plane.npz"


def test_foreign_weights(run, workspace):
    torch.save(torch.nn.BatchNorm1d(3).state_dict(), "norm.pt")
    outcome = run("info norm.pt --net torch.nn:BatchNorm1d --net-arg num_features=3")
    assert not outcome.code
    assert "running_mean" in outcome.out
    assert "buffer" in outcome.out
    assert "not recorded" in outcome.out


def test_foreign_weights_need_a_network(run, workspace):
    torch.save(torch.nn.Linear(3, 2).state_dict(), "weights.pt")
    outcome = run("info weights.pt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--net" in outcome.err


def test_code_named_by_a_file_is_not_run(run, workspace):
    run("train --net tiny_cli_network:make --data plane.npz --epochs 0 --out net.pt")
    outcome = run("info net.pt")
    assert outcome.code == 2
    assert "--net tiny_cli_network:make" in outcome.err
    assert not run("info net.pt --net tiny_cli_network:make").code


def test_missing_file(run, workspace):
    outcome = run("info nothing.pt")
    assert (outcome.code, outcome.err) == (2, "error: nothing.pt does not exist; check the path\n")


def test_weights_of_other_people(run, workspace, monkeypatch):
    monkeypatch.syspath_prepend(workspace)
    from tiny_cli_network import make

    state, other = make().state_dict(), make().state_dict()
    torch.save({"state_dict": {f"net.{n}": t for n, t in state.items()}, "epoch": 3}, "light.ckpt")
    outcome = run("info light.ckpt --net tiny_cli_network:make --json info.json")
    assert not outcome.code, outcome.err
    assert "state_dict.net" in outcome.out
    with open("info.json") as file:
        assert json.load(file)["weights"] == "state_dict.net"
    torch.save({"last": state, "best": other}, "two.pt")
    for command in ("info two.pt", "trace --data plane.npz --max-matvecs 4 --model two.pt"):
        outcome = run(f"{command} --net tiny_cli_network:make")
        assert (outcome.code, outcome.out) == (2, "")
        assert "last, best; choose one with --weights NAME" in outcome.err
        outcome = run(f"{command} --net tiny_cli_network:make --weights best")
        assert not outcome.code, outcome.err
        outcome = run(f"{command} --net tiny_cli_network:make --weights ema")
        assert outcome.code == 2
        assert "no weights named ema; it holds last (4 tensors), best (4 tensors)" in outcome.err


def test_files_that_are_code_stay_unread(run, workspace):
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, "args.pt")
    outcome = run("info args.pt --net tiny_cli_network:make")
    assert (outcome.code, outcome.out) == (2, "")
    assert "args.pt holds argparse.Namespace, which is not plain data" in outcome.err
    assert "torch.save(model.state_dict(), 'weights.pt')" in outcome.err
    assert len(outcome.err.splitlines()) == 1
