import json

import numpy as np
import pytest
import torch
from rich.progress import Progress

import hvpspec
from hvpspec.zoo import load_checkpoint


def _numbers(output):
    """The table's values by label."""
    rows = (line.split() for line in output.splitlines() if line.startswith(" "))
    return {row[0]: row[1] for row in rows if len(row) > 1}


def test_table_and_files(run, checkpoint):
    outcome = run(f"index --model {checkpoint} --exact --json index.json --out curve.png")
    assert not outcome.code
    assert outcome.err == ""
    for text in ("raw count", "noise floor", "‖∇f‖", "critical point", "λ min", "0.01 ‖θ‖²"):
        assert text in outcome.out
    with open("index.json") as file:
        content = json.load(file)
    assert (content["format"], content["version"]) == ("hvpspec-index", 1)
    assert content["subject"]["data"] == "plane.npz"
    assert content["index"] == content["bound"]["upper"] == 0
    assert len(content["eigenvalues"]) == content["dim"] == 6
    assert _numbers(outcome.out)["index"] == "0"
    with open("curve.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_is_what_the_library_computes(run, workspace):
    run("train --net tiny_cli_network:make --data plane.npz --epochs 1 --out net.pt")
    run("index --model net.pt --net tiny_cli_network:make --subset 20 --json index.json")
    with open("index.json") as file:
        content = json.load(file)
    found = load_checkpoint("net.pt", net="tiny_cli_network:make")
    data = found.load_data(subset=20).tensors
    H = hvpspec.HessianOperator(found.model, torch.nn.CrossEntropyLoss(), data)
    expected = hvpspec.index(H)
    assert content["index"] == expected.index
    assert content["eigenvalues"] == pytest.approx(expected.eigenvalues.tolist(), abs=1e-14)
    assert content["loss"] == pytest.approx(expected.loss)


@pytest.mark.parametrize(("method", "raw"), [("exact", 0), ("inertia", None)])
def test_methods(run, checkpoint, method, raw):
    outcome = run(f"index --model {checkpoint} --method {method} --tau 0.001 --json index.json")
    assert not outcome.code
    with open("index.json") as file:
        content = json.load(file)
    assert (content["method"], content["index"], content["tau"]) == (method, 0, 0.001)
    assert content["raw_count"] == raw


@pytest.fixture
def saddle(run, workspace):
    """Options for an untrained network of 17 parameters that is no minimum."""
    run("train --net tiny_cli_network:make --data plane.npz --epochs 0 --out net.pt")
    return "--model net.pt --net tiny_cli_network:make"


def _json(path):
    with open(path) as file:
        return json.load(file)


@pytest.mark.parametrize("method", ["certified", "quadrature", "filtered"])
def test_without_the_matrix(run, saddle, method):
    taus = "--tau 0.001 --tau 0.1 --tau 0.01"
    run(f"index {saddle} --exact {taus} --json exact.json")
    outcome = run(
        f"index {saddle} --method {method} {taus} --probes 2 --steps 30 --seed 3"
        " --confidence 0.999 --json index.json --out curve.svg"
    )
    assert not outcome.code, outcome.err
    assert outcome.err == ""
    content, exact = _json("index.json"), _json("exact.json")
    assert (content["method"], content["confidence"], content["tau"]) == (method, 0.999, 0.001)
    assert [rung["tau"] for rung in content["ladder"]] == [0.1, 0.01, 0.001]
    for rung, true in zip(content["ladder"], exact["ladder"], strict=True):
        assert set(rung) == {"tau", "lower", "upper", "index", "estimate"}
        assert rung["lower"] <= true["index"] <= rung["upper"]
        assert rung["index"] == (true["index"] if method == "certified" else None)
    for name in ("raw_count", "nullity", "positive", "eigenvalues", "lambda_min", "lambda_max"):
        assert content[name] is None
    assert content["certified"] == (method == "certified")
    assert (content["resolution"] > 0) == (method == "filtered")
    for text in ("confidence", "noise floor", "τ = 0.01", "‖H‖", "products"):
        assert text in outcome.out
    for text in ("nullity", "raw count", "λ min"):
        assert text not in outcome.out


def test_default_ladder(run, saddle):
    outcome = run(f"index {saddle} --method certified --json index.json")
    content = _json("index.json")
    assert content["tau"] == content["noise_floor"]
    assert len(content["ladder"]) > 4
    assert "certified down to τ" in outcome.out


def test_a_budget_that_does_not_suffice_leaves_intervals(run, saddle):
    outcome = run(f"index {saddle} --method certified --max-matvecs 2 --json index.json")
    assert not outcome.code
    content = _json("index.json")
    assert content["index"] is None
    assert content["lower"] < content["upper"]
    assert "is certified" in outcome.out


def test_a_big_network_is_not_assembled_unasked(run, saddle, monkeypatch):
    monkeypatch.setattr("hvpspec.spectrum.morse.AUTO_EXACT_UP_TO", 10)
    run(f"index {saddle} --out curve.png --json index.json")
    assert _json("index.json")["method"] == "certified"


def test_bars_show_products_and_bracket(run, saddle, monkeypatch):
    shown = []
    update = Progress.update

    def keep(self, number, **fields):
        update(self, number, **fields)
        task = self.tasks[number]
        shown.append((task.description, task.completed, task.total))

    monkeypatch.setattr(Progress, "update", keep)
    run(f"index {saddle} --method certified --max-matvecs 100")
    assert any("index in [" in description for description, *_ in shown)
    assert all(total == 100 for *_, total in shown)
    run(f"density {saddle} --probes 2 --steps 3")
    assert shown[-1] == ("whole network, products", 6, 6)


def test_defaults_come_from_training(run, checkpoint):
    run(f"index --model {checkpoint} --json default.json")
    run(f"index --model {checkpoint} --l2 0.01 --data plane.npz --json given.json")
    run(f"index --model {checkpoint} --l2 0 --json without.json")
    eigenvalues = []
    for name in ("default.json", "given.json", "without.json"):
        with open(name) as file:
            eigenvalues.append(np.array(json.load(file)["eigenvalues"]))
    assert eigenvalues[0] == pytest.approx(eigenvalues[1], abs=1e-15)
    assert eigenvalues[0] - eigenvalues[2] == pytest.approx(np.full(6, 0.02))


def test_chunks_change_nothing(run, checkpoint):
    for size in ("1", "7"):
        run(f"index --model {checkpoint} --chunk-size {size} --json {size}.json")
    with open("1.json") as one, open("7.json") as seven:
        assert json.load(one)["eigenvalues"] == pytest.approx(
            json.load(seven)["eigenvalues"], abs=1e-14
        )


def test_a_layer_alone(run, checkpoint):
    outcome = run(f"index --model {checkpoint} --params *.weight")
    assert "4 parameters of *.weight" in outcome.out


def test_interval_below_the_noise_floor(run, checkpoint):
    outcome = run(f"index --model {checkpoint} --exact --l2 0 --tau 0")
    assert not outcome.code
    assert "[0, 3]" in outcome.out  # the softmax shift makes 3 exact zeros
    assert "below the noise floor" in outcome.out


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("--tau -1", "tau must be a finite number of at least 0, got -1"),
        ("--method certified --tau 0", "tau must be above 0 for a matrix-free method"),
        ("--method quadrature --tau -1", "tau must be a finite number of at least 0, got -1"),
        ("--method lanczos", "'lanczos' is not one of"),
        ("--method certified --confidence 2", "2.0 does not lie between 0 and 1"),
        ("--method certified --confidence 0", "0.0 does not lie between 0 and 1"),
        ("--method filtered --probes 0", "--probes"),
        ("--tau nan", "tau must be a finite number of at least 0, got nan"),
        ("--l2 -1", "l2 must be"),
        ("--l2 inf", "l2 must be"),
        ("--params nothing", "'nothing' matches no parameter"),
        ("--data nothing", "unknown data 'nothing'"),
        ("--data mnist-sample", "cannot take inputs of shape"),
        ("--loss mse", "mse needs equal shapes"),
        ("--subset 41", "subset is 41"),
        ("--net-arg in_features=3", "--net"),
        ("--net linear --net-arg in_features=3", "do not fit the network"),
        ("--method quadrature --max-matvecs 9", "--max-matvecs belongs to --method certified"),
        ("--method filtered --max-matvecs 9", "--max-matvecs belongs to --method certified"),
        ("--method inertia --probes 2", "--probes has no effect on --method inertia"),
        ("--confidence 0.9", "--confidence has no effect on --method exact"),  # what auto is here
        ("--exact --method inertia", "--exact means --method exact"),
        ("--method inertia --out curve.png", "--out needs the eigenvalues"),
        ("--out curve.gif", "its ending must be one of .png, .pdf, .svg"),
        ("--out missing/curve.png", "the folder missing does not exist"),
        ("--json missing/index.json", "the folder missing does not exist"),
        ("--json .", "not a plain file"),
    ],
)
def test_bad_input(run, workspace, checkpoint, options, cause):
    before = sorted(workspace.iterdir())
    outcome = run(f"index --model {checkpoint} {options}")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert cause in outcome.err
    assert len(outcome.err.splitlines()) <= 2
    assert sorted(workspace.iterdir()) == before


def test_missing_model(run, workspace):
    outcome = run("index --model nothing.pt")
    assert (outcome.code, outcome.err) == (2, "error: nothing.pt does not exist; check the path\n")


def test_data_that_are_code_are_not_run_unasked(run, workspace):
    (workspace / "plane_cli_data.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    arrays = np.load('plane.npz')\n"
        "    return arrays['inputs'], arrays['targets']\n"
    )
    command = "--net linear --net-arg in_features=2 --net-arg out_features=2"
    outcome = run(f"train {command} --data plane_cli_data:load --epochs 1 --out net.pt")
    assert not outcome.code
    outcome = run("index --model net.pt")
    assert outcome.code == 2
    assert "--data plane_cli_data:load" in outcome.err
    assert not run("index --model net.pt --data plane_cli_data:load").code
    (workspace / "plane_cli_batches.py").write_text(
        "import numpy as np, torch\n"
        "def load():\n"
        "    arrays = np.load('plane.npz')\n"
        "    X, y = (torch.from_numpy(arrays[name]) for name in ('inputs', 'targets'))\n"
        "    return [(X[:30], y[:30]), (X[30:], y[30:])]\n"
    )
    outcome = run("index --model net.pt --data plane_cli_batches:load")
    assert not outcome.code
    assert "plane_cli_batches:load" in outcome.out
    outcome = run(f"train {command} --data plane_cli_batches:load --epochs 1 --out net2.pt")
    assert outcome.code == 2
    assert "training needs" in outcome.err


def test_an_exact_index_tells_how_its_matrix_was_made(run, checkpoint):
    assert not run(f"index --model {checkpoint} --exact --json index.json").code
    with open("index.json") as file:
        provenance = json.load(file)["provenance"]
    assert provenance["seed"] == 0
    assert provenance["plan"][-1]["matrix"] == "network"
    assert provenance["plan"][-1]["engine"] in ("double-backward", "batched")
    assert provenance["fingerprint"]["dtype"] == "torch.float32"  # of the network as it is
