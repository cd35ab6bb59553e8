import json

import pytest
import torch
from safetensors.torch import load_file


def _json(path):
    with open(path) as file:
        return json.load(file)


@pytest.mark.parametrize(
    ("which", "chosen"),
    [("LA", [4, 5]), ("SA", [0, 1]), ("BE", [0, 5]), ("LM", [4, 5])],
)
def test_values_are_those_of_the_matrix(run, checkpoint, which, chosen):
    run(f"index --model {checkpoint} --exact --json index.json")
    outcome = run(f"eigs --model {checkpoint} -k 2 --which {which} --json eigs.json")
    assert (outcome.code or 0, outcome.err) == (0, "")
    content, values = _json("eigs.json"), _json("index.json")["eigenvalues"]
    assert (content["format"], content["version"]) == ("hvpspec-eigs", 1)
    assert content["values"] == pytest.approx([values[i] for i in chosen], abs=1e-6)
    assert content["converged"] == [True, True]
    assert max(content["residual_norms"]) < 1e-3
    assert content["num_matvecs"] > 0
    assert outcome.out.count(" converged") == 2


def test_eigenvectors_by_the_parameters_names(run, checkpoint):
    command = f"eigs --model {checkpoint} -k 2 --which LA --vectors v.safetensors"
    outcome = run(command)
    assert (outcome.code or 0, outcome.err) == (0, "")
    directions = load_file("v.safetensors")
    shapes = {name: tuple(v.shape) for name, v in directions.items()}
    assert shapes == {"output.weight": (2, 2, 2), "output.bias": (2, 2)}
    rows = torch.cat([directions[name].flatten(1) for name in shapes], 1).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(2).double(), atol=1e-6, rtol=0)


def test_vectors_need_the_ending_of_safetensors(run, workspace, checkpoint):
    outcome = run(f"eigs --model {checkpoint} --vectors v.npz")
    assert (outcome.code, outcome.out) == (2, "")
    assert "its ending must be one of .safetensors" in outcome.err


def test_what_did_not_converge_is_printed_and_an_error(run, workspace):
    run("train --net mlp2 --data mnist-sample --epochs 0 --out net.pt")
    options = "-k 30 --which SA --max-matvecs 60 --tol 1e-12 --subset 20 --params output"
    outcome = run(f"eigs --model net.pt {options} --json e.json")
    assert outcome.code == 1
    missed = _json("e.json")["converged"].count(False)
    assert missed > 0
    assert outcome.out.count("NOT converged") == missed
    assert outcome.err.startswith(f"error: {missed} of 30 eigenvalues did not converge")


def test_more_than_there_are(run, workspace, checkpoint):
    before = sorted(workspace.iterdir())
    outcome = run(f"eigs --model {checkpoint} -k 7 --json e.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "k must be between 1 and the size 6" in outcome.err
    assert sorted(workspace.iterdir()) == before


def test_where_it_comes_from(run, checkpoint):
    """Options, software and what tells weights, data and loss from others."""
    found = []
    for options in ("--seed 3", "--seed 3", "--seed 3 --l2 0.5"):
        outcome = run(f"eigs --model {checkpoint} -k 2 {options} --json e.json")
        assert not outcome.code, outcome.err
        with open("e.json") as file:
            found.append(json.load(file)["provenance"])
    assert all(each.pop("seconds") > 0 for each in found)
    first, again, other = found
    assert first == again
    assert first["options"]["seed"] == first["seed"] == 3
    assert first["options"]["model"] == str(checkpoint)
    assert "tol" not in first["options"]  # those that were given
    engines = {plan["engine"] for plan in first["plan"]}
    assert engines
    assert engines <= {"double-backward", "batched", "linearised", "compiled"}
    assert 1 in {plan["num_vectors"] for plan in first["plan"]}
    assert set(first["versions"]) == {"python", "torch", "numpy"}
    differing = {
        name for name, value in first["fingerprint"].items() if other["fingerprint"][name] != value
    }
    assert differing == {"l2", "loss"}
