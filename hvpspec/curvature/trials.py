"""One way of multiplying tried on one chunk: its product, and what it takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpspec.curvature.data import Batch
from hvpspec.curvature.engines import Engine

# A trial is repeated until it has taken so long, and once unless it takes ten times as long: the
# least of a few short times is no accident.
_TRIAL_SECONDS = 0.05


@dataclass(frozen=True)
class Trial:
    """A product with a block on one chunk, timed.

    Attributes:
        product: mixtures of the block's rows multiplied, of which each has a share in each.
        prepare_seconds: for what does not depend on the vectors.
        multiply_seconds: for what does.
        num_bytes: held by what was prepared.
    """

    product: Tensor
    prepare_seconds: float
    multiply_seconds: float
    num_bytes: int

    @classmethod
    def of(cls, engine: Engine, k: int, batch: Batch, V: Tensor, mix: Tensor) -> Trial:
        """Try an engine on a chunk, with the whole block only where it takes that at once."""
        block = V if engine.batched else mix @ V
        prepare: list[float] = []
        multiply: list[float] = []
        while True:
            start = time.perf_counter()
            prepared = engine.prepare(k, batch)
            middle = time.perf_counter()
            product = engine.multiply(prepared, block)
            stop = time.perf_counter()
            prepare.append(middle - start)
            multiply.append((stop - middle) * len(V) / len(block))
            enough = _TRIAL_SECONDS if len(multiply) > 1 else 10 * _TRIAL_SECONDS
            if len(multiply) == 10 or sum(multiply) >= enough:
                break
            del prepared, product  # before they are made again
        mixed = mix @ product if engine.batched else product
        return cls(mixed, min(prepare), min(multiply), engine.size(prepared))


def agree(product: Tensor, expected: Tensor, scale: float, eps: float) -> bool:
    """Whether two products are equal to half the digits, which is far beyond round-off.

    Args:
        product: shape (b, n).
        expected: shape (b, n).
        scale: what is round-off where the product is zero but for round-off, in units of it.
        eps: twice the unit round-off of what is computed.
    """
    difference = float(torch.linalg.vector_norm(product - expected))
    size = float(torch.linalg.vector_norm(expected))
    return difference <= math.sqrt(eps) * size + eps * scale
