"""Data as a fixed sequence of chunks, whatever form it was given in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvpspec.errors import InputError

#: What a mapping calls its targets, in the order in which they are looked for.
TARGET_KEYS = ("labels", "label", "targets", "target", "y")

#: Without a chunk size, a chunk holds about this many input entries (of which an integer, usually
#: an index into an embedding, counts as 256), so that the graph of a convolutional network on it
#: takes some hundred megabytes.
_DEFAULT_CHUNK_ENTRIES = 2**20


@dataclass(frozen=True)
class Batch:
    """Examples as the model and the loss take them: ``loss(model(*args, **kwargs), targets)``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any

    @property
    def leaves(self) -> list[Tensor]:
        """All tensors of the batch."""
        return tensors_in([*self.args, *self.kwargs.values(), self.targets])

    def __len__(self) -> int:
        for value in (self.targets, *self.leaves):
            if isinstance(value, Tensor) and value.ndim:
                return len(value)
        raise InputError("a batch holds no tensor with a first dimension over its examples")

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return Batch(
            tuple(_map(function, a) for a in self.args),
            {k: _map(function, v) for k, v in self.kwargs.items()},
            _map(function, self.targets),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move to a device, and convert floating-point tensors to ``dtype``."""
        return self.map(lambda t: t.to(device, dtype if t.is_floating_point() else None))

    def split(self, chunk_size: int | None) -> Iterator[Batch]:
        """Cut along the examples into chunks of at most ``chunk_size``."""
        n = len(self)
        if chunk_size is None:
            entries = sum(t.numel() * (1 if t.is_floating_point() else 256) for t in self.leaves)
            chunk_size = max(1, n * _DEFAULT_CHUNK_ENTRIES // max(1, entries))
        if n <= chunk_size:
            yield self
            return
        for tensor in self.leaves:
            if tensor.ndim and len(tensor) != n:
                raise InputError(
                    f"cannot cut a batch of {n} examples: a tensor of shape {tuple(tensor.shape)} "
                    f"does "
                    f"not run over them; give batches that fit and chunk_size={n} or more"
                )
        for start in range(0, n, chunk_size):
            yield self.map(partial(_rows, start, min(start + chunk_size, n)))


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested sequences and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_map(function, v) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, list | tuple) else []


def is_nested(value: Any) -> bool:
    """Whether a value is made of nothing but tensors and numbers in sequences and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(map(is_nested, value))
    return value is None or isinstance(value, Tensor | int | float | str)


def _rows(start: int, stop: int, tensor: Tensor) -> Tensor:
    """Return some rows of a tensor; a scalar belongs to every row."""
    return tensor[start:stop] if tensor.ndim else tensor


def as_batch(item: Any) -> Batch:
    """Read one batch: ``(inputs, targets)``, ``(input, ..., targets)`` or a mapping.

    Args:
        item: a sequence whose last element is the targets; its other elements are the model's
            positional arguments (a mapping or a sequence as the only one is unpacked). Or a mapping
            whose entry ``labels``, ``label``, ``targets``, ``target`` or ``y`` is the targets and
            whose other entries are the model's keyword arguments.

    Raises:
        InputError: the item has another form.
    """
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item), None)
        if key is None:
            raise InputError(
                f"a batch has the entries {', '.join(map(str, item))}, none of which is the "
                f"targets; "
                f"call that one {TARGET_KEYS[0]!r}"
            )
        return Batch((), {k: v for k, v in item.items() if k != key}, item[key])
    if isinstance(item, list | tuple) and len(item) >= 2:
        *inputs, targets = item
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return Batch((), inputs[0], targets)
        if len(inputs) == 1 and isinstance(inputs[0], list | tuple):
            inputs = list(inputs[0])
        return Batch(tuple(inputs), {}, targets)
    raise InputError(
        f"a batch must be (inputs, targets) or a mapping with {TARGET_KEYS[0]!r}, got "
        f"{_describe(item)}"
    )


class ChunkedData:
    """A fixed sequence of chunks on one device in one dtype.

    Args:
        data: a pair (or longer tuple) of tensors, a mapping of tensors, a ``TensorDataset``, or a
            re-iterable of batches (a ``DataLoader``, a list) as :func:`as_batch` reads them.
        device: where the chunks go.
        dtype: what their floating-point tensors are converted to.
        chunk_size: the most examples in a chunk; None for a size chosen from the inputs.

    Raises:
        InputError: the data can be read only once, are empty, or have another form.
    """

    def __init__(
        self, data: Any, *, device: torch.device, dtype: torch.dtype, chunk_size: int | None
    ) -> None:
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise InputError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
        self.device, self.dtype, self.chunk_size = device, dtype, chunk_size
        # Of exactly this type: a subclass may transform what it holds.
        if type(data) is torch.utils.data.TensorDataset:
            data = data.tensors
        self._batches: Iterable[Any]
        if isinstance(data, Mapping) or _is_tensors(data):
            batch = as_batch(data)
            lengths = {len(tensor) for tensor in batch.leaves if tensor.ndim}
            if len(lengths) > 1:
                raise InputError(f"inputs and targets have different lengths: {sorted(lengths)}")
            self._batches = [batch.to(device, dtype)]
            self.sources: list[Any] = []
        else:
            if isinstance(data, Iterator):
                raise InputError(
                    f"data is {_describe(data)}, which can be read only once; "
                    "pass a DataLoader or a list of batches"
                )
            if not isinstance(data, Iterable) or isinstance(data, str | Tensor):
                raise InputError(
                    "data must be (inputs, targets), a mapping or a re-iterable of batches, got "
                    + _describe(data)
                )
            self._batches = data
            self.sources = [data]

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for item in self._batches:
            batch = item if isinstance(item, Batch) else as_batch(item)
            if len(batch) == 0:
                continue
            empty = False
            for chunk in batch.split(self.chunk_size):
                yield chunk.to(self.device, self.dtype)
        if empty:
            raise InputError("the data are empty: no batch with an example in it")


def _is_tensors(data: Any) -> bool:
    """Whether data are the inputs and targets themselves rather than a sequence of batches."""
    return (
        isinstance(data, list | tuple)
        and len(data) >= 2
        and isinstance(data[-1], Tensor)
        and not all(isinstance(item, list | tuple | Mapping) for item in data)
    )


def _describe(value: Any) -> str:
    """Name a value in an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
