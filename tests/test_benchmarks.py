"""The benchmarks that are not run with every change still run, at a small size."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, scaling
from tests.processes import SERVER

ROOT = Path(__file__).parents[1]

Run = Callable[[str, str], tuple[list[dict[str, Any]], str]]


@pytest.fixture(autouse=True)
def _processes_as_in_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied from the one that tests share, which has loaded more than benchmarks ask for."""
    monkeypatch.setattr(type(SERVER), "set_forkserver_preload", lambda *_: None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a benchmark in this process; return its rows and its table."""
    before = sorted(ROOT.iterdir())
    monkeypatch.chdir(ROOT)

    def call(name: str, options: str) -> tuple[list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path), *options.split()])
        importlib.import_module(f"benchmarks.{name}").main()
        assert sorted(ROOT.iterdir()) == before  # it writes to its folder alone
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["machine"]["torch"]
        return result["rows"], (tmp_path / f"{name}.md").read_text()

    return call


def test_growth(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With only the quickest measurement in a process of its own."""
    in_new_process = growth.in_new_process
    monkeypatch.setattr(
        growth,
        "in_new_process",
        lambda measure, point: (
            in_new_process(measure, point) if measure is growth.graph_bytes else measure(point)
        ),
    )
    rows, table = run(
        "growth",
        "--ladders steps --steps 2 8 --size 3e3 --data 16 --chunk-size 8 --budgets 0 --repeats 1",
    )
    assert [row["point"]["steps"] for row in rows] == [2, 8]
    for row in rows:
        (cost,) = row["costs"]
        n = 3 * 32 * 33 + 33 * 10
        assert cost["n"] == n
        assert cost["basis"] == (row["point"]["steps"] + 1) * n * 4
        assert 0 < cost["product_seconds"] < cost["seconds"]
    assert "| steps | 0 | all 2 |" in table


@pytest.mark.oracle
def test_exact(run: Run) -> None:
    rows, table = run(
        "exact",
        "--data mnist-sample --images 60 --side 7 --activations tanh --repeats 1 "
        "--batch-sizes 40 --widths 8 --columns 16",
    )
    ways = [(row["case"]["network"], row["case"]["n"], row["way"]) for row in rows]
    assert ways == [
        ("mlp2", 610, "hvpspec"),
        ("mlp2", 610, "Gram matrices"),
        ("mlp2", 610, "curvlinops"),
        ("mlp2", 610, "torch.func, forward over reverse"),
        ("mlp2", 610, "torch.func, reverse over reverse"),
        ("mlp2", 610, "one LDL^T"),
        ("mlp2", 610, "inertia: two LDL^T, both signs"),
        ("mlp2", 610, "numpy.linalg.eigvalsh"),
        ("mlp2", 610, "torch.linalg.eigvalsh"),
        ("cnn", 552, "hvpspec"),
        ("cnn", 552, "single products"),
    ]
    assert table.count("estimated from 16 of 610 columns, in blocks of 8, batches of 40") == 3


def test_index_products(run: Run) -> None:
    (row,), _ = run(
        "index_products",
        "--side 7 --epochs 1 --activations relu --ratios 1e-2 --multiply-by network",
    )
    assert row["lower"] == row["truth"] == row["upper"]
    assert row["slq_lower"] <= row["truth"] <= row["slq_upper"]
    assert len(row["times"]["seconds"]) == 1


def test_scaling() -> None:
    """In this process but for the two that are measured, which take long enough to start."""
    options = argparse.Namespace(probes=2, steps=3, repeats=1)
    row = {"scaling": "strong", "processes": 2, "how": scaling.TOGETHER, "examples": 100}
    row |= scaling.in_processes(2, scaling.TOGETHER, 100, options)
    assert row["basis"] == 2 * 4 * 7960 * 4 // 2
    assert 0 < max(row["talking"]) < min(row["seconds"])
    assert scaling.markdown([row]).splitlines()[-1].split(" | ")[5] == "1.00 x"


def test_engines(run: Run) -> None:
    rows, table = run("engines", "--networks perceptron --probes 2 --steps 2 --repeats 1")
    (row,) = rows
    assert (row["network"], row["density"]) == ("perceptron", "2 x 2")
    assert row["engine"] == "batched, 2 at once"
    assert 0 < row["cold, auto"] < 60
    assert row["warm ratio"] > 0
    assert table.count("| perceptron | 2 x 2 |") == 1


def test_walks_on_landscapes(tmp_path: Path) -> None:
    landscape = importlib.import_module("benchmarks.landscape")
    landscape.points(tmp_path, network=["mlp2"], products=2, repeats=1)
    landscape.minima(tmp_path, network=["cnn"], seeds=1, images=10, l2=0.1)
    (row,) = json.loads((tmp_path / "minima-10.json").read_text())["rows"]
    assert row["kind"] == "minimum"
    assert row["proved"] == "yes"
    assert json.loads((tmp_path / "points.json").read_text())["rows"][0]["network"] == "mlp2"
