"""Commands in processes that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvpspec import InputError
from hvpspec.cli import problem
from tests.cli.conftest import Run


def torchrun(command: str, *, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the program in several processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(processes), "-m", "hvpspec", *command.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("parallel", ["", " --parallel probes"])
def test_density_is_that_of_one_process_and_told_once(
    parallel: str, run: Run, checkpoint: str
) -> None:
    options = f"density --model {checkpoint} --probes 3 --steps 4"
    assert not run(f"{options} --json one.json").code
    done = torchrun(f"{options} --json two.json --out two.svg{parallel}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.json") == done.stdout.count("wrote two.svg") == 1
    assert done.stdout.count("matrix-vector products") == 1
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one.pop("nodes"), two.pop("nodes"), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)  # of float32 products
    assert one["dim"] == two["dim"]
    assert one["num_matvecs"] == two["num_matvecs"]


def test_fewer_batches_than_processes() -> None:
    batches = [(torch.ones(2, 1), torch.zeros(2))]
    assert list(problem._EveryFew(batches, 0, 2)) == batches
    with pytest.raises(InputError, match="no batch for one of the 2 processes that share them"):
        list(problem._EveryFew(batches, 1, 2))


def test_what_is_for_one_process_is_refused(
    run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(f"density --model {checkpoint} --parallel probes")
    assert outcome.code == 2
    assert "--parallel probes needs several processes; start them with torchrun" in outcome.err
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    outcome = run("train --net linear")
    assert outcome.code == 2
    assert outcome.err.startswith("process 1: error: 3 processes cannot work on train together")
