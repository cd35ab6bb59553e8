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
    return digest(_bytes(t.detach().cpu()) for t in tensors)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, entry after entry."""
    flat = tensor.reshape(-1)
    if flat.stride() != (1,):  # as a single entry of a column, which counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
