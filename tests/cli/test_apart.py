"""No command writes over what it reads, or two results to one place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from hvpspec.cli.app import app
from hvpspec.cli.options import File
from tests.cli.conftest import Run

TRAIN = "train --net tiny_cli_network:make --epochs 0"
MODEL = "--model linear.pt"
KEPT = f"{MODEL} --checkpoint kept"


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder with their content, but for those of Python's own."""
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p): p.read_bytes() for p in files}


@pytest.fixture
def places(checkpoint: str, workspace: Path) -> Path:
    """A folder with a model, data, code, and other names of the model."""
    os.symlink("linear.pt", "link.pt")
    os.link("linear.pt", "hard.pt")
    os.link("linear.pt", "lr=0.1.pt")
    os.symlink("later.json", "dangling.json")
    os.symlink(".", "here")
    raw = workspace / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"images")
    (workspace / "kept" / "network").mkdir(parents=True)
    (workspace / "mydata.py").write_text("raise AssertionError('this was run')")
    return workspace


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("info linear.pt --json linear.pt", "(--json) is read by CHECKPOINT"),
        ("info linear.pt --json plane.npz", "(--json) is read by linear.pt"),
        (f"trace {MODEL} --json linear.pt", "is read by --model and would be overwritten"),
        (f"trace {MODEL} --json ./kept/../linear.pt", "is read by --model"),
        (f"trace {MODEL} --json here/linear.pt", "is read by --model"),
        (f"trace {MODEL} --json link.pt", "is read by --model"),
        ("trace --model link.pt --json linear.pt", "is read by --model"),
        (f"trace {MODEL} --json hard.pt", "is read by --model"),
        ("trace --model lr=0.1.pt --json linear.pt", "is read by --model"),
        (f"trace {MODEL} --data plane.npz --json plane.npz", "is read by --data"),
        (f"trace {MODEL} --json plane.npz", "(--json) is read by linear.pt"),
        (f"trace {MODEL} --net mydata:load --json mydata.py", "is read by --net"),
        (f"trace {MODEL} --data mydata:load --json mydata.py", "is read by --data"),
        (
            f"trace {MODEL} --data mnist --data-dir data"
            " --json data/MNIST/raw/train-images-idx3-ubyte",
            "is read by --data",
        ),
        (f"trace {MODEL} --net-arg vocabulary=plane.npz --json plane.npz", "is read by --net-arg"),
        (f"eigs {MODEL} --json linear.pt", "(--json) is read by --model"),
        (f"eigs {MODEL} --vectors linear.pt", "(--vectors) is read by --model"),
        (f"index {MODEL} --out linear.pt", "(--out) is read by --model"),
        (f"index {MODEL} --json x.png --out x.png", "--json and --out both write to x.png"),
        (f"index {MODEL} --json dangling.json --out later.json", "both write to later.json"),
        (f"density {MODEL} --json x.npz --save ./x.npz", "--json and --save both write to"),
        (f"density {MODEL} --out here/x.png --json x.png", "--out and --json both write to"),
        (f"density {MODEL} --save plane.npz", "(--save) is read by linear.pt"),
        (f"density {KEPT} --json kept", "both write to kept"),
        (f"trace {MODEL} --checkpoint linear.pt", "(--checkpoint) is read by --model"),
        (f"{TRAIN} --data plane.npz --out plane.npz", "(--out) is read by --data"),
        (f"{TRAIN} --data plane.npz --out tiny_cli_network.py", "(--out) is read by --net"),
    ],
)
def test_nothing_is_written_over(run: Run, places: Path, command: str, cause: str) -> None:
    before = everything(places)
    outcome = run(command)
    assert (outcome.code, outcome.out) == (2, "")
    assert cause in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert everything(places) == before


def test_results_beside_the_products_and_again(run: Run, places: Path) -> None:
    for _ in range(2):  # results of before are written over
        outcome = run(f"trace {KEPT} --max-matvecs 4 --json kept/trace.json")
        assert not outcome.code, outcome.err


def test_files_of_the_demo_are_apart(run: Run, workspace: Path) -> None:
    os.symlink("index.json", "certified.json")
    outcome = run("demo --out .")
    assert (outcome.code, outcome.out) == (2, "")
    assert "both write to" in outcome.err


def _commands() -> Iterator[tuple[str, Callable[..., None]]]:
    for command in app.registered_commands:
        assert command.callback is not None
        yield command.callback.__name__, command.callback


@pytest.mark.parametrize(("name", "command"), list(_commands()))
def test_every_option_that_names_a_file_is_known(name: str, command: Callable[..., None]) -> None:
    # Folders, in which names are the command's own, or from which data are only found.
    known = {"data_dir", "basis_folder", *(["out"] if name == "demo" else [])}
    for option, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind, *marks = get_args(parameter.annotation)
        if Path in {kind, *get_args(kind)} and option not in known:
            assert any(isinstance(mark, File) for mark in marks), option
