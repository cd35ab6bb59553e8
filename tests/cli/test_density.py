import json
from typing import get_args

import pytest

import hvpspec
from hvpspec.cli.options import EngineName
from hvpspec.curvature import choice


@pytest.mark.parametrize("option", ["", " --symlog"])
def test_picture_and_numbers(run, checkpoint, option):
    outcome = run(
        f"density --model {checkpoint} --exact{option} --bins 20 --out s.svg --json s.json"
    )
    assert not outcome.code
    assert "wrote s.svg" in outcome.out
    with open("s.svg") as file:
        assert "<svg" in file.read()
    with open("s.json") as file:
        content = json.load(file)
    assert (content["format"], content["version"]) == ("hvpspec-density", 1)
    assert sum(content["counts"]) + content["num_zero"] == len(content["eigenvalues"]) == 6
    assert (content["linear_threshold"] is None) == (option == "")


@pytest.mark.parametrize("option", ["", " --symlog", " --sigma 0.1", " --per-layer", " --probes 1"])
def test_from_products(run, checkpoint, option):
    outcome = run(
        f"density --model {checkpoint}{option} --steps 4 --out d.svg --json d.json --save d.npz"
    )
    assert not outcome.code, outcome.err
    assert outcome.err == ""
    for name in ("d.svg", "d.json", "d.npz"):
        assert f"wrote {name}" in outcome.out
    with open("d.json") as file:
        content = json.load(file)
    assert (content["format"], content["version"]) == ("hvpspec-measure", 1)
    assert content["dim"] == 6
    probes = 1 if "probes" in option else 8
    assert len(content["nodes"]) == len(content["weights"]) == len(content["norms"]) == probes
    for weights in content["weights"]:
        assert sum(weights) == pytest.approx(1)
    assert content["num_matvecs"] <= 4 * probes
    low, high = content["bulk"]
    assert low <= high
    if "layer" in option:
        assert content["layers"]["output"]["dim"] == 6
        # the only layer is the whole network, by the same seed
        assert content["layers"]["output"]["nodes"] == content["nodes"]
    else:
        assert content["layers"] is None
    kept = hvpspec.SpectralMeasure.load("d.npz")
    assert [nodes.tolist() for nodes in kept.nodes] == content["nodes"]


def test_layers(run, workspace):
    run("train --net tiny_cli_network:make --data plane.npz --epochs 1 --out net.pt")
    model = "--model net.pt --net tiny_cli_network:make"
    outcome = run(
        f"density {model} --per-layer --out d.png --json d.json --params 0 --params 2.bias"
    )
    assert not outcome.code, outcome.err
    with open("d.json") as file:
        layers = json.load(file)["layers"]
    assert {name: layer["dim"] for name, layer in layers.items()} == {"0": 9, "2": 2}


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("", {"0.0": 9, "0.2": 8, "1.1.0": 6}),
        ("--depth 1", {"0": 17, "1": 6}),
        ("--depth 2", {"0.0": 9, "0.2": 8, "1.1": 6}),
    ],
)
def test_modules(run, workspace, depth, expected):
    run("train --net tiny_cli_network:nested --data plane.npz --epochs 1 --out net.pt")
    model = "--model net.pt --net tiny_cli_network:nested"
    outcome = run(f"density {model} --steps 3 --probes 1 --json d.json --per-layer {depth}")
    assert not outcome.code, outcome.err
    with open("d.json") as file:
        found = {name: layer["dim"] for name, layer in json.load(file)["layers"].items()}
    assert found == expected


def test_gauss_newton(run, checkpoint):
    """It is the Hessian of a network that is linear in its parameters."""
    outcome = run(f"density --model {checkpoint} --gauss-newton --out d.png --json d.json")
    assert not outcome.code, outcome.err
    assert "whole network, Gauss-Newton" in outcome.out
    with open("d.json") as file:
        content = json.load(file)
    assert content["gauss_newton"]["layers"] is None
    for own, other in zip(content["gauss_newton"]["nodes"], content["nodes"], strict=True):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-5 * content["norm"])


def test_gauss_newton_of_layers(run, workspace):
    run("train --net tiny_cli_network:make --data plane.npz --epochs 1 --out net.pt")
    model = "--model net.pt --net tiny_cli_network:make --per-layer"
    assert not run(f"density {model} --gauss-newton --json d.json").code
    with open("d.json") as file:
        content = json.load(file)
    other = content["gauss_newton"]
    assert content["layers"].keys() == other["layers"].keys() == {"0", "2"}
    parts = {"whole network", "0", "2"}
    plans = {plan["matrix"] for plan in content["provenance"]["plan"]}
    assert plans == parts | {f"{part}, Gauss-Newton" for part in parts}
    # The outputs are affine in the last layer's parameters, and in none before a nonlinear one.
    assert other["layers"]["2"]["norm"] == pytest.approx(content["layers"]["2"]["norm"], rel=1e-4)
    assert other["layers"]["0"]["norm"] != pytest.approx(content["layers"]["0"]["norm"], rel=1e-4)
    least = min(min(nodes) for nodes in other["nodes"])
    assert least > -1e-5 * other["norm"] > min(min(nodes) for nodes in content["nodes"])


def test_without_bases_in_memory(run, workspace, checkpoint):
    outcome = run(f"density --model {checkpoint} --json a.json --out a.png --basis-folder .")
    assert not outcome.code, outcome.err
    model = f"--model {checkpoint} --json b.json --out b.png"
    outcome = run(f"density {model} --no-reorthogonalize --steps 40 --per-layer")
    assert not outcome.code, outcome.err
    assert "outlier" not in outcome.out.replace("without outliers", "")
    contents = []
    for name in "ab":
        with open(f"{name}.json") as file:
            contents.append(json.load(file))
        assert (workspace / f"{name}.png").exists()
    kept, without = contents
    assert kept["reorthogonalized"]
    assert kept["bulk"]
    assert not without["reorthogonalized"]
    for field in ("bulk", "gap_below", "gap_above", "bottom", "top"):
        assert without[field] is None
    assert without["norm"] == pytest.approx(kept["norm"], rel=1e-4)
    outcome = run(f"density --model {checkpoint} --basis-folder nowhere")
    assert outcome.code == 2
    assert "nowhere: No such file or directory" in outcome.err


def test_the_same_bits_twice(run, workspace):
    """Nothing depends on the clock."""
    run("train --net tiny_cli_network:make --data plane.npz --epochs 1 --out net.pt")
    model = "--model net.pt --net tiny_cli_network:make --chunk-size 7"
    nodes, engines = [], []
    for name in get_args(EngineName):
        if name != "compiled":  # which takes minutes
            for _ in range(2):
                outcome = run(f"density {model} --json d.json --steps 6 --engine {name}")
                assert not outcome.code, outcome.err
                with open("d.json") as file:
                    content = json.load(file)
                nodes.append(content["nodes"])
                engines.append(content["provenance"]["plan"][-1]["engine"])
            assert nodes[-2] == nodes[-1]
            expected = "batched" if name == "auto" else name  # a short run
            assert engines[-2:] == [expected, expected]
    assert set(get_args(EngineName)) == set(get_args(choice.EngineName))


def test_seed(run, checkpoint):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(f"density --model {checkpoint} --seed {seed} --steps 2 --json {name}.json")
    nodes = []
    for name in "abc":
        with open(f"{name}.json") as file:
            nodes.append(json.load(file)["nodes"])
    assert nodes[0] == nodes[1] != nodes[2]


def test_kernels_too_narrow_to_draw_cost_no_products(run, workspace, checkpoint):
    options = "--sigma 1e-12 --out d.png --json d.json --save d.npz"
    outcome = run(f"density --model {checkpoint} {options}")
    assert outcome.code == 2
    assert "pass a wider sigma" in outcome.err
    assert (workspace / "d.json").exists()
    assert not (workspace / "d.png").exists()
    assert hvpspec.SpectralMeasure.load("d.npz").dim == 6


@pytest.mark.parametrize("save", ["d.pt", "missing/d.npz"])
def test_measure_that_cannot_be_kept(run, workspace, save):
    outcome = run(f"density --model nothing.pt --save {save}")
    assert outcome.code == 2
    assert "cannot write" in outcome.err


@pytest.mark.parametrize("out", ["s.gif", "s", "missing/s.png"])
def test_target_is_checked_before_the_work(run, workspace, out):
    outcome = run(f"density --model nothing.pt --exact --out {out}")
    assert outcome.code == 2
    assert "cannot write" in outcome.err
