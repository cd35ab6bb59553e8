import subprocess
import sys

import pytest

from hvpspec.cli import app

COMMANDS = ("train", "info", "index", "density", "eigs", "trace", "demo")


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from hvpspec.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    outcome = run(f"{command} --help")
    assert not outcome.code
    assert command in outcome.out


def test_module_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "hvpspec", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hvpspec 0.")


@pytest.mark.parametrize(
    "command",
    [
        "no-such-command",
        "--no-such-option",
        "index",
        "index --model x.pt --method fast",
        "index --model x.pt --subset 0",
        "index --model x.pt --chunk-size 0",
        "index --model x.pt --tau much",
        "index --model x.pt --probes 0",
        "index --model x.pt --steps 0",
        "index --model x.pt --max-matvecs 0",
        "index --model x.pt --confidence 2",
        "index --model x.pt --exact --probes 3",
        "index --model x.pt --method inertia --confidence 0.5",
        "density --model x.pt --probes 0",
        "density --model x.pt --sigma 0",
        "density --model x.pt --bins 7",
        "density --model x.pt --exact --per-layer",
        "density --model x.pt --exact --gauss-newton",
        "density --model x.pt --depth 1",
        "density --model x.pt --per-layer --depth 0",
        "density --model x.pt --exact --no-reorthogonalize",
        "density --model x.pt --exact --basis-folder .",
        "density --model x.pt --engine fastest",
        "density --model x.pt --exact --seed 0",
        "density --model x.pt --exact --save x.npz",
        "eigs --model x.pt -k 0",
        "eigs --model x.pt --which XX",
        "eigs --model x.pt --tol 0",
        "eigs --model x.pt --tol nan",
        "trace --model x.pt --method guess",
        "trace --model x.pt --max-matvecs 3",
        "trace --model x.pt --rtol -1",
        "density --model x.pt --exact --out x.png --bins 0",
        "train --net mlp2 --data mnist-sample",
    ],
)
def test_usage_errors(run, command):
    outcome = run(command)
    assert (outcome.code, outcome.out) == (2, "")
    lines = outcome.err.splitlines()
    assert lines[0].startswith("error: ")
    assert "Value error" not in lines[0]
    assert lines[1].startswith("Try 'hvpspec")
    assert len(lines) == 2


def _fail_with(monkeypatch, error):
    def load_problem(*args, **kwargs):
        raise error

    monkeypatch.setattr("hvpspec.cli.problem.load_problem", load_problem)


def test_unexpected_errors_are_one_line(run, monkeypatch):
    _fail_with(monkeypatch, RuntimeError("the machine is on fire\nin detail"))
    outcome = run("index --model x.pt")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "error: RuntimeError: the machine is on fire\nrun with --debug for the traceback\n"
    )


@pytest.mark.parametrize("command", ["--debug index --model x.pt", "index --model x.pt --debug"])
def test_debug_shows_the_traceback(run, monkeypatch, command):
    _fail_with(monkeypatch, RuntimeError("the machine is on fire"))
    outcome = run(command)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: RuntimeError: the machine is on fire\n")


def test_failed_computations_exit_with_1(run, monkeypatch):
    _fail_with(monkeypatch, app.HvpspecError("the loss is NaN"))
    outcome = run("index --model x.pt")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "error: the loss is NaN\n")


def test_interruption(run, monkeypatch):
    _fail_with(monkeypatch, KeyboardInterrupt())
    outcome = run("index --model x.pt")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
