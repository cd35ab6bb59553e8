"""What a computation would take on a machine that is always the same, so that it can decide."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# One core of about 2020: what decides is only which of two efforts is many times the other.
_FLOPS = 2e10
_BYTES_PER_SECOND = 1e10
_SECONDS_PER_OPERATION = 1e-5


class Effort(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts arithmetic, memory and operations of what runs inside; the results stay the same.

    Attributes:
        seconds: what they would take on a machine of fixed speed. It is the same in every run, as
            no clock is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and add what it takes."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.seconds += _SECONDS_PER_OPERATION
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.seconds += count(*args, **kwargs, out_val=out) / _FLOPS
        elif not func.is_view:
            written = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.seconds += sum(t.nbytes for t in written) / _BYTES_PER_SECOND
        return out
