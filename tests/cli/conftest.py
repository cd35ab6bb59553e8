from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hvpspec.cli import main

NETWORK = """
from torch import nn

def make(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

def nested():
    return nn.Sequential(make(), nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(2, 2))))
"""


@dataclass(frozen=True)
class Outcome:
    code: int | None
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program in this process; words of a string are arguments, others follow as are."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(command: str, *others: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([*command.split(), *others])
        captured = capsys.readouterr()
        return Outcome(exit_info.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in this process, as in those that tests start: sums in others have other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a user's own network and data: two classes in the plane."""
    (tmp_path / "tiny_cli_network.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(40, 2)).astype(np.float32)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).astype(np.int64)
    np.savez(tmp_path / "plane.npz", inputs=inputs, targets=targets)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkpoint(workspace: Path, run: Run) -> str:
    """A trained linear classifier of 6 parameters."""
    outcome = run(
        "train --net linear --net-arg in_features=2 --net-arg out_features=2"
        " --data plane.npz --epochs 3 --l2 0.01 --out linear.pt"
    )
    assert outcome.code in (None, 0), outcome.err
    return "linear.pt"
