"""Several processes that work on one matrix, each with a share of the data and of long vectors.

All transport is that of ``torch.distributed``. What is summed up has the same bits in every
process, so that all of them take the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from hvpspec.errors import ComputationError, HvpspecError, InputError, first_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks:
    """The processes of a group, or this one alone.

    Args:
        group: an initialised process group; None for this process alone.

    Attributes:
        size: number of processes.
        rank: of this one, from 0.

    Raises:
        InputError: it is no group, or one that this process does not belong to.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        # new_group() gives a number to the processes that are not in the group.
        if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
            raise InputError(
                f"group is {group!r}; it must be a process group of torch.distributed, to which "
                "this process belongs"
            )
        self.group = group
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    def sum_(self, x: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place.

        Raises:
            ComputationError: another process ended, or did not answer within the group's time.
        """
        if self.size > 1:
            with _reachable():
                torch.distributed.all_reduce(x, group=self.group)
        return x

    def from_first_(self, x: Tensor) -> Tensor:
        """Replace a tensor by that of the first process, to the last bit, in place.

        Raises:
            ComputationError: another process ended, or did not answer within the group's time.
        """
        if self.size > 1:
            assert self.group is not None
            with _reachable():
                first = torch.distributed.get_global_rank(self.group, 0)
                torch.distributed.broadcast(x, first, group=self.group)
        return x

    def sum(self, x: float) -> float:
        """Add up a number over the processes, in float64."""
        if self.size == 1:
            return x
        on_gpu = torch.distributed.get_backend(self.group) == "nccl"
        device = "cuda" if on_gpu else "cpu"
        return float(self.sum_(torch.tensor(x, dtype=torch.float64, device=device)))

    def gather(self, value: T) -> list[T]:
        """What each process has, in the order of their ranks.

        Raises:
            ComputationError: another process ended, or did not answer within the group's time.
        """
        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        with _reachable():
            torch.distributed.all_gather_object(found, value, group=self.group)
        return found  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """End in all processes with the error of one that cannot go on, which others wait for.

        Raises:
            HvpspecError: that of this process, or of the first that has one.
        """
        failure: HvpspecError | None = None
        try:
            yield
        except HvpspecError as error:
            failure = error
        others = [error for error in self.gather(failure) if error is not None]
        if failure is not None:
            raise failure
        if others:
            raise others[0]

    def share(self, n: int) -> slice:
        """The entries of a vector of length n that this process holds: as many as the others."""
        each, more = divmod(n, self.size)  # the first have one more where n cannot be divided
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def share_size(self, n: int) -> int:
        """How many entries of a vector of length n this process holds."""
        return len(range(n)[self.share(n)])

    def whole(self, part: Tensor, n: int) -> Tensor:
        """Put k vectors of length n together from the shares that the processes hold.

        Args:
            part: this process's share of them, as rows, shape (k, share_size(n)).
            n: their length.

        Returns:
            Shape (k, n), with the same bits in every process.
        """
        if self.size == 1:
            return part
        vectors = torch.zeros(len(part), n, dtype=part.dtype, device=part.device)
        vectors[:, self.share(n)] = part
        return self.sum_(vectors)  # of each entry and zeros, which is exact


#: No other process.
ALONE = Ranks()


@contextmanager
def _reachable() -> Iterator[None]:
    """Say what is known when the others cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        raise ComputationError(
            f"another process ended, or did not answer in time ({reason}); it may say why itself"
        ) from error
