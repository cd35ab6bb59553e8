"""What fits into memory, asked before the work starts, and what is given back."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

from hvpspec.errors import InputError


def available_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can still be allocated on ``device`` without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def require_memory(
    num_bytes: int,
    what: str,
    device: torch.device | str = "cpu",
    remedy: str = "fewer parameters (params=...)",
) -> None:
    """Raise InputError when ``what``, of ``num_bytes`` bytes, does not fit."""
    available = available_memory(device)
    if num_bytes > available:
        raise InputError(
            f"{what} needs {num_bytes / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB are free; "
            f"choose {remedy}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice, for which PyTorch has no type on CPUs."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def give_back_freed() -> None:
    """Return what was freed to the system, where the C library keeps it: malloc_trim(3) of glibc.

    After work that takes much memory once, such as trials, hundreds of megabytes in pieces of less
    than 32 MB would else stay with the process, where larger tensors find no place in them.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
