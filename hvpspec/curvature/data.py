"""Data as a fixed sequence of batches and chunks, whatever form they were given in."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hvpspec.errors import InputError

#: What a mapping calls its targets, in the order in which they are looked for.
TARGET_KEYS = ("labels", "label", "targets", "target", "y")

#: Without a chunk size, a chunk has about this many entries of inputs (of which an integer, usually
#: an index into an embedding, counts as 256), or of outputs where these are more. The graph of a
#: convolutional network on it takes some hundred megabytes, and what is computed from logits about
#: eight times as much as these.
_DEFAULT_CHUNK_ENTRIES = 2**20

#: Values that are no tensors and mean the same for every example.
_CONSTANTS = (type(None), Number, str)

#: What may be or hold an array of NumPy.
_CONTAINERS = (np.ndarray, list, tuple, Mapping)


@dataclass(frozen=True)
class Batch:
    """Examples as the model and the loss take them: ``loss(model(*args, **kwargs), targets)``.

    Attributes:
        args: the model's positional arguments.
        kwargs: its keyword arguments.
        targets: what its outputs are compared with.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any

    @cached_property
    def leaves(self) -> list[Tensor]:
        """All tensors of the batch."""
        return tensors_in([*self.args, *self.kwargs.values(), self.targets])

    @cached_property
    def others(self) -> list[Any]:
        """All that is no tensor: numbers and strings, and objects that are not looked into."""
        parts = [*self.args, *self.kwargs.values(), self.targets]
        return [leaf for leaf in leaves_of(parts) if not isinstance(leaf, Tensor)]

    @cached_property
    def is_plain(self) -> bool:
        """Whether there is nothing but tensors and constants in it."""
        return all(isinstance(value, _CONSTANTS) for value in self.others)

    @cached_property
    def num_examples(self) -> int:
        """How many examples there are: the length of the targets, or else of the inputs.

        Where neither has one length, it is that of their first tensor; of inputs that are not
        looked into, such as graphs, only the targets tell.
        """
        inputs = [*self.args, *self.kwargs.values()]
        found = [_lengths(part) for part in (self.targets, inputs)]
        for lengths in found:
            if len(set(lengths)) == 1:
                return lengths[0]
        for part in (inputs, [self.targets]):  # lists with an entry for each example
            counts = {len(value) for value in part if isinstance(value, list)}
            if len(counts) == 1:
                return counts.pop()
        return next((length for lengths in found for length in lengths), 1)

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether all tensors have the same first dimension, of two or more examples.

        A list of texts or numbers may have one for each example, and is not cut.
        """
        lengths = _lengths(self.leaves)
        parts = [*self.args, *self.kwargs.values(), self.targets]
        listed = any(_lists_constants(part) for part in parts)
        return self.is_plain and not listed and len(set(lengths)) == 1 and lengths[0] > 1

    def length(self, dim: int) -> int:
        """How many examples there are along the first dimension, or the second."""
        return self.leaves[0].shape[1] if dim else self.num_examples

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return Batch(
            tuple(map_tensors(function, a) for a in self.args),
            {k: map_tensors(function, v) for k, v in self.kwargs.items()},
            map_tensors(function, self.targets),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Move to a device, and convert floating-point tensors to ``dtype``."""

        def moved(tensor: Tensor) -> Tensor:
            """Another tensor, of which autograd can save what it needs."""
            plain = tensor.clone() if tensor.is_inference() else tensor.detach()
            return plain.to(device, matching(tensor.dtype, dtype))

        with torch.inference_mode(False):
            return self.map(moved)

    def rows(self, index: Sequence[int] | slice) -> Batch:
        """Some of the examples of a batch that can be cut."""
        return self.map(partial(_rows, index))

    def split(self, chunk_size: int) -> Iterator[Batch]:
        """Cut along the examples into chunks of at most ``chunk_size``.

        Raises:
            InputError: a tensor does not run over the examples.
        """
        n = self.num_examples
        if n <= chunk_size:
            yield self
            return
        if not self.can_be_cut:
            raise InputError(f"{self._why_whole()}; give batches that fit and chunk_size={n}")
        for start in range(0, n, chunk_size):
            yield self.rows(slice(start, start + chunk_size))

    def default_chunk_size(self, num_outputs: int) -> int:
        """How many examples have so many entries that their graph takes a fair share of memory.

        Args:
            num_outputs: entries of the outputs for one example.
        """
        inputs = sum(
            t.numel() * (1 if is_continuous(t.dtype) else 256) for t in self.leaves if t.ndim
        )
        entries = max(1, inputs, self.num_examples * num_outputs)
        return max(1, self.num_examples * _DEFAULT_CHUNK_ENTRIES // entries)

    def _why_whole(self) -> str:
        """Say what does not run over the examples."""
        n = self.num_examples
        for tensor in self.leaves:
            if tensor.ndim and len(tensor) != n:
                return (
                    f"cannot cut a batch of {n} examples: a tensor of shape {tuple(tensor.shape)} "
                    "does not run over them"
                )
        objects = [value for value in self.others if not isinstance(value, _CONSTANTS)]
        return f"cannot cut a batch of {n} examples: it holds {describe(objects[0])}"


def is_continuous(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype are real or complex ones."""
    return dtype.is_floating_point or dtype.is_complex


def matching(dtype: torch.dtype, real: torch.dtype) -> torch.dtype:
    """What numbers of a dtype become where real ones are computed in ``real``."""
    if dtype.is_floating_point:
        return real
    if dtype.is_complex:
        return torch.complex128 if real == torch.float64 else torch.complex64
    return dtype


def _entries(value: Any) -> list[Any] | None:
    """The entries of a container; None for what is not looked into."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, list | tuple):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _lists_constants(value: Any) -> bool:
    """Whether there is a list of constants in nested containers."""
    entries = None if isinstance(value, Tensor) else _entries(value)
    if entries is None:
        return False
    constants = isinstance(value, list) and any(isinstance(e, _CONSTANTS) for e in entries)
    return constants or any(map(_lists_constants, entries))


def leaves_of(value: Any) -> list[Any]:
    """All that nested sequences, mappings and dataclasses hold.

    Of a PackedSequence also the object itself, since its examples do not lie side by side.
    """
    entries = None if isinstance(value, Tensor) else _entries(value)
    if entries is None:
        return [value]
    found = [leaf for entry in entries for leaf in leaves_of(entry)]
    return [*found, value] if isinstance(value, PackedSequence) else found


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested sequences, mappings and dataclasses."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def is_nested(value: Any) -> bool:
    """Whether a value is made of nothing but tensors and constants in containers."""
    return all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves_of(value))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested sequences, mappings and dataclasses.

    Objects with a method ``apply`` for their tensors, as graphs of PyTorch Geometric have, are
    copied by it.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, PackedSequence):
        order = {
            name: function(getattr(value, name))
            for name in ("data", "sorted_indices", "unsorted_indices")
            if getattr(value, name) is not None
        }
        return value._replace(**order)  # the lengths stay on the CPU, where RNNs want them
    if isinstance(value, Mapping):
        mapped = {k: map_tensors(function, v) for k, v in value.items()}
        if type(value) is dict or not isinstance(value, dict):
            return mapped
        copied = copy.copy(value)
        for key, entry in mapped.items():  # outputs of transformers refuse update()
            copied[key] = entry
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        changed = {name: map_tensors(function, getattr(value, name)) for name in fields}
        return dataclasses.replace(value, **changed)
    if isinstance(value, nn.Module) or not hasattr(value, "apply") or not hasattr(value, "clone"):
        return value
    return value.clone().apply(function)


def _lengths(value: Any) -> list[int]:
    """The first dimensions of all tensors that have one."""
    return [len(tensor) for tensor in tensors_in(value) if tensor.ndim]


def _rows(index: Sequence[int] | slice, tensor: Tensor) -> Tensor:
    """Return some rows of a tensor; a scalar belongs to every row."""
    return tensor[index] if tensor.ndim else tensor


def _with_tensors(value: Any) -> Any:
    """Arrays of NumPy as tensors, in sequences and mappings, too."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, Mapping) and any(isinstance(v, _CONTAINERS) for v in value.values()):
        return {k: _with_tensors(v) for k, v in value.items()}
    if type(value) in (list, tuple) and any(isinstance(v, _CONTAINERS) for v in value):
        return type(value)(map(_with_tensors, value))
    return value


class Reader:
    """Reads batches as a model's forward pass takes them.

    Args:
        model: whose arguments they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        kinds = inspect.Parameter
        positional = [
            p
            for p in self._signature.parameters.values()
            if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        self._fewest = sum(p.default is kinds.empty for p in positional)
        self._most = len(positional)
        if any(p.kind is kinds.VAR_POSITIONAL for p in self._signature.parameters.values()):
            self._most = 1_000_000
        self._is_changed = bool(model._forward_pre_hooks)  # by hooks, which may change arguments
        self.takes_targets_from_inputs = False

    def batch(self, item: Any) -> Batch:
        """Read one batch.

        Args:
            item: a sequence whose last element is the targets; its other elements are the model's
                positional arguments. A mapping as the only one holds keyword arguments, a sequence
                positional ones, if the model takes so many. Or a mapping (or a dataclass, or
                another object) whose entry ``labels``, ``label``, ``targets``, ``target`` or ``y``
                is the targets, and whose other entries are keyword arguments (of another object:
                the object itself is the argument). Or inputs alone, which are their own targets.

        Raises:
            InputError: the item has another form, or two meanings.
        """
        batch = self._read(_with_tensors(item))
        if not self._is_changed and not self._binds(*batch.args, **batch.kwargs):
            raise InputError(
                f"the model takes {self._signature}, not a batch's {self._given(batch)}; a batch "
                "is (inputs, targets), (a, b, targets) or a mapping of the model's arguments and "
                f"{TARGET_KEYS[0]!r}"
            )
        return batch

    def _read(self, item: Any) -> Batch:
        """Read a batch, whose arguments may not be the model's yet."""
        if isinstance(item, Mapping):
            return self._named(item)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return self._named({f.name: getattr(item, f.name) for f in dataclasses.fields(item)})
        if isinstance(item, list | tuple) and not isinstance(item, PackedSequence) and item:
            names = getattr(item, "_fields", ())
            if names and next((k for k in TARGET_KEYS if k in names), names[-1]) != names[-1]:
                return self._named(dict(zip(names, item, strict=True)))
            if len(item) == 1 and isinstance(item[0], Tensor):
                self.takes_targets_from_inputs = True
                return Batch((item[0],), {}, item[0])
            if len(item) >= 2:
                return self._in_order(item[:-1], item[-1])
        key = next((key for key in TARGET_KEYS if isinstance(getattr(item, key, None), Tensor)), "")
        if key:  # a graph, say, that knows its targets
            return Batch((item,), {}, getattr(item, key))
        raise InputError(
            f"a batch must be (inputs, targets) or a mapping with {TARGET_KEYS[0]!r}, got "
            f"{describe(item)}"
        )

    def _named(self, item: Mapping[str, Any]) -> Batch:
        """Read a mapping."""
        key = next((key for key in TARGET_KEYS if key in item), None)
        if key is None:
            raise InputError(
                f"a batch has the entries {', '.join(map(str, item))}, none of which is the "
                f"targets; call that one {TARGET_KEYS[0]!r}, or pass (mapping, None)"
            )
        inputs = {k: v for k, v in item.items() if k != key}
        if not self._binds(**inputs) and self._fewest <= len(inputs) <= self._most:
            return Batch(tuple(inputs.values()), {}, item[key])
        return Batch((), inputs, item[key])

    def _in_order(self, inputs: Sequence[Any], targets: Any) -> Batch:
        """Read positional arguments; one that is a container may hold them."""
        inputs = list(inputs)
        if len(inputs) > 1:
            return Batch(tuple(inputs), {}, targets)
        (only,) = inputs
        if isinstance(only, Mapping) and self._binds(**{str(k): v for k, v in only.items()}):
            return Batch((), dict(only), targets)
        is_sequence = isinstance(only, list | tuple) and not hasattr(only, "_fields")
        if is_sequence and self._unpacks(only, targets):
            return Batch(tuple(only), {}, targets)
        return Batch((only,), {}, targets)

    def _unpacks(self, only: Sequence[Any], targets: Any) -> bool:
        """Whether a sequence holds the model's arguments, rather than being the only one.

        Raises:
            InputError: both are possible.
        """
        if not self._fewest <= len(only) <= self._most:
            return False
        if self._fewest > 1 or isinstance(only, tuple):
            return True
        # The model takes one argument, and as many as there are. Arguments are as long as the
        # targets, and so is a list with an entry for each example.
        n = Batch((), {}, targets).num_examples
        lengths = [_lengths(value) for value in only]
        as_arguments = all(found[0] == n for found in lengths if found)
        as_examples = len(only) == n and all(isinstance(value, Tensor) for value in only)
        if as_arguments and as_examples:
            raise InputError(
                f"a batch's inputs are a list of {len(only)}, for {n} examples: that may be "
                f"{len(only)} arguments of the model or one that is a list; write "
                "(a, b, targets) for arguments, ((list,), targets) for a list"
            )
        return as_arguments or not as_examples

    def _binds(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be called so."""
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def _given(self, batch: Batch) -> str:
        """Name a batch's inputs."""
        if batch.kwargs:
            return f"entries {', '.join(batch.kwargs)}"
        count = len(batch.args)
        return f"{count} input{'s' if count != 1 else ''}"

    def is_one_batch(self, data: Any) -> bool:
        """Whether data are the inputs and targets themselves rather than a sequence of batches.

        Raises:
            InputError: they may be either.
        """
        if isinstance(data, Mapping):
            return True
        if dataclasses.is_dataclass(data):
            return any(hasattr(data, key) for key in TARGET_KEYS)
        if not isinstance(data, list | tuple) or isinstance(data, PackedSequence):
            return False
        if hasattr(data, "_fields"):
            return True
        if any(isinstance(item, Tensor | np.ndarray) or item is None for item in data):
            return isinstance(data, tuple) or len(data) > 1
        pair = isinstance(data, tuple) and len(data) == 2
        if not pair or not all(isinstance(item, list | tuple | Mapping) for item in data):
            return False
        inputs = data[0]
        lengths = [_lengths(item) for item in data]
        # As many inputs as the model takes, and all of one length; or two pairs of one length each.
        as_one = len({*lengths[0], *lengths[1]}) == 1 and self._is_taken(inputs)
        as_two = all(len(set(found)) == 1 for found in lengths) and all(
            self._is_item(item) for item in data
        )
        if as_one and as_two:
            raise InputError(
                "data of the form ((a, b), (c, d)) may be one batch with inputs (a, b) and targets "
                "(c, d), or two batches; write [((a, b), (c, d))] for one, [(a, b), (c, d)] for two"
            )
        return as_one or not as_two

    def _is_taken(self, inputs: Any) -> bool:
        """Whether inputs can be the model's arguments, by name or in their order."""
        if isinstance(inputs, Mapping):
            return self._binds(**{str(k): v for k, v in inputs.items()})
        return self._binds(*inputs)

    def _is_item(self, item: Any) -> bool:
        """Whether an item can be a batch by itself."""
        if isinstance(item, Mapping):
            key = next((key for key in TARGET_KEYS if key in item), None)
            return key is not None and self._is_taken({k: v for k, v in item.items() if k != key})
        return len(item) >= 2 and self._binds(*item[:-1])


class Data:
    """A fixed sequence of batches on one device in one dtype, cut into chunks.

    Args:
        data: a pair (or longer tuple) of tensors, a mapping of tensors, a ``TensorDataset``, or a
            re-iterable of batches (a ``DataLoader``, a list) as :class:`Reader` reads them.
        reader: what reads them.
        device: where the chunks go.
        dtype: what their floating-point tensors are converted to.
        chunk_size: the most examples in a chunk; None for a size chosen from inputs and outputs.

    Attributes:
        whole: whether batches are not cut, as long as no chunk size is given.
        num_outputs: entries of the outputs for one example, as far as is known.
        sources: data loaders, whose random states are to be looked after.

    Raises:
        InputError: the data can be read only once, are empty, or have another form.
    """

    def __init__(
        self,
        data: Any,
        reader: Reader,
        *,
        device: torch.device,
        dtype: torch.dtype,
        chunk_size: int | None,
    ) -> None:
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise InputError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
        self.device, self.dtype, self.chunk_size = device, dtype, chunk_size
        self.whole = False
        self.num_outputs = 0
        self.reader = reader
        self._chunks: tuple[int | None, bool, list[Batch]] | None = None
        # Of exactly this type: a subclass may transform what it holds.
        if type(data) is torch.utils.data.TensorDataset:
            data = data.tensors
        self._batches: Iterable[Any]
        self._own: Batch | None = None
        self.sources: list[Any] = []
        if reader.is_one_batch(data):
            batch = reader.batch(data)
            self._refuse_lengths(batch)
            self._batches = [batch]
            return
        if isinstance(data, Iterator):
            raise InputError(
                f"data is {describe(data)}, which can be read only once; "
                "pass a DataLoader or a list of batches"
            )
        if not isinstance(data, Iterable) or isinstance(data, str | Tensor | np.ndarray):
            remedy = "; wrap it in a DataLoader" if hasattr(data, "__getitem__") else ""
            if isinstance(data, Tensor | np.ndarray):
                remedy = "; pass (x, x) where the inputs are the targets"
            raise InputError(
                "data must be (inputs, targets), a mapping or a re-iterable of batches, got "
                + describe(data)
                + remedy
            )
        self._batches = data
        self.sources = [data]

    @property
    def in_memory(self) -> bool:
        """Whether the data are one batch, which lies in memory."""
        return not self.sources

    def _refuse_lengths(self, batch: Batch) -> None:
        """Raise InputError where one tensor of inputs and one of targets do not fit each other.

        Targets that were flattened over positions are a multiple as long.
        """
        lengths = [len(tensor) for tensor in batch.leaves if tensor.ndim]
        if len(lengths) == 2 and batch.is_plain and min(lengths) and max(lengths) % min(lengths):
            raise InputError(f"inputs and targets have different lengths: {sorted(lengths)}")

    def batches(self) -> Iterator[Batch]:
        """One pass over the data, batch by batch.

        Raises:
            InputError: there is no example.
        """
        empty = True
        for item in self._batches:
            batch = item if isinstance(item, Batch) else self.reader.batch(item)
            if batch.num_examples == 0:
                continue
            empty = False
            if not self.in_memory:
                yield batch.to(self.device, self.dtype)
                continue
            if self._own is None:  # converted once, when it is first wanted
                self._own = batch.to(self.device, self.dtype)
            yield self._own
        if empty:
            raise InputError("the data are empty: no batch with an example in it")

    def cut(self, batch: Batch) -> list[Batch]:
        """The chunks of a batch: of the size that is given, or by default, where it can be cut."""
        if self.chunk_size is not None:
            return list(batch.split(self.chunk_size))
        if self.whole or not batch.can_be_cut:
            return [batch]
        return list(batch.split(batch.default_chunk_size(self.num_outputs)))

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the data, chunk by chunk."""
        if not self.in_memory:
            for batch in self.batches():
                yield from self.cut(batch)
            return
        kept = self._chunks
        if kept is None or kept[:2] != (self.chunk_size, self.whole):
            chunks = [chunk for batch in self.batches() for chunk in self.cut(batch)]
            kept = self._chunks = (self.chunk_size, self.whole, chunks)
        yield from kept[2]


def describe(value: Any) -> str:
    """Name a value in an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, PackedSequence):
        return "a PackedSequence"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
