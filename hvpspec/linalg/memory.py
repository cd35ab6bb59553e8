"""What fits into memory, asked before the work starts, and what is given back."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import psutil
import torch
from torch import Tensor

from hvpspec.errors import InputError

# What control groups call limit, use, and the part of that which the system gives up for others.
_UNIFIED = ("memory.max", "memory.current", "inactive_file")
_MEMORY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can still be allocated on ``device`` without swapping.

    On a CPU, within the limits that a container or a queue of jobs sets to this process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *left_in_groups()])


def left_in_groups(
    mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """The bytes that are left in each control group of this process that has a limit.

    Args:
        mounted: where the groups of Linux are.
        own: the file that names those of this process.

    Reference:
        Linux, Documentation/admin-guide: cgroup-v2.rst, "Memory", and cgroup-v1/memory.rst.
    """
    left = []
    for line in own.read_text().splitlines() if own.exists() else ():  # else another system
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names, top = (_MEMORY, mounted / "memory") if controllers else (_UNIFIED, mounted)
        inside = top / path.lstrip("/")
        # A container may see its own group at the top.
        for group in (inside, *inside.parents):
            if not group.is_relative_to(top):
                break
            try:
                most, used = (int((group / name).read_text()) for name in names[:2])
                stat = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no limit, "max", or not told: others hold all the same
                continue
            if most < psutil.virtual_memory().total:
                reclaimable = dict(line.split() for line in stat).get(names[2], 0)
                left.append(max(0, most - used + int(reclaimable)))
    return left


def require_memory(
    num_bytes: int,
    what: str,
    device: torch.device | str = "cpu",
    remedy: str | Callable[[int], str] = "fewer parameters (params=...)",
) -> None:
    """Raise InputError when ``what``, of ``num_bytes`` bytes, does not fit on a device.

    ``remedy`` is what to choose instead, or a function of the free bytes that says so.
    """
    available = available_memory(device)
    if num_bytes > available:
        instead = remedy if isinstance(remedy, str) else remedy(available)
        raise InputError(
            f"{what} needs {_size(num_bytes)}, but {_size(available)} are free; choose {instead}"
        )


def _size(num_bytes: int) -> str:
    """A number of bytes as people say it."""
    small = num_bytes < 2**30
    return f"{num_bytes / 2**20:.1f} MiB" if small else f"{num_bytes / 2**30:.1f} GiB"


def on_disk(shape: Sequence[int], dtype: torch.dtype, folder: str | PathLike[str]) -> Tensor:
    """Return an uncleared tensor whose memory is a file, which the system reads and writes.

    The file has no name, so that nothing stays of it when the process ends, in whatever way.

    Raises:
        InputError: the folder cannot be written to, or has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:  # as the share of a process that has none
        return torch.empty(*shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=Path(folder)) as file:
            # Room for all of it now: a disk that is full later would end the process.
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InputError(
            f"cannot keep {_size(size)} in {os.fspath(folder)}: {error.strerror}; choose another "
            "basis_folder"
        ) from error
    return torch.frombuffer(mapped, dtype=dtype).view(*shape)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice, for which PyTorch has no type on CPUs."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def give_back_freed() -> None:
    """Return what was freed to the system, where the C library keeps it: malloc_trim(3) of glibc.

    After work that takes much memory once, such as tracing, hundreds of megabytes in pieces of less
    than 32 MB would else stay with the process, where larger tensors find no place in them.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
