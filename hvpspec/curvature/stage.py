"""The stage that is set for a pass over the data, and tidied up after it whatever happens."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective

# The fields that every module has, which a forward pass has no business to change.
_FIELDS = frozenset(vars(nn.Module()))

# Values in which nothing can be kept.
_KEEP_NOTHING = frozenset({bool, int, float, str, type(None), torch.Size, torch.dtype, Tensor})

# What can be filled again, and how many entries of it are looked into.
_CONTAINERS = (list, dict, set, deque)
_MOST_ENTRIES = 100


@contextmanager
def stage(objective: Objective, seed: int) -> Iterator[None]:
    """Set the stage for a pass over the data, and leave everything as found, whatever happens.

    Every module is in the mode asked for and, after the pass, holds what it held before. Random
    states are seeded, with another seed on each pass: what is random in the model or the data
    differs from pass to pass and is found out, where a restored state would have repeated it.
    Gradients are on, and what makes a forward pass inexact or once-differentiable is off: autocast,
    the fused kernels of attention and cuDNN's of recurrent networks.

    Args:
        objective: whose model it is.
        seed: for this pass.
    """
    generators = objective.generators
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    default_dtype = torch.get_default_dtype()
    cache = parametrize._cache_enabled, parametrize._cache
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(objective.device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(as_found(objective.modules))
        if objective.is_recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if objective.is_compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            parametrize._cache_enabled, parametrize._cache = 0, {}
            for module in objective.modules:
                fields = vars(module)
                # Modules under torch.compile have no mode of their own.
                given = objective.training.get(id(module), fields.get("training", False))
                fields["training"] = given and objective.mode == "as given"
                for name in fields.keys() - _FIELDS:
                    if isinstance(fields[name], Tensor | list | tuple | dict):
                        fields[name] = _copied(fields[name], objective)
            if objective.dtype != objective.native_dtype == default_dtype:
                torch.set_default_dtype(objective.dtype)
            random.seed(seed)
            np.random.seed(seed)
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            torch.set_default_dtype(default_dtype)
            parametrize._cache_enabled, parametrize._cache = cache


@contextmanager
def as_found(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give every module back what it holds now, so that nothing stays of a forward pass.

    A cache of something computed from parameters is then computed anew each time.

    Args:
        modules: those of a model.
    """
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: dict[int, tuple[Any, Any]] = {}
    for module in modules:
        fields = vars(module)
        found.append((fields, fields.copy()))
        for name in fields.keys() - _FIELDS:
            if type(fields[name]) not in _KEEP_NOTHING:
                _note_contents(fields[name], contents)
    try:
        yield
    finally:
        for fields, before in found:
            _refill(fields, before)
        for container, content in contents.values():
            _refill(container, content)


def _note_contents(value: Any, contents: dict[int, tuple[Any, Any]], depth: int = 3) -> None:
    """Note what a list, dict, set, queue or object holds, and what these hold.

    Args:
        value: something that a forward pass may write into.
        contents: what is noted, by the identity of the container.
        depth: how far down it is looked; what is further from a module is no cache of its own.
    """
    if depth == 0 or type(value) in _KEEP_NOTHING or id(value) in contents:
        return
    if isinstance(value, tuple):
        entries: Iterable[Any] = value
    else:
        content = value if isinstance(value, _CONTAINERS) else _fields_of(value)
        if content is None or id(content) in contents:
            return
        contents[id(content)] = (content, copy.copy(content))
        entries = list(content.values() if isinstance(content, dict) else content)
        if len(entries) > _MOST_ENTRIES:  # tokens of a vocabulary, say, which hold nothing
            return
    for entry in entries:
        _note_contents(entry, contents, depth - 1)


def _fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of an object of a module's, in which something may be kept.

    Python's modules, classes and functions are shared by others, and PyTorch's objects are its own.
    """
    if isinstance(value, nn.Module | Tensor | type | ModuleType) or callable(value):
        return None
    if type(value).__module__.partition(".")[0] == "torch":
        return None
    return getattr(value, "__dict__", None)


def _refill(container: Any, content: Any) -> None:
    """Give a list, dict, set or queue the content that it had, if it has another."""
    if _identities(container) == _identities(content):
        return
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(content)
    else:
        container.update(content)


def _identities(container: Any) -> list[int]:
    """What a list, dict, set or queue holds, each by its identity."""
    values = container.values() if isinstance(container, dict) else ()
    return [id(entry) for entry in (*container, *values)]


def _copied(value: Any, objective: Objective) -> Any:
    """A copy of tensors that a module keeps as a plain attribute, as its parameters are copied.

    They are converted as these are, and what is written into them does not reach the caller's.
    """

    def copied(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            return tensor
        own = tensor.dtype == objective.native_dtype
        return tensor.to(objective.dtype if own else tensor.dtype, copy=True)

    return tree_map_only(Tensor, copied, value)


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules was given to torch.compile."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules)


def generators_of(device: torch.device, sources: Iterable[Any]) -> list[torch.Generator]:
    """Torch's own generators in use and those of data loaders, each once."""
    known = [torch.default_generator]
    if device.type == "cuda":
        known.append(torch.cuda.default_generators[device.index or 0])
    own = {
        id(generator): generator
        for source in sources
        for owner in (source, getattr(source, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    return [*known, *own.values()]
