"""What fits into memory, asked before the work starts."""

from __future__ import annotations

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
