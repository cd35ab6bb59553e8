"""Several processes, started by ``torchrun``, that work on one problem together."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import typer

from hvpspec.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: What the processes divide among them: the examples, the probes, or both.
Parallel = Literal["data", "probes", "both"]

#: Commands that can run in several processes.
TOGETHER = ("index", "density", "eigs", "trace")

# A process that does not answer for so long has died or is stuck.
_TIMEOUT = timedelta(minutes=10)

# Processes that divide the probes do not communicate until the last of them has finished.
_UNTIL_THE_END = timedelta(days=1)


def num_processes() -> int:
    """Return the number of processes that ``torchrun`` started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0; only process 0 prints and writes."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


@contextmanager
def joined() -> Iterator[ProcessGroup | None]:
    """Connect the processes that were started together; only the first prints.

    Yields:
        The group of all processes; None if there is only one.
    """
    if num_processes() == 1:
        yield None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def divided(parallel: Parallel | None) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """Divide the processes: return the group that shares the data, and the one for the probes.

    By default, all processes share the data. With ``both``, 4 processes form 2 groups of 2: the
    processes of a group share the data, and the groups divide the probes.

    Raises:
        typer.BadParameter: there is only one process, or a number that cannot be divided.
    """
    size = num_processes()
    if size == 1:
        if parallel is not None:
            raise typer.BadParameter(
                f"--parallel {parallel} needs several processes; start them with torchrun"
                " --nproc-per-node K -m hvpspec"
            )
        return None, None
    import torch.distributed as dist

    if parallel in (None, "data"):
        return dist.group.WORLD, None
    if parallel == "probes":
        everyone = dist.new_group(timeout=_UNTIL_THE_END)
        assert not isinstance(everyone, int)
        return None, everyone
    # The largest divisor up to the root: no group has more processes than there are groups.
    each = max((d for d in range(2, int(size**0.5) + 1) if size % d == 0), default=None)
    if each is None:
        raise typer.BadParameter(
            f"--parallel both needs groups of equal size, into which {size} processes cannot be"
            " divided; start 4, 6 or 8, or divide only the data or the probes"
        )
    with_data = [list(range(start, start + each)) for start in range(0, size, each)]
    with_probes = [list(range(start, size, each)) for start in range(each)]
    divide: Any = dist.new_subgroups_by_enumeration  # typed as if a process could be in no group
    of_data, _ = divide(with_data, timeout=_TIMEOUT)
    of_probes, _ = divide(with_probes, timeout=_UNTIL_THE_END)
    return of_data, of_probes


class _EveryFew:
    """Every k-th batch of an iterable that can be iterated over repeatedly."""

    def __init__(self, batches: Iterable[Any], start: int, step: int) -> None:
        self._batches, self._start, self._step = batches, start, step

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in islice(iter(self._batches), self._start, None, self._step):
            yield batch
            empty = False
        if empty:
            raise InputError(
                f"one of the {self._step} processes that share the data has no batch: start fewer "
                "processes or make the batches smaller; all passes must give the same batches"
            )


def own_share(data: Any, num_examples: int | None, group: ProcessGroup | None) -> Any:
    """Return the share of the examples or batches that this process works on."""
    if group is None:
        return data
    rank, size = group.rank(), group.size()
    if num_examples is None:
        return _EveryFew(data, rank, size)
    if num_examples < size:
        raise InputError(
            f"{num_examples} examples are too few for {size} processes; start fewer processes, or "
            "divide the probes with --parallel probes"
        )
    # Interleaved, so that shares are alike even if the examples are sorted by class.
    return tuple(tensor[rank::size] for tensor in data)
