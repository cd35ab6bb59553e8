"""Run a block of code with seeded random numbers, and leave the caller's as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvpspec.errors import InputError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch inside the block and restore every RNG state after it.

    PyTorch's initialisers and dropout draw from the global generators and take no other, so these
    are seeded, but only for as long as the block lasts.

    Raises:
        InputError: The seed is not a whole number in [0, 2**63).
    """
    check_seed(seed)
    # None before CUDA is initialised: it has no state yet, and a seed would lie in wait for it.
    cuda = list(range(len(torch.cuda.default_generators)))
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def check_seed(seed: object) -> None:
    """Raise InputError for a seed that is not a whole number in [0, 2**63)."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1")
