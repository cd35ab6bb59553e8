"""Commands that are killed, interrupted or started on another checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

COMMANDS = {
    "density": "density --probes 3 --steps 30",
    "index": "index --method certified --tau 1e-2",
}


def start(command: str) -> subprocess.Popen[str]:
    """Start the program in a process of its own."""
    words = [sys.executable, "-m", "hvpspec", *command.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def numbers(path: str) -> dict[str, Any]:
    """A result without what is of its run."""
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return {name: value for name, value in content.items() if name not in ("seconds", "provenance")}


@pytest.fixture
def command(request: pytest.FixtureRequest, run, workspace) -> Iterator[str]:
    """A command that takes some hundred products, written at once, in one thread as in others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = run("train --net mlp2 --data mnist-sample --epochs 0 --out net.pt")
    assert not trained.code, trained.err
    yield f"{COMMANDS[request.param]} --model net.pt --subset 60 --checkpoint-every 0"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("command", COMMANDS, indirect=True)
def test_killed_at_any_moment_it_ends_with_the_same_bits(command: str, run) -> None:
    outcome = run(f"{command} --checkpoint whole --json whole.json")
    assert not outcome.code, outcome.err
    products = len(list(Path("whole").rglob("*.safetensors")))
    process = start(f"{command} --checkpoint parts --json parts.json")
    while len(list(Path("parts").rglob("*.safetensors"))) < products / 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert not Path("parts.json").exists()
    outcome = run(f"{command} --checkpoint parts --json parts.json")
    assert not outcome.code, outcome.err
    assert numbers("parts.json") == numbers("whole.json")


@pytest.mark.parametrize("command", ["index"], indirect=True)
def test_interrupted_it_keeps_its_products_and_says_what_it_found(command: str) -> None:
    process = start(f"{command} --tau 1e-7 --checkpoint parts")
    # Of some thousand products; after the first probe, of some dozen, an interval is known.
    while len(list(Path("parts").rglob("*.safetensors"))) < 300:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "index in [" in err
    assert "so far" in err
    assert err.endswith("interrupted\n")


@pytest.mark.parametrize("engine", ["auto", "reproducible"])
def test_ways_that_change_are_refused(run, checkpoint, workspace, engine) -> None:
    outcome = run(f"trace --model {checkpoint} --checkpoint c --engine {engine}")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"--engine {engine} changes its way of multiplying" in outcome.err
    assert not (workspace / "c").exists()


def test_another_network_is_refused(run, checkpoint) -> None:
    options = "density --probes 2 --steps 3 --checkpoint kept"
    assert not run(f"{options} --model {checkpoint}").code
    outcome = run(f"{options} --model {checkpoint} --subset 30")
    assert outcome.code == 2
    assert "kept/whole network is the checkpoint of another run: data, loss differ" in outcome.err
    assert "choose another folder" in outcome.err
    outcome = run(f"{options.replace('--steps 3', '--steps 4')} --model {checkpoint} --seed 7")
    assert outcome.code == 2
    assert "is of a run with other options" in outcome.err
    outcome = run(f"density --model {checkpoint} --checkpoint-every 3")
    assert outcome.code == 2
    assert "--checkpoint-every" in outcome.err
