"""Every script in examples/ runs without a warning and writes only where it is told to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

# What each script writes, and what it says: patterns in the order in which they are printed.
EXPECTED = {
    "quickstart.py": (
        {"spectrum.png", "index.png"},
        [
            r"accuracy (7|8)\d",
            r"\b([1-8]?\d|90) of 610 eigenvalues are below",  # the structural bound is 90
            r"at most 90 could go down",
            r"last layer alone: 0 of 110",
        ],
    ),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_runs(script: Path, tmp_path: Path) -> None:
    files, patterns = EXPECTED[script.name]
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    command = [sys.executable, "-W", "error", str(script), str(out)]
    run = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert re.search(".*".join(patterns), run.stdout, re.DOTALL), run.stdout
    assert {path.name for path in out.iterdir()} == files
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    assert list(work.iterdir()) == []
