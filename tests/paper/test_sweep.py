"""Sweeps do each run once, keep what is done and go on, whatever happens to one of the runs."""

import multiprocessing
from dataclasses import dataclass

import pytest

from examples.paper.linear import LinearRun, measure_linear
from examples.paper.results import append, read
from examples.paper.sweep import Status, sweep
from hvpspec.errors import ComputationError, InputError


@dataclass(frozen=True)
class Run:
    kind: str
    number: int


RUNS = [Run("slow", 1), Run("fast", 1), Run("slow", 2), Run("fast", 2)]


class Measure:
    """Notes what it is asked for; refuses some."""

    def __init__(self, refused=()):
        self.asked, self.refused = [], refused

    def __call__(self, run):
        self.asked.append(run)
        if run in self.refused:
            raise ComputationError(f"{run.number} diverged")
        return {"square": run.number**2}


def test_each_run_once(tmp_path):
    path, measure = tmp_path / "x.jsonl", Measure()
    assert sweep(RUNS[:2], measure, path) == []
    assert sweep([*RUNS, *RUNS], measure, path) == []
    assert measure.asked == RUNS
    records = read(path)
    assert [(r["kind"], r["number"], r["square"]) for r in records] == [
        ("slow", 1, 1),
        ("fast", 1, 1),
        ("slow", 2, 4),
        ("fast", 2, 4),
    ]
    assert all(r["seconds"] >= 0 and set(r["versions"]) >= {"hvpspec", "torch"} for r in records)
    assert sweep(RUNS, measure, path) == []
    assert len(measure.asked) == len(RUNS)


def test_goes_on_after_an_interrupt(tmp_path):
    path = tmp_path / "x.jsonl"

    def interrupt(status):
        if status.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(RUNS, Measure(), path, watch=interrupt)
    assert len(read(path)) == 2
    measure = Measure()
    sweep(RUNS, measure, path)
    assert measure.asked == RUNS[2:]


def test_goes_on_after_a_kill_within_a_line(tmp_path):
    path = tmp_path / "x.jsonl"
    sweep(RUNS, Measure(), path)
    path.write_bytes(path.read_bytes()[:-30])
    measure = Measure()
    sweep(RUNS, measure, path)
    assert measure.asked == RUNS[3:]
    assert len(read(path)) == 4


def test_a_failure_ends_nothing_and_is_tried_again(tmp_path):
    path = tmp_path / "x.jsonl"
    seen: list[Status[Run]] = []
    ((run, error),) = sweep(RUNS, Measure(refused=RUNS[1:2]), path, watch=seen.append)
    assert run == RUNS[1]
    assert str(error) == "1 diverged"
    assert len(read(path)) == 3
    assert [(s.done, s.failed) for s in seen] == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1)]
    assert seen[2].outcome is error
    measure = Measure()
    assert sweep(RUNS, measure, path) == []
    assert measure.asked == RUNS[1:2]


def test_time_is_estimated_by_runs_of_the_same_cost(tmp_path):
    path = tmp_path / "x.jsonl"
    for number, seconds in ((8, 10.0), (9, 20.0)):
        append(path, {"kind": "slow", "number": number, "seconds": seconds})
    seen: list[Status[Run]] = []
    sweep(RUNS, Measure(), path, cost=("kind",), watch=seen.append)
    # Two slow runs at a mean of 15 seconds; of the fast ones nothing is known yet.
    assert (seen[0].seconds_left, seen[0].num_unmeasured) == (30.0, 2)
    assert (seen[0].done, seen[0].total) == (0, 4)
    assert seen[1].num_unmeasured == 2
    assert seen[2].num_unmeasured == 0
    assert (seen[-1].seconds_left, seen[-1].done) == (0, 4)
    unknown: list[Status[Run]] = []
    sweep(RUNS, Measure(), tmp_path / "y.jsonl", cost=("kind",), watch=unknown.append)
    assert (unknown[0].seconds_left, unknown[0].num_unmeasured) == (None, 4)


def test_nothing_to_do(tmp_path):
    assert sweep([], Measure(), tmp_path / "x.jsonl") == []
    with pytest.raises(InputError, match="jobs is 0"):
        sweep(RUNS, Measure(), tmp_path / "x.jsonl", jobs=0)


def small(seed):
    return LinearRun(data="gaussian", examples=6, features=4, rank=3, seed=seed)


def test_processes_side_by_side(tmp_path):
    path = tmp_path / "x.jsonl"
    unknown = LinearRun(data="nothing", examples=6, features=4, rank=None)
    runs = [small(0), unknown, small(1), small(2)]
    ((run, error),) = sweep(runs, measure_linear, path, jobs=2)
    assert run == unknown
    assert isinstance(error, InputError)
    assert sorted(r["seed"] for r in read(path)) == [0, 1, 2]
    # Another process has another number of threads, and round-off of its own.
    alone = measure_linear(small(1))
    (same,) = [r for r in read(path) if r["seed"] == 1]
    for name in ("index", "nullity", "expected_nullity", "rank_of_X"):
        assert same[name] == alone[name]
    for name in ("norm", "loss", "grad_norm", "relative_error_without_2"):
        assert same[name] == pytest.approx(alone[name], rel=1e-12)
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_ends_the_sweep_but_not_what_is_done(tmp_path):
    path = tmp_path / "x.jsonl"

    def kill(status):
        if status.done == 1:
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    with pytest.raises(ComputationError, match=r"process of the sweep died.*fewer than 2 jobs"):
        sweep([small(seed) for seed in range(50)], measure_linear, path, jobs=2, watch=kill)
    assert read(path)
