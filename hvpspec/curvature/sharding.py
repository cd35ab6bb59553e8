"""Models whose parameters are shared out among processes, as FSDP2 and tensor parallelism do.

Products need whole vectors, and so whole parameters: an operator gathers copies of them when it is
made. What is shared out stays so, and the model goes on training afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from hvpspec.errors import InputError

if TYPE_CHECKING:
    from hvpspec.linalg.ranks import Ranks

# Dicts of a module that hold hooks, by which the shards would be gathered and let go of.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_shard(tensor: Tensor) -> bool:
    """Whether a process has but a part of a tensor (a DTensor)."""
    # By a method, since loading the type takes longer than all else that is loaded here.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes where this one has but a part of it."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def shard(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def unmanaged(model: nn.Module) -> nn.Module:
    """Return the model as it computes with parameters that are handed to it.

    Where parameters are sharded, this is another tree of modules around the same parameters and
    buffers, without the hooks that would put others in their place. Else it is the model itself.

    Args:
        model: the network.

    Raises:
        InputError: it is no module, or wrapped in a way that cannot be undone here.
    """
    for name, module in model.named_modules():
        kind, where = type(module).__name__, f"its module {name!r}" if name else "it"
        if kind in ("DistributedDataParallel", "DataParallel"):
            raise InputError(
                f"the model cannot be differentiated twice while {where} is wrapped in {kind}; "
                "pass the .module inside, and group=... where processes share out the data"
            )
        if kind == "FullyShardedDataParallel":
            raise InputError(
                f"the model cannot be differentiated twice while {where} is wrapped in {kind}; "
                "shard it with torch.distributed.fsdp.fully_shard, or load its full state dict "
                "into a model that is not wrapped"
            )
    reshard(model)
    if not any(map(is_shard, model.parameters())):
        return model
    return _copy(model, {})


def reshard(model: nn.Module) -> None:
    """Let go of parameters that a forward pass has gathered, so that the model's own are seen."""
    for module in model.modules():
        # A user's own module may have a method of that name.
        if _is_distributed(type(module)) and hasattr(module, "reshard"):
            cast(Callable[[], None], module.reshard)()


def _copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Copy a tree of modules, but none of the tensors, without what manages shards."""
    if id(module) not in made:
        kind = next(c for c in type(module).__mro__ if not _is_distributed(c))
        copy: nn.Module = object.__new__(kind)
        made[id(module)] = copy
        fields: dict[str, Any] = dict(vars(module))
        for name in _HOOKS:
            own = ((k, h) for k, h in fields[name].items() if not _is_distributed(_owner(h)))
            fields[name] = OrderedDict(own)
        for name in ("_parameters", "_buffers"):
            fields[name] = dict(fields[name])
        children = fields["_modules"].items()
        fields["_modules"] = {name: child and _copy(child, made) for name, child in children}
        vars(copy).update(fields)
    return made[id(module)]


def _owner(hook: Any) -> Any:
    """What a hook belongs to: the class of a bound method's object, or the function itself."""
    return type(hook.__self__) if hasattr(hook, "__self__") else hook


def _is_distributed(thing: Any) -> bool:
    """Whether a class or function is a part of ``torch.distributed``."""
    return str(getattr(thing, "__module__", "")).startswith("torch.distributed.")


def refuse_other_networks(
    model: nn.Module, marks: Mapping[str, tuple[float, float]], ranks: Ranks
) -> None:
    """Raise InputError where processes that share the data have different networks.

    Args:
        model: as it was given.
        marks: of its parameters and buffers.
        ranks: the processes.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    shards = {name for name, t in tensors if is_shard(t)}
    own = {name: mark for name, mark in marks.items() if name not in shards}
    for rank, other in enumerate(ranks.gather(own)):
        differing = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        if differing:
            raise InputError(
                f"process {ranks.rank} has another {differing[0]} in the network than "
                f"process {rank}; send parameters and buffers of one to all with "
                "torch.distributed.broadcast"
            )
