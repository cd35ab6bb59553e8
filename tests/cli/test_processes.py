"""Commands in processes that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvpspec import InputError
from hvpspec.cli import processes
from tests.cli.conftest import Run
from tests.processes import programs_together


def torchrun(command: str, *, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the program in several processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(processes), "-m", "hvpspec", *command.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


def told(name: str) -> dict[str, Any]:
    """What a file of results tells."""
    content: dict[str, Any] = json.loads(Path(name).read_text())
    return content


def test_torchrun_of_a_density(run: Run, checkpoint: str) -> None:
    options = f"density --model {checkpoint} --probes 3 --steps 4"
    assert not run(f"{options} --json one.json").code
    done = torchrun(f"{options} --json two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.json") == 1
    assert done.stdout.count("matrix-vector products") == 1
    _agree(told("one.json"), told("two.json"))


@pytest.mark.parametrize(
    ("command", "size"),
    [
        ("density --probes 3 --steps 4 --parallel probes --out several.svg", 2),
        ("density --probes 3 --steps 4 --parallel both", 4),
        ("index --method certified --tau 1e-3", 2),
        ("index --exact", 2),
        ("eigs -k 2 --which BE", 2),
        ("trace --max-matvecs 12", 2),
    ],
)
def test_answers_are_those_of_one_process_and_told_once(
    command: str, size: int, run: Run, checkpoint: str
) -> None:
    alone, *_ = command.split(" --parallel")
    assert not run(f"{alone} --model {checkpoint} --json one.json").code
    together = programs_together(f"{command} --model {checkpoint} --json several.json", size=size)
    assert [program.ended() for program in together] == [0] * size, [p.err for p in together]
    first, *others = [program.out for program in together]
    assert first.count("wrote several.json") == 1
    assert first.count("wrote several.svg") == command.count("several.svg")
    assert others == [""] * (size - 1)
    _agree(told("one.json"), told("several.json"))


def _agree(one: dict[str, Any], several: dict[str, Any]) -> None:
    """Check that results are the same up to float32 round-off."""
    assert several["provenance"]["processes"] > one["provenance"]["processes"] == 1
    for name, value in one.items():
        if name in ("provenance", "seconds", "notes"):
            continue
        if name == "num_matvecs":
            # Where a Krylov space of six dimensions ends, round-off decides.
            assert abs(value - several[name]) <= 1
        elif name == "nodes":
            for first, second in zip(value, several[name], strict=True):
                assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
        elif isinstance(value, float):
            assert value == pytest.approx(several[name], rel=1e-4, abs=1e-6), name
        elif not isinstance(value, list | dict):
            assert value == several[name], name


def test_fewer_batches_than_processes() -> None:
    batches = [(torch.ones(2, 1), torch.zeros(2))]
    assert list(processes._EveryFew(batches, 0, 2)) == batches
    with pytest.raises(InputError, match="one of the 2 processes that share the data has no batch"):
        list(processes._EveryFew(batches, 1, 2))


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
