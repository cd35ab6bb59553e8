import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.paper.commands import app

EXPERIMENTS = ["table", "protocols", "curves", "regularised", "spectra", "solutions", "linear"]
QUICK = "table --quick --net cnn --images 10"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_table_from_nothing_and_again(run, tmp_path, monkeypatch):
    out = tmp_path / "new" / "results"
    monkeypatch.delenv("HVPSPEC_DATA", raising=False)
    both = "--data mnist-sample --data fashion-mnist-sample"
    outcome = run(f"{QUICK} {both} --out {out}")
    assert not outcome.code, outcome.err
    found = records(out / "table.jsonl")
    assert {(r["data"], r["activation"], r["state"]) for r in found} == {
        (f"{data}-sample", activation, state)
        for data in ("mnist", "fashion-mnist")
        for activation in ("relu", "tanh")
        for state in ("trained", "random")
    }
    promised = {"net", "data", "activation", "state", "seed", "images", "dtype", "tau", "index"}
    promised |= {"raw_count", "nullity", "grad_norm", "loss", "accuracy"}
    assert all(promised <= set(r) and r["index"] <= r["bound"] == 52 for r in found)
    assert len(list((out / "checkpoints").iterdir())) == 4
    assert "Negative eigenvalues" in outcome.out
    assert "8 runs, 0 done before, 8 to do" in outcome.err
    page = (out / "table.md").read_text()
    assert all(f"{r['raw_count']:,.1f}" in page for r in found)

    again = run(f"{QUICK} {both} --out {out}")
    assert "8 runs, 8 done before, 0 to do" in again.err
    assert again.out == outcome.out
    assert records(out / "table.jsonl") == found

    # A new seed goes on from there.
    narrow = "--activation relu --seeds 2"
    more = run(f"{QUICK} {narrow} --out {out}")
    assert "4 runs, 2 done before, 2 to do" in more.err
    assert records(out / "table.jsonl")[:8] == found
    assert {r["seed"] for r in records(out / "table.jsonl")[8:]} == {1}


def test_protocols(run, tmp_path, idx_folder):
    narrow = "--net cnn --data mnist --activation relu --epochs 0 --images 3 --dtype float32"
    outcome = run(f"protocols {narrow} --data-dir {idx_folder} --out {tmp_path}")
    assert not outcome.code, outcome.err
    found = records(tmp_path / "protocols.jsonl")
    assert {(r["assembly"], r["solver"]) for r in found} == {
        (assembly, solver) for assembly in ("blocks", "products") for solver in ("eigvalsh", "eig")
    }
    page = (tmp_path / "protocols.md").read_text()
    assert all(f"{r['counts']['0']:,.1f}" in page for r in found)
    assert "32 ways" in outcome.out  # 2 assemblies, 2 solvers, 8 cutoffs


def test_curves(run, tmp_path):
    narrow = "--net cnn --data mnist-sample --activation relu --optimizer lbfgs --epochs 1"
    outcome = run(f"curves {narrow} --images 3 --out {tmp_path}")
    assert not outcome.code, outcome.err
    found = records(tmp_path / "curves.jsonl")
    assert [(r["epochs"], r["optimizer"]) for r in found] == [(1, "lbfgs"), (0, None)]
    assert found[0]["batch_size"] == 2000
    assert found[0]["loss"] < found[1]["loss"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "rank correlation" in (tmp_path / "curves.md").read_text()


def test_regularised(run, tmp_path):
    narrow = "--net cnn --data mnist-sample --activation tanh --epochs 1 --images 3"
    outcome = run(f"regularised {narrow} --fixed --out {tmp_path}")
    assert not outcome.code, outcome.err
    found = records(tmp_path / "regularised.jsonl")
    assert [(r["state"], r["l2"]) for r in found] == [("trained", None), ("random", None)]
    assert len(list((tmp_path / "spectra").iterdir())) == 2
    again = run(f"regularised {narrow} --l2 0.01 --out {tmp_path}")
    assert "3 runs, 2 done before, 1 to do" in again.err
    (more,) = records(tmp_path / "regularised.jsonl")[2:]
    assert more["l2"] == 0.01
    assert (tmp_path / "regularised.png").read_bytes().startswith(b"\x89PNG")
    assert "minimised anew" in (tmp_path / "regularised.md").read_text()


def test_spectra(run, tmp_path):
    narrow = "--net cnn --data mnist-sample --activation tanh --epochs 1 --images 3"
    outcome = run(f"spectra {narrow} --out {tmp_path}")
    assert not outcome.code, outcome.err
    found = records(tmp_path / "spectra.jsonl")
    assert [r["part"] for r in found] == ["hessian", "gauss-newton", "layers"]
    for kind in ("linear", "symlog", "parts"):
        picture = tmp_path / f"spectra-tanh-{kind}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "gap below" in (tmp_path / "spectra.md").read_text()


def test_solutions(run, tmp_path):
    narrow = "--data mnist-sample --activation relu --count 4 --images 6 --epochs 2"
    outcome = run(f"solutions {narrow} --indexed 1 --out {tmp_path}")
    assert not outcome.code, outcome.err
    found = records(tmp_path / "solutions.jsonl")
    assert [(r["seed"], r["indexed"], "index" in r) for r in found] == [
        *((0, True, True), (1, False, False), (2, False, False), (3, False, False))
    ]
    assert (tmp_path / "solutions.png").read_bytes().startswith(b"\x89PNG")
    # One more index: a line of its own, and the networks are not trained again.
    again = run(f"solutions {narrow} --indexed 2 --out {tmp_path}")
    assert "4 runs, 3 done before, 1 to do" in again.err
    assert "| 4 | 6 | 2 |" in (tmp_path / "solutions.md").read_text()


def test_linear(run, tmp_path):
    outcome = run(f"linear --out {tmp_path}")
    assert not outcome.code, outcome.err
    assert all(r["nullity"] == r["expected_nullity"] for r in records(tmp_path / "linear.jsonl"))
    assert "2 XᵀX" in (tmp_path / "linear.md").read_text()


def test_a_failed_run_is_told_and_the_others_are_kept(run, tmp_path, monkeypatch):
    from hvpspec import zoo
    from hvpspec.errors import ComputationError

    def diverge(*_):
        raise ComputationError("training diverged: the loss is nan")

    monkeypatch.setattr(zoo, "train", diverge)
    narrow = "--activation relu"
    outcome = run(f"{QUICK} {narrow} --out {tmp_path}")
    assert outcome.code == 1
    assert "failed: cnn relu mnist-sample 3 epochs seed 0" in outcome.err
    assert "error: 1 of 2 runs failed" in outcome.err
    assert "Traceback" not in outcome.err
    assert [r["state"] for r in records(tmp_path / "table.jsonl")] == ["random"]
    assert "random" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ("table --net lenet", "'lenet' is not one of cnn, mlp2, mlp3"),
        ("table --data cifar", "'cifar' is not one of"),
        ("table --quick --activation cubic", "unknown activation 'cubic'"),
        ("table --quick --images 2001", "subset is 2001"),
        ("table --data-dir nowhere", "nowhere"),
        ("table --jobs 0", "--jobs"),
        ("curves --optimizer newton", "'newton' is not one of sgd, adam, lbfgs"),
        ("curves --data mnist-sample --images 2001", "subset is 2001"),
        ("regularised --l2 -1", "--l2"),
        ("solutions --count 1", "--count"),
        ("solutions --data mnist-sample --images 2001", "subset is 2001"),
        ("protocols --dtype float16", "'float16' is not one of float32, float64"),
        ("protocols --data mnist-sample", "'mnist-sample' is not one of mnist, fashion-mnist"),
        ("linear --out file/results", "cannot make the folder"),
        ("nothing", "nothing"),
    ],
)
def test_bad_input(run, tmp_path, monkeypatch, options, cause):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    outcome = run(f"{options}")
    assert (outcome.code, outcome.out) == (2, "")
    assert cause in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_data_are_not_written_over(run, tmp_path, monkeypatch):
    from hvpspec import zoo

    monkeypatch.setattr(zoo, "source_files", lambda *_: [tmp_path / "table.md"])
    outcome = run(f"table --quick --images 2 --out {tmp_path}")
    assert outcome.code == 2
    assert "(--out) is what --data reads" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["", *EXPERIMENTS])
def test_help(run, command):
    outcome = run(f"{command} --help")
    assert not outcome.code
    assert command in outcome.out


def test_the_readme_tells_of_every_command():
    page = (Path(__file__).parents[2] / "examples" / "paper" / "README.md").read_text()
    assert [name for name in EXPERIMENTS if f"| `{name}` |" not in page] == []
    assert {command.callback.__name__ for command in app.registered_commands} == set(EXPERIMENTS)


def test_a_file_of_another_experiment_is_not_touched(run, tmp_path):
    path = tmp_path / "linear.jsonl"
    path.write_text('{"net": "cnn"}\n')
    outcome = run(f"linear --out {tmp_path}")
    assert outcome.code == 2
    assert "another experiment" in outcome.err
    assert path.read_text() == '{"net": "cnn"}\n'


def program(command):
    """The program in a process of its own, the first of its job."""
    return subprocess.Popen(
        [sys.executable, "-m", "examples.paper", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )


@pytest.mark.usefixtures("one_thread")
def test_killed_while_it_measures_it_ends_with_the_same_lines(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = f"{QUICK} --activation relu"
    outcome = run(f"{command} --out {whole}")
    assert not outcome.code, outcome.err
    with program(f"{command} --out {parts}") as process:
        while not list(parts.glob("checkpoints/*.pt")):  # then it is measured
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
    outcome = run(f"{command} --out {parts}")
    assert not outcome.code, outcome.err
    one, other = (
        [
            {k: v for k, v in line.items() if k not in ("seconds", "stages")}
            for line in records(folder / "table.jsonl")
        ]
        for folder in (whole, parts)
    )
    assert other == one


def test_an_interrupt_from_the_keyboard(tmp_path):
    path = tmp_path / "table.jsonl"
    with program(f"{QUICK} --activation relu --seeds 60 --jobs 2 --out {tmp_path}") as process:
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes of a job
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    found = records(path)
    assert 0 < len(found) < 120
    assert path.read_bytes().endswith(b"\n")
    assert f"| {found[0]['net']} relu |" in path.with_suffix(".md").read_text(encoding="utf-8")
