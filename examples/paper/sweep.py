"""Many runs, one after the other or in processes side by side, none of them done twice."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Generic

import torch

from examples.paper.results import Record, RunT, append, finished, read
from hvpspec import __version__
from hvpspec.errors import ComputationError, InputError

#: Carries one run out and returns what it measured; importable, so that a process can be sent it.
Measure = Callable[[RunT], Record]


@dataclass(frozen=True)
class Status(Generic[RunT]):
    """How far a sweep is.

    Attributes:
        total: runs asked for.
        done: those that have a line in the file, from this sweep or an earlier one.
        failed: those that failed in this sweep.
        seconds_left: estimate for the others, from the mean time of runs of the same cost; None if
            none of these was measured yet.
        num_unmeasured: how many of the others are not in the estimate.
        run: the run that has just ended; None at the start.
        outcome: its line, or why it failed.
    """

    total: int
    done: int
    failed: int
    seconds_left: float | None
    num_unmeasured: int
    run: RunT | None = None
    outcome: Record | Exception | None = None


def sweep(
    runs: Sequence[RunT],
    measure: Measure[RunT],
    path: Path,
    *,
    cost: Sequence[str] = (),
    jobs: int = 1,
    watch: Callable[[Status[RunT]], None] | None = None,
) -> list[tuple[RunT, Exception]]:
    """Carry out those runs that have no line in a file yet, and append theirs.

    A line holds the fields of the run, what was measured, ``seconds``, ``threads`` and
    ``versions``. Whatever ends the sweep, an interrupt too, the lines written stay.

    Args:
        runs: in the order in which they are started.
        measure: carries one out, in this process if ``jobs`` is 1.
        path: file of JSON lines.
        cost: fields that decide how long a run takes.
        jobs: processes, each with its share of the threads that PyTorch would use.
        watch: called at the start and after every run.

    Returns:
        The runs that failed, of which the others know nothing, with their errors.

    Raises:
        InputError: ``jobs`` is not positive, or the file cannot be used.
        ComputationError: a process died.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be 1 or more")
    if not runs:
        return []
    earlier = finished(path, read(path), type(runs[0]))
    clock: _Clock[RunT] = _Clock(cost, jobs)
    for run, record in earlier.items():
        clock.note(run, record)
    pending = [run for run in dict.fromkeys(runs) if run not in earlier]
    total = len(dict.fromkeys(runs))
    left = dict.fromkeys(pending)
    failures: list[tuple[RunT, Exception]] = []

    def report(run: RunT | None = None, outcome: Record | Exception | None = None) -> None:
        """Tell the watcher."""
        if watch is not None:
            seconds, unmeasured = clock.estimate(left)
            done = total - len(left) - len(failures)
            watch(Status(total, done, len(failures), seconds, unmeasured, run, outcome))

    report()
    for run, outcome in _outcomes(pending, partial(_timed, measure), jobs):
        del left[run]
        if isinstance(outcome, Exception):
            failures.append((run, outcome))
        else:
            append(path, outcome)
            clock.note(run, outcome)
        report(run, outcome)
    return failures


class _Clock(Generic[RunT]):
    """Estimates how long runs take from those that were measured."""

    def __init__(self, cost: Sequence[str], jobs: int) -> None:
        self._cost, self._jobs = cost, jobs
        self._seconds: dict[tuple[object, ...], list[float]] = {}

    def note(self, run: RunT, record: Mapping[str, object]) -> None:
        """Learn from a finished run."""
        seconds = record["seconds"]
        assert isinstance(seconds, (int, float))
        self._seconds.setdefault(self._kind(run), []).append(seconds)

    def estimate(self, runs: Iterable[RunT]) -> tuple[float | None, int]:
        """The seconds that runs will take, and how many of them are not in that."""
        known = [self._seconds.get(self._kind(run)) for run in runs]
        times = [statistics.fmean(seconds) for seconds in known if seconds]
        unmeasured = len(known) - len(times)
        return (None if unmeasured and not times else sum(times) / self._jobs), unmeasured

    def _kind(self, run: RunT) -> tuple[object, ...]:
        """What decides how long a run takes."""
        return tuple(getattr(run, name) for name in self._cost)


def _timed(measure: Measure[RunT], run: RunT) -> Record:
    """Carry a run out and make its line."""
    start = time.perf_counter()
    measured = measure(run)
    seconds = round(time.perf_counter() - start, 3)
    versions = {
        "hvpspec": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    about = {"seconds": seconds, "threads": torch.get_num_threads(), "versions": versions}
    return {**asdict(run), **measured, **about}


def _outcomes(
    runs: Sequence[RunT], measure: Measure[RunT], jobs: int
) -> Iterator[tuple[RunT, Record | Exception]]:
    """Carry runs out and yield each as it ends, with its line or its error."""
    if jobs > 1 and len(runs) > 1:
        yield from _side_by_side(runs, measure, jobs)
        return
    for run in runs:
        try:
            outcome: Record | Exception = measure(run)
        except Exception as error:
            outcome = error
        yield run, outcome


def _side_by_side(
    runs: Sequence[RunT], measure: Measure[RunT], jobs: int
) -> Iterator[tuple[RunT, Record | Exception]]:
    """The same in processes, which end with this one."""
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        min(jobs, len(runs)),
        mp_context=_processes(),
        initializer=_start_worker,
        initargs=(max(1, torch.get_num_threads() // jobs),),
    )
    try:
        futures = {executor.submit(measure, run): run for run in runs}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise ComputationError(
                    "a process of the sweep died, perhaps for want of memory; what is done is"
                    f" kept; go on with fewer than {jobs} jobs"
                ) from error
            if error is None:
                yield futures[future], future.result()
            elif isinstance(error, Exception):
                yield futures[future], error
            else:
                raise error
    except BaseException:
        # An interrupt, or the caller has stopped: nobody waits for what is under way.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _processes() -> multiprocessing.context.BaseContext:
    """How processes are started: without what this one has, which a copy of it could not use.

    On Linux as copies of one that has loaded what all of them need, which takes seconds.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["examples.paper.commands"])
    return server


def _start_worker(threads: int) -> None:
    """Prepare a process: its share of the threads, and no life of its own."""
    torch.set_num_threads(threads)
    # An interrupt from the keyboard reaches all processes; the first of them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        """End with the process that started this one, however that ended."""
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
