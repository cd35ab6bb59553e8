"""Looking at a network without leaving a trace: its mode and every random state stay as found."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvpspec.errors import InputError


@contextmanager
def differentiable_forward(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch gradients on, and off whatever makes a forward pass inexact or once-differentiable.

    The fused kernels of attention and cuDNN's of recurrent networks have no double backward, so the
    plain ones are used; autocast would compute in another dtype than the operator says.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def random_states(seed: int, device: torch.device, sources: Iterable[Any]) -> Iterator[None]:
    """Seed all random states, and restore them afterwards.

    Every pass gets another seed: what is random in the model or the data then differs from pass to
    pass and is found out, where a restored state would have repeated it.

    Args:
        seed: for this pass.
        device: the accelerator whose state is kept as well.
        sources: data loaders, whose own generators are kept as well.
    """
    generators = list(_generators(device, sources))
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
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


def _generators(device: torch.device, sources: Iterable[Any]) -> Iterator[torch.Generator]:
    """Torch's own generators in use and those of data loaders, each once."""
    yield torch.default_generator
    if device.type == "cuda":
        yield torch.cuda.default_generators[device.index or 0]
    own = {
        id(generator): generator
        for source in sources
        for owner in (source, getattr(source, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    yield from own.values()


def check_mode(model: nn.Module) -> tuple[str, ...]:
    """Refuse what makes examples depend on each other, and say what is set to evaluation mode.

    Returns:
        Notes for the reader of a result.

    Raises:
        InputError: a normalisation layer uses the statistics of the batch.
    """
    notes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            per_example = isinstance(module, nn.modules.instancenorm._InstanceNorm)
            if per_example and not module.track_running_stats:
                continue
            if module.training and not per_example:
                raise InputError(
                    f"{type(module).__name__} {name!r} is in train mode: the loss of an example "
                    f"would "
                    "depend on its batch; call model.eval() to use the running statistics"
                )
            if module.running_mean is None:
                raise InputError(
                    f"{type(module).__name__} {name!r} has no running statistics, so the loss of "
                    f"an "
                    "example depends on its batch; build it with track_running_stats=True"
                )
            notes.append("normalisation layers use their running statistics (evaluation mode)")
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            notes.append("dropout is off")
    return tuple(dict.fromkeys(notes))
