"""Finding weights in files of any origin, and loading them into a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hvpspec.errors import InputError, first_line
from hvpspec.zoo.safe_load import BESIDE_WEIGHTS, load_torch_file, require_file

StateDict = Mapping[str, Tensor]

_REMEDY = (
    "if you trust it, read it in Python with torch.load(..., weights_only=False) and save the"
    " weights alone: torch.save(model.state_dict(), 'weights.pt')"
)

# Words with which training scripts name a running average of the weights.
_AVERAGED = {"ema", "swa", "avg", "averaged", "average", "shadow"}

_REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_COMPLEX = {torch.complex128, torch.complex64}
_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
# Without quantised tensors and 8-bit floats, which lack basic operations.
_DTYPES = _REAL | _COMPLEX | _WHOLE


@dataclass(frozen=True, eq=False)
class FoundWeights:
    """Tensors of a file that may be the weights of a network.

    Attributes:
        name: The entries of the file that lead to them and the prefix of their names, joined by
            dots; empty if the file itself is the state_dict.
        tensors: The tensors, by their names in the network.
        within: All tensors of the state_dict that contains them.
    """

    name: str
    tensors: StateDict
    within: StateDict


def read_weights_file(path: Path) -> object:
    """Read a ``.safetensors`` file or one of `torch.save`, without running code.

    Raises:
        InputError: The file is missing or broken, or contains more than plain data.
    """
    if path.suffix != ".safetensors":
        return load_torch_file(path, remedy=_REMEDY, unread=BESIDE_WEIGHTS)
    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error


def state_dicts(path: Path, content: object) -> dict[str, StateDict]:
    """Find all dictionaries of named tensors in a file.

    The keys of the result are the entries that lead to each, joined by dots; the values contain
    only its tensors.

    Raises:
        InputError: There are none.
    """
    found: dict[str, StateDict] = {}
    waiting, seen = [("", content)], set()
    while waiting:  # not recursive, since a hostile file may be nested to any depth
        place, entry = waiting.pop()
        if not isinstance(entry, Mapping):
            continue
        named = {name: value for name, value in entry.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            found[place] = tensors
        if id(entry) not in seen:  # a dictionary may contain itself
            seen.add(id(entry))
            inner = [(_joined(place, name), value) for name, value in named.items()]
            waiting += reversed(inner)  # taken from the end, so in the order of the file
    if not found:
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) else ""
        raise InputError(
            f"{path} holds no weights (named tensors); it holds"
            f" {held[:200] or f'a {type(content).__name__}'}"
        )
    return found


def choose_weights(
    path: Path, states: Mapping[str, StateDict], model: nn.Module, weights: str | None = None
) -> FoundWeights:
    """Choose the weights that fit a network, among what `state_dicts` found.

    Prefixes that wrappers have added to all names are found by comparing names with those of the
    network, which may be wrapped as well. If several sets fit, the only one that is not a running
    average is chosen, unless ``weights`` is a `FoundWeights.name` or a part of one.

    Raises:
        InputError: No set fits, or several fit and none can be preferred.
    """
    own = _own_tensors(model)
    every: list[FoundWeights] = []
    fitting: list[FoundWeights] = []
    for start in _starts(own):
        found = [f for place, s in states.items() for f in _candidates(place, s, start, own)]
        every += found if weights is None else _named(found, weights)
        fitting = [f for f in every if not _differences(f.tensors, own)]
        if fitting:
            break
    if not every:
        raise InputError(f"{path} has no weights named {weights}; it holds {describe(states)}")
    if not fitting:
        nearest = max(every, key=lambda f: len(own.keys() & f.tensors.keys()))
        name = f" {nearest.name}" if nearest.name else ""
        raise InputError(
            f"the weights{name} in {path} do not fit the network:"
            f" {_differences(nearest.tensors, own)}"
        )
    exact = [found for found in fitting if found.name == weights]
    chosen = exact[0] if exact else _main(fitting)
    if chosen is None:
        names = ", ".join(found.name or "those without a prefix" for found in fitting)
        raise InputError(
            f"{path} holds {len(fitting)} sets of weights that fit the network: {names}; choose one"
            " with --weights NAME"
        )
    # Other sets that fit are copies of the network, so they do not count as other numbers.
    copies = [found for found in fitting if found.within is chosen.within]
    beside = _num_numbers(chosen.within) - sum(_num_numbers(copy.tensors) for copy in copies)
    if weights is None and beside >= _num_numbers(chosen.tensors):
        raise InputError(
            f"in {path}, {chosen.name} fits the network, but may be a part of a larger one, since"
            f" the state_dict holds as many other numbers; pass --weights {chosen.name} to use it"
        )
    return chosen


def describe(states: Mapping[str, StateDict]) -> str:
    """Describe what `state_dicts` found: the places, and the number of tensors."""
    parts = [f"{place or 'a state_dict'} ({len(state)} tensors)" for place, state in states.items()]
    return _few(parts)


def check_state_dict(where: object, state: object) -> StateDict:
    """Return ``state``, the content of ``where``, if it is a state_dict of finite tensors.

    Raises:
        InputError: It is not.
    """
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{where} holds no weights; expected a state_dict of named tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{where} is not a state_dict: its entry {name!r} is a {type(tensor).__name__},"
                " not a tensor"
            )
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(
                f"{where}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device};"
                " only dense tensors of real numbers are handled"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{where}: tensor {name!r} has NaN or infinite values; train again with a lower"
                " learning rate, or take an earlier checkpoint"
            )
    return state


def load_weights(model: nn.Module, state: StateDict, path: Path) -> None:
    """Load weights into a network, which becomes float64 if any of them is.

    Raises:
        InputError: Names or shapes differ.
    """
    own = _own_tensors(model)
    state = _with_tied(state, own)
    differences = _differences(state, own)
    if differences:
        raise InputError(f"the weights in {path} do not fit the network: {differences}")
    # Copying float64 weights into a float32 network would round them.
    if any(tensor.dtype in (torch.float64, torch.complex128) for tensor in state.values()):
        model.double()
        for tensor in filter(torch.is_complex, own.values()):  # not changed by double()
            tensor.data = tensor.data.to(torch.complex128)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        first = first_line(error)
        raise InputError(f"the weights in {path} cannot be loaded: {first}") from error


def _own_tensors(model: nn.Module) -> StateDict:
    """The parameters and buffers of a network; shared ones are the same object."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _starts(own: StateDict) -> Iterator[str]:
    """The prefixes that a file may lack: none, or those that all names of the network share."""
    yield ""
    start, names = "", [name.split(".") for name in own]
    # Stops above a single layer, whose names would fit any other layer.
    while len({first for first, *_ in names}) == 1 and all(len(name) > 2 for name in names):
        start += f"{names[0][0]}."
        names = [name[1:] for name in names]
        yield start


def _candidates(place: str, state: StateDict, start: str, own: StateDict) -> Iterator[FoundWeights]:
    """Replace each prefix that is followed by a name of the network; none if there is none."""
    names = {name.removeprefix(start) for name in own}
    prefixes = {
        name[:end]: None  # a dictionary, which keeps their order
        for name in state
        for end in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[end:] in names
    }
    for prefix in prefixes or [""]:
        tensors = {
            start + name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        place_and_prefix = _joined(place, prefix.removesuffix("."))
        yield FoundWeights(place_and_prefix, _with_tied(tensors, own), state)


def _named(every: Sequence[FoundWeights], weights: str) -> list[FoundWeights]:
    """The sets whose names start with ``weights`` or, if there are none, contain it."""
    inside = [found for found in every if f"{found.name}.".startswith(f"{weights}.")]
    return inside or [found for found in every if f".{weights}." in f".{found.name}."]


def _main(fitting: Sequence[FoundWeights]) -> FoundWeights | None:
    """The first set if all are equal; otherwise the only one that is not an average, or None."""
    first, *others = fitting
    if all(
        torch.equal(tensor, other.tensors[name])
        for other in others
        for name, tensor in first.tensors.items()
    ):
        return first
    words = [set(re.split(r"[._-]", found.name.lower())) for found in fitting]
    plain = [found for found, named in zip(fitting, words, strict=True) if not named & _AVERAGED]
    return plain[0] if len(plain) == 1 else None


def _differences(state: StateDict, own: StateDict) -> str:
    """Describe how names and shapes differ from those of a network; empty if they fit."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and not is_lazy(tensor) and state[name].shape != tensor.shape
    ]
    kinds = [
        f"{name} {state[name].dtype} instead of {tensor.dtype}"
        for name, tensor in own.items()
        if name in state and state[name].is_complex() != tensor.is_complex()
    ]
    differences = [
        _listed("missing", [name for name in own if name not in state]),
        _listed("unexpected", [name for name in state if name not in own]),
        _listed("of another shape", shapes),
        _listed("of another kind", kinds),
    ]
    return "; ".join(filter(None, differences))


def _with_tied(state: StateDict, own: StateDict) -> StateDict:
    """Add the names of shared tensors, which some files contain only once."""
    twins = {id(own[name]): tensor for name, tensor in state.items() if name in own}
    tied = {name: twins[id(t)] for name, t in own.items() if name not in state and id(t) in twins}
    return {**state, **tied}


def _num_numbers(state: StateDict) -> int:
    """Return the total number of entries."""
    return sum(tensor.numel() for tensor in state.values())


def _joined(place: str, name: str) -> str:
    """Join two parts of a name, either of which may be empty."""
    return f"{place}.{name}" if place and name else place or name


def _listed(what: str, names: Sequence[str]) -> str:
    """Return the number of names and the first few."""
    return f"{len(names)} {what} ({_few(names)})" if names else ""


def _few(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
