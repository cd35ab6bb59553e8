"""The rule by which an engine is chosen: from what is counted, so that two runs choose alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hvpspec.linalg.memory import available_memory

#: Ways to multiply, all exact; "auto" takes the one that :func:`choose` names.
EngineName = Literal["auto", "double-backward", "batched", "linearised", "compiled"]

# A machine of fixed speed: one core of about 2020, or an accelerator. It decides only which of two
# efforts is several times the other, which a clock would decide otherwise from run to run.
# On a CPU, PyTorch's convolutions are slower than its products of matrices, and those between fewer
# pairs of channels slower still, in proportion.
_MATRIX_FLOPS = 5e10
_CONVOLUTION_FLOPS = 1e10
_PAIRS = 16
_ACCELERATOR_FLOPS = 1e13
_BYTES_PER_SECOND = 1e10
_SECONDS_PER_OPERATION = 1e-5

# Tracing takes 4 to 8 ms for each node of the gradient's graph (measured for 30 to 600 nodes). It
# is done where that is at most so much of what double backward would take. Linearised products take
# 0.07 to 0.95 of double backward's time, so that even the shortest such run is hardly slower.
_SECONDS_PER_NODE = 8e-3
_SHARE = 0.1
#: Products that nobody announced are expected to go on for a quarter of those that were made.
UNANNOUNCED = 0.25

# Vectors taken at once save calls of operations but no arithmetic, and make intermediate results
# larger. Double backward takes a block at once where calls are at least a tenth of the arithmetic
# (blocks of 8: 0.5 of the time with 1.4 and 0.6, perceptrons; 0.93 to 1.5 below 0.1, convolutions
# and transformers).
_BATCHED = 0.1
# Results that leave a core's cache for one vector gain nothing from others (blocks of a CNN with
# results of 3 MB: 1.4 of the time of single vectors; with 1.6 MB, 0.5 and 0.7).
_CACHE = 2**21
# The C library takes pieces of memory beyond 32 MB from the system each time, which clears them
# first (mallopt(3), M_MMAP_THRESHOLD).
_LARGEST = 2**24
# The most vectors that are multiplied at once: more gain little, and take as much more memory.
_MOST_VECTORS = 32
# Where so much memory is free, the width of blocks, and with it the bits, do not depend on it.
_ENOUGH = 2**32


@dataclass(frozen=True)
class Plan:
    """How products with blocks of one width are made.

    Attributes:
        engine: the way of multiplying.
        num_vectors: the width of the block.
        at_once: how many of its vectors are multiplied at once.
        kept: whether what does not depend on the vectors is kept from product to product.
        notes: which engines could not be used, and why.
    """

    engine: str
    num_vectors: int
    at_once: int
    kept: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a product of one vector with the first chunk takes by double backward.

    Attributes:
        calls: seconds for calling operations, whatever their size.
        arithmetic: seconds for what they do.
        num_nodes: of the gradient's graph.
        largest: bytes of the largest tensor that the graph saves, data and parameters apart.
        size: bytes of all of them.
    """

    calls: float
    arithmetic: float
    num_nodes: int
    largest: int
    size: int

    @property
    def seconds(self) -> float:
        """Of the product."""
        return self.calls + self.arithmetic


def choose(cost: Cost, num_products: float, device: torch.device) -> EngineName:
    """Choose the engine for blocks of some width.

    Args:
        cost: of one vector with the first chunk.
        num_products: of a vector with a chunk, how many are expected.
        device: where.
    """
    if cost.num_nodes * _SECONDS_PER_NODE <= _SHARE * num_products * cost.seconds:
        return "linearised"
    if device.type != "cpu" or cost.calls >= _BATCHED * cost.arithmetic:
        return "batched"
    return "double-backward"


def most_at_once(cost: Cost, width: int, device: torch.device) -> int:
    """How many vectors of a block are multiplied at once, in parts of about equal width."""
    free = min(available_memory(device), _ENOUGH)
    # What is computed on the way of a vector takes about as much as four graphs.
    most = min(_MOST_VECTORS, free // (4 * max(1, cost.size)))
    if device.type == "cpu":
        most = min(most, _LARGEST // max(1, cost.largest))
        if cost.largest > _CACHE:
            most = 1
    num_parts = math.ceil(width / max(1, most))
    return math.ceil(width / num_parts)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the operations that run inside would take on the machine of fixed speed.

    Attributes:
        calls: seconds for calling them.
        arithmetic: seconds for what they do.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.arithmetic = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and add what it takes."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls += _SECONDS_PER_OPERATION
        flops = flop_registry.get(func._overloadpacket)
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if flops is not None:
            rate = _MATRIX_FLOPS * torch.get_num_threads()
            if any(t.device.type != "cpu" for t in tensors):
                rate = _ACCELERATOR_FLOPS
            elif "convolution" in func.__name__:
                weight = args[2] if "backward" in func.__name__ else args[1]
                pairs = weight.shape[0] * weight.shape[1]
                rate = _CONVOLUTION_FLOPS * torch.get_num_threads() * min(1, pairs / _PAIRS)
            self.arithmetic += flops(*args, **kwargs, out_val=out) / rate
        elif not func.is_view:
            self.arithmetic += sum(t.nbytes for t in tensors) / _BYTES_PER_SECOND
        return out
