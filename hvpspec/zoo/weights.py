"""Read foreign weights and put weights into a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hvpspec.errors import InputError, first_line
from hvpspec.zoo.safe_load import load_torch_file, require_file

StateDict = Mapping[str, torch.Tensor]

# Keys under which training scripts commonly keep the weights, and the prefixes that DataParallel
# and torch.compile put before every name.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")

_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


def read_weights_file(path: Path) -> object:
    """Read a ``.safetensors`` file or one of `torch.save`, without running code.

    Raises:
        InputError: The file is missing, broken or holds more than plain data.
    """
    if path.suffix != ".safetensors":
        return load_torch_file(path)
    require_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file ({error})") from error


def foreign_state_dict(path: Path, content: object) -> StateDict:
    """Find the weights in what a file of unknown origin holds.

    A bare state_dict is taken as it is, or out of a ``state_dict``, ``model_state_dict`` or
    ``model`` entry; the prefixes ``module.`` and ``_orig_mod.`` are removed where every name has
    them.

    Raises:
        InputError: There are no weights to be found.
    """
    if isinstance(content, Mapping):
        wrapped = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        content = wrapped[0] if wrapped else content
    return check_state_dict(path, content)


def check_state_dict(where: object, state: object) -> StateDict:
    """Refuse anything but finite tensors under names.

    Args:
        where: What holds them, for the message.
        state: What should be a state_dict.

    Raises:
        InputError: Not a state_dict, or a tensor is NaN or infinite.
    """
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{where} holds no weights; expected a state_dict of named tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{where} is no state_dict: its entry {name!r} is a {type(tensor).__name__},"
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
    """Put weights into a network, which becomes float64 if any of them is.

    The prefixes of DataParallel and torch.compile, ``module.`` and ``_orig_mod.``, are removed
    where every name has one that the network's own have not.

    Raises:
        InputError: Names or shapes differ.
    """
    own = model.state_dict(keep_vars=True)
    state = _with_tied(_without_prefixes(state, own), own)
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    differences = [
        _listed("missing", [name for name in own if name not in state]),
        _listed("unexpected", [name for name in state if name not in own]),
        _listed("of another shape", shapes),
    ]
    if any(differences):
        found = "; ".join(filter(None, differences))
        raise InputError(f"the weights in {path} do not fit the network: {found}")
    # Copying float64 weights into a float32 network would round them.
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        model.double()
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        first = first_line(error)
        raise InputError(f"the weights in {path} cannot be loaded: {first}") from error


def _without_prefixes(state: StateDict, own: Iterable[str]) -> StateDict:
    """Take off what a wrapper of the network has put before every name."""
    for prefix in _PREFIXES:
        if _all_start(state, prefix) and not _all_start(own, prefix):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _all_start(names: Iterable[str], prefix: str) -> bool:
    """Tell whether all names start with a prefix."""
    return all(name.startswith(prefix) for name in names)


def _with_tied(state: StateDict, own: Mapping[str, object]) -> StateDict:
    """Add the names of shared tensors that a file, such as safetensors, holds only once."""
    twins = {id(own[name]): tensor for name, tensor in state.items() if name in own}
    tied = {name: twins[id(t)] for name, t in own.items() if name not in state and id(t) in twins}
    return {**state, **tied}


def _listed(what: str, names: Sequence[str]) -> str:
    """Name the first few of many."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{more})" if names else ""
