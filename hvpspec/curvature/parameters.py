"""Which parameters span the space, and how they lie in one vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hvpspec.errors import InputError

#: One way to name parameters, see :func:`select_parameters`.
Selector = str | nn.Module | Tensor

#: Where a parameter or buffer is found: a module's fields, the key, and the name.
Slot = tuple[dict[str, Any], str, str]


@dataclass(frozen=True)
class ParameterSpace:
    """The selected parameters in the order in which they lie in a vector.

    Each parameter is flattened row by row; tied parameters appear once, under their first name.
    Complex ones count as pairs of real numbers, along a last dimension of 2.

    Attributes:
        names: the parameters' names in the model.
        shapes: their shapes.
        groups: for each selector the names it stands for.
        pairs: the names of those that are complex.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    pairs: frozenset[str] = frozenset()

    @cached_property
    def sizes(self) -> list[int]:
        """Number of entries of each parameter."""
        return [prod(shape) for shape in self.shapes]

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate one tensor per parameter into a vector of shape (dim,)."""
        return torch.cat([as_real(tensors[name]).reshape(-1) for name in self.names])

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Split rows of shape ``(..., dim)`` into tensors of shape ``(..., *parameter)``."""
        parts, batch = torch.split(vectors, self.sizes, dim=-1), vectors.shape[:-1]
        return {
            name: part.reshape((*batch, *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def aligned(space: ParameterSpace, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of vectors as derivatives by the parameters take them.

    Pairs that are to be complex numbers must begin at an even place in memory: they are copied.
    """
    return {name: part.clone() if name in space.pairs else part for name, part in parts.items()}


def as_real(tensor: Tensor) -> Tensor:
    """A tensor of real numbers, in pairs along a last dimension where they were complex."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def select_parameters(
    model: nn.Module,
    params: Selector | Iterable[Selector] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> ParameterSpace:
    """Select parameters of a model.

    Args:
        model: the network.
        params: None for all that require gradients, or one or several selectors: a parameter's
            name (``"head.weight"``), a shell pattern (``"*.bias"``), a submodule's name
            (``"head"``), a submodule, or a parameter itself. A frozen parameter is included if it
            is named.
        others: further parameters to choose from, by name, such as those of the loss.

    Returns:
        The selection in the order of ``model.named_parameters()``.

    Raises:
        InputError: a selector matches nothing, or nothing is left to differentiate.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> select_parameters(model, "*.bias").names
        ('0.bias', '2.bias')
    """
    parameters = {**dict(model.named_parameters()), **(others or {})}
    first_name = {id(p): name for name, p in parameters.items()}
    # Tied parameters are reached under every name they have, and kept under the first.
    canonical = {
        **{name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)},
        **{name: name for name in others or {}},
    }
    if params is None:
        chosen = tuple(name for name, p in parameters.items() if p.requires_grad)
        if not chosen:
            raise InputError(
                "the model has no parameter with requires_grad=True; name the frozen ones you mean "
                "with params=..."
            )
        groups: list[tuple[str, tuple[str, ...]]] = [("the model", chosen)]
    else:
        selectors = [params] if isinstance(params, Selector) else list(params)
        groups = [_match(model, selector, first_name, canonical) for selector in selectors]
        if not groups:
            raise InputError("params is empty; pass None for all trainable parameters")
    selected = {name for _, names in groups for name in names}
    names = tuple(name for name in parameters if name in selected)
    for name in names:
        dtype = parameters[name].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise InputError(
                f"parameter {name!r} has dtype {dtype}; only floating-point "
                "parameters can be differentiated, leave it out with params=..."
            )
    shapes = tuple(as_real(parameters[name]).shape for name in names)
    pairs = frozenset(name for name in names if parameters[name].is_complex())
    return ParameterSpace(names, shapes, tuple(groups), pairs)


def add_parts_(
    total: Tensor, space: ParameterSpace, parts: Mapping[str, Tensor], factor: float = 1.0
) -> None:
    """Add the parts of derivatives, times a factor, to their places in vectors (..., n)."""
    views = space.unflatten(total)
    for name, part in parts.items():
        views[name].add_(part.detach().view_as(views[name]), alpha=factor)


def places(model: nn.Module) -> list[Slot]:
    """Where each parameter and buffer of a model is found.

    A tied tensor has several places. A module that stands at several, as in
    ``Sequential(layer, layer)``, has each of its tensors in one.

    Args:
        model: the network.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> [(key, name) for _, key, name in places(nn.Sequential(layer, layer))]
        [('weight', '0.weight')]
    """
    # Where a tensor is both, what is differentiated counts.
    named = [*model.named_buffers(), *model.named_parameters()]
    names = {id(tensor): name for name, tensor in named}
    found: list[Slot] = []
    for prefix, module in model.named_modules():
        # Modules may override the methods that name their tensors.
        for fields in (module._parameters, module._buffers):
            for key, tensor in fields.items():
                if tensor is not None:
                    own = f"{prefix}.{key}" if prefix else key
                    found.append((fields, key, names.get(id(tensor), own)))
    return found


def _match(
    model: nn.Module,
    selector: Selector,
    first_name: Mapping[int, str],
    canonical: Mapping[str, str],
) -> tuple[str, tuple[str, ...]]:
    """Return a selector's own name and the canonical names of the parameters it stands for."""
    if isinstance(selector, nn.Module):
        label = type(selector).__name__
        names = [first_name.get(id(p), "") for p in selector.parameters()]
    elif isinstance(selector, Tensor):
        label = f"a tensor of shape {tuple(selector.shape)}"
        names = [first_name.get(id(selector), "")]
    elif isinstance(selector, str):
        label = repr(selector)
        names = [
            canonical[name]
            for name in canonical
            if name.startswith(f"{selector}.") or name == selector or fnmatchcase(name, selector)
        ]
    else:
        raise InputError(
            f"params takes names, patterns, modules and parameters, got {type(selector).__name__}"
        )
    if not names or not all(names):
        known = list(canonical)
        listed = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
        raise InputError(f"params: {label} matches no parameter of the model; it has {listed}")
    return label, tuple(dict.fromkeys(names))
