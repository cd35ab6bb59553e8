"""Short digests, by which it is known again what was computed from what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(contents: Iterable[bytes | memoryview]) -> str:
    """Sixteen digits that say whether bytes are the same.

    Args:
        contents: the bytes, piece by piece.
    """
    hasher = hashlib.blake2b(digest_size=8)
    for content in contents:
        hasher.update(content)
    return hasher.hexdigest()


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen digits that say whether tensors hold the same bits."""
    # Copied to the CPU, entry after entry, whatever their strides.
    flat = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().flatten()) for t in tensors)
    return digest(t.view(torch.uint8).numpy().data for t in flat)
