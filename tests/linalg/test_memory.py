"""What a process may still take, where containers and job queues set limits."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from hvpspec.linalg import memory

MB = 10**6


def group(folder: Path, **numbers: object) -> None:
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in numbers.items():
        (folder / f"memory.{name}").write_text(f"{value}".strip() + "\n")


def stat(name: str) -> str:
    return f"anon {MB}\n{name} {MB}\n"


def test_the_unified_groups(tmp_path: Path) -> None:
    own, top = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/jobs/job_7/step_0\n")
    inactive = stat("inactive_file")
    group(top / "jobs" / "job_7" / "step_0", max="max", current=2 * MB, stat=inactive)
    group(top / "jobs" / "job_7", max=8 * MB, current=3 * MB, stat=inactive)
    group(top / "jobs", max=20 * MB, current=20 * MB, stat=inactive)
    group(top, current=30 * MB)  # which has no limit
    assert memory.left_in_groups(top, own) == [6 * MB, MB]


def test_the_groups_of_before_in_a_container(tmp_path: Path) -> None:
    """Which names the path outside, and has its own group at the top."""
    own, top = tmp_path / "own", tmp_path / "groups"
    own.write_text("5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n")
    numbers = {"limit_in_bytes": 4 * MB, "usage_in_bytes": 6 * MB}
    group(top / "memory", **numbers, stat=stat("total_inactive_file"))
    assert memory.left_in_groups(top, own) == [0]


def test_groups_that_do_not_tell(tmp_path: Path) -> None:
    own, top = tmp_path / "own", tmp_path / "groups"
    own.write_text("3:cpu,memory:/\n0::/a/b\n")
    group(top / "a" / "b", max=MB)  # without a word on what is used
    group(top / "a", max="", current=1, stat=stat("inactive_file"))
    numbers = {"limit_in_bytes": 4 * MB, "usage_in_bytes": MB}
    group(top / "memory", **numbers, stat=stat("total_inactive_file"))
    assert memory.left_in_groups(top, own) == [4 * MB]


def test_no_groups(tmp_path: Path) -> None:
    assert memory.left_in_groups(tmp_path, tmp_path / "other system") == []


def test_the_least_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory().available
    assert 0 < memory.available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "left_in_groups", lambda: [free // 10, free // 5])
    assert memory.available_memory() == free // 10
