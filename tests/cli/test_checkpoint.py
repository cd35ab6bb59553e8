"""Commands that are killed, interrupted or started on another checkpoint."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.processes import SLOW_AFTER, Program, programs_together

COMMANDS = {
    "density": "density --probes 3 --steps 30",
    "layers": "density --probes 1 --steps 20 --per-layer --gauss-newton",
    "certified index": "index --method certified --tau 1e-2",
    "exact index": "index --exact",
    "exact density": "density --exact",
    "eigenvalues": "eigs -k 4 --seed 3",
    "trace": "trace --max-matvecs 40",
}
NETWORK = "--net tiny_cli_network:make --net-arg width=24"
# Each product in a file of its own.
PROBLEM = f"--model net.pt {NETWORK} --checkpoint-every 0"
# The one that is there at once.
ENGINE = "--engine", "double-backward"


def numbers(path: str) -> dict[str, Any]:
    """A result without what is of its run."""
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return {name: value for name, value in content.items() if name not in ("seconds", "provenance")}


def num_files(folder: str) -> int:
    """How many files of products are there."""
    return len(list(Path(folder).rglob("*.safetensors")))


def until(folder: str, files: float, *programs: Program) -> None:
    """Wait until so many files of products are there."""
    deadline = time.monotonic() + 120
    while num_files(folder) < files:
        for program in programs:
            assert program.runs, program.err
            assert time.monotonic() < deadline, program.err
        time.sleep(0.002)


@pytest.fixture
def network(run: Run, workspace: Path, one_thread: None) -> None:
    """A trained network of 122 parameters."""
    made = run(f"train {NETWORK} --data plane.npz --epochs 2 --out net.pt")
    assert not made.code, made.err


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments_it_ends_with_the_same_bits(name: str, run: Run) -> None:
    command, engine = f"{COMMANDS[name]} {PROBLEM}", ENGINE if name != "density" else ()
    outcome = run(f"{command} --checkpoint whole --json whole.json", *engine)
    assert not outcome.code, outcome.err
    randomly, products = random.Random(name), num_files("whole")
    # With the engine that is chosen, each start traces the network, which takes longest.
    for files in sorted(randomly.sample(range(products), 2 if engine else 1)):
        more = files - num_files("parts")
        again = f"{command} --checkpoint parts --json parts.json"
        program = Program(again, *engine, **{SLOW_AFTER: f"{more}:600"})
        until("parts", files, program)
        program.send(signal.SIGKILL)
        assert program.ended() == -signal.SIGKILL, program.err
        assert not Path("parts.json").exists()
    outcome = run(f"{command} --checkpoint parts --json parts.json", *engine)
    assert not outcome.code, outcome.err
    assert numbers("parts.json") == numbers("whole.json")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("name", ["density", "eigenvalues"])
def test_where_one_of_several_processes_is_killed_all_end_and_go_on(name: str) -> None:
    def start(folder: str, **environment: str) -> list[Program]:
        """Start two processes."""
        command = f"{COMMANDS[name]} {PROBLEM} --checkpoint {folder} --json {folder}.json"
        return programs_together(command, *ENGINE, size=2, **environment)

    def finish(folder: str) -> None:
        """Run it to its end."""
        together = start(folder)
        assert [program.ended() for program in together] == [0, 0], [p.err for p in together]

    finish("whole")
    products = num_files("whole")
    first, second = start("parts", **{SLOW_AFTER: f"{products // 3}:0.5"})
    until("parts", products // 3, first, second)
    second.send(signal.SIGKILL)
    assert second.ended() == -signal.SIGKILL
    assert first.ended(60) == 1
    assert "another process ended, or did not answer in time" in first.err
    finish("parts")
    assert numbers("parts.json") == numbers("whole.json")


@pytest.mark.usefixtures("network")
def test_interrupted_it_keeps_its_products_and_says_what_it_found() -> None:
    command = f"{COMMANDS['certified index']} --tau 1e-6 {PROBLEM} --checkpoint parts"
    program = Program(command, *ENGINE, **{SLOW_AFTER: "60:0.5"})
    # Of more than a hundred; after the first probe, of some dozen, an interval is known.
    until("parts", 60, program)
    program.send(signal.SIGINT)
    assert program.ended(60) == 130
    assert "index in [" in program.err
    assert "so far" in program.err
    assert program.err.endswith("interrupted\n")


def test_an_engine_that_may_change_is_refused(run: Run, checkpoint: str, workspace: Path) -> None:
    outcome = run(f"trace --model {checkpoint} --checkpoint c --engine auto")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--engine auto may change the engine during a run" in outcome.err
    assert not (workspace / "c").exists()


def test_another_network_is_refused(run: Run, checkpoint: str) -> None:
    options = "density --probes 2 --steps 3 --checkpoint kept"
    assert not run(f"{options} --model {checkpoint}").code
    outcome = run(f"{options} --model {checkpoint} --subset 30")
    assert outcome.code == 2
    assert "kept/whole network is the checkpoint of another run: data, loss differ" in outcome.err
    assert "choose another folder" in outcome.err
    outcome = run(f"{options.replace('--steps 3', '--steps 4')} --model {checkpoint} --seed 7")
    assert outcome.code == 2
    assert "belongs to a run with other options" in outcome.err
    outcome = run(f"density --model {checkpoint} --checkpoint-every 3")
    assert outcome.code == 2
    assert "--checkpoint-every" in outcome.err
