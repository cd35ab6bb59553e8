"""Where a network is not twice differentiable: its kinks, and how far a point is from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hvpspec.curvature.graph import nodes
from hvpspec.curvature.stage import stage

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective

# Nodes of autograd's graph with kinks: what people call them, and what is smooth in their place.
_KINKS = {
    "Relu": ("ReLU", "Softplus, Tanh or GELU"),
    "LeakyRelu": ("LeakyReLU", "Softplus or GELU"),
    "PreluKernel": ("PReLU", "Softplus or GELU"),
    "RreluWithNoise": ("RReLU", "Softplus or GELU"),
    "Elu": ("ELU", "Softplus, Tanh or GELU"),  # its second derivative jumps, as that of SELU, CELU
    "Celu": ("CELU", "Softplus, Tanh or GELU"),
    "Hardtanh": ("Hardtanh or ReLU6", "Tanh or Softplus"),
    "Hardsigmoid": ("Hardsigmoid", "Sigmoid"),
    "Hardswish": ("Hardswish", "SiLU"),
    "Hardshrink": ("Hardshrink", "Tanhshrink"),
    "Softshrink": ("Softshrink", "Tanhshrink"),
    "Threshold": ("Threshold", "Softplus"),
    "Abs": ("an absolute value (L1 loss, Softsign)", "a squared error or Tanh"),
    "Sign": ("a sign", "Tanh"),
    "SmoothL1Loss": ("SmoothL1Loss", "MSELoss"),
    "HuberLoss": ("HuberLoss", "MSELoss"),
    "Clamp": ("a clamp", "Sigmoid or Softplus"),
    "ClampMin": ("a clamp", "Softplus"),
    "ClampMax": ("a clamp", "Softplus"),
    "MaxPool1DWithIndices": ("max-pooling", "average pooling"),
    "MaxPool2DWithIndices": ("max-pooling", "average pooling"),
    "MaxPool3DWithIndices": ("max-pooling", "average pooling"),
    "AdaptiveMaxPool2D": ("max-pooling", "average pooling"),
    "Max": ("a maximum", "logsumexp"),
    "Min": ("a minimum", "logsumexp"),
    "Amax": ("a maximum", "logsumexp"),
    "Amin": ("a minimum", "logsumexp"),
    "Maximum": ("a maximum", "logaddexp"),
    "Minimum": ("a minimum", "logaddexp"),
    "Fmax": ("a maximum", "logaddexp"),
    "Fmin": ("a minimum", "logaddexp"),
    "Cummax": ("a maximum", "logcumsumexp"),
    "Cummin": ("a minimum", "logcumsumexp"),
    "Median": ("a median", "a mean"),
    "Nanmedian": ("a median", "a mean"),
    "Kthvalue": ("a k-th value", "a smooth function of all entries"),
    "AdaptiveMaxPool3D": ("max-pooling", "average pooling"),
    "FractionalMaxPool2D": ("max-pooling", "average pooling"),
    "FractionalMaxPool3D": ("max-pooling", "average pooling"),
    "Sort": ("a sorting", "a smooth function of all entries"),
    "Topk": ("a choice of the largest", "a smooth function of all entries"),
}

# Functions with their kinks at 0, of which the distance is known.
_AT_ZERO = {
    F.relu, F.relu_, F.leaky_relu, F.elu, F.celu, F.selu, F.prelu, F.softsign,
    torch.relu, torch.relu_, torch.abs, torch.prelu, torch.celu, torch.selu,
    Tensor.relu, Tensor.relu_, Tensor.abs,
}  # fmt: skip


_AT_ZERO_NODES = {"Relu", "LeakyRelu", "PreluKernel", "Elu", "Celu", "Abs"}


@dataclass(frozen=True)
class Kink:
    """An operation that is not twice differentiable everywhere.

    Attributes:
        what: its name.
        where: the layer, or where it was found.
        instead: what is smooth in its place.
        is_at_zero: whether it lies where its argument is 0, so that the distance from it is known.
    """

    what: str
    where: str
    instead: str
    is_at_zero: bool

    def __str__(self) -> str:
        return f"{self.where} has kinks ({self.what}); use {self.instead}"


def kinks(objective: Objective) -> tuple[Kink, ...]:
    """The kinks on the way from the parameters to the loss, as the graph of a chunk has them.

    Args:
        objective: the function.
    """
    found: dict[str, Kink] = {}
    leaves = objective.leaves()
    point = objective.at()
    with point.terms(leaves) as terms:
        for term in terms:
            for node in nodes([term.value]):
                name = node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
                if name in _KINKS and name not in found:
                    what, instead = _KINKS[name]
                    where = _place(objective.model, what)
                    found[name] = Kink(what, where, instead, name in _AT_ZERO_NODES)
            break
    return tuple(found.values())


def _place(model: nn.Module, what: str) -> str:
    """The first layer of a kind, in words, or where else an operation is found."""
    kind = what.replace("max-pooling", "MaxPool")
    for name, module in model.named_modules():
        own = type(module).__name__
        if own in kind.split() or (kind == "MaxPool" and "MaxPool" in own):
            return f"layer {name!r}" if name else f"the network, {own},"
    return "the network or its loss"


class _Distance(TorchFunctionMode):
    """Notes the smallest absolute value of what enters a function with a kink at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.least = math.inf

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at the argument of a function, and run it."""
        if func in _AT_ZERO and args and isinstance(args[0], Tensor) and args[0].numel():
            self.least = min(self.least, float(args[0].detach().abs().min()))
        return func(*args, **(kwargs or {}))


def kink_distance(objective: Objective, theta: Tensor) -> float:
    """The smallest absolute value of what enters a kink at 0, over all examples.

    Args:
        objective: the function.
        theta: the point, shape (n,).

    Returns:
        That value; NaN where there are kinks elsewhere, as those of max-pooling.
    """
    distance = _Distance()
    tensors = objective.tensors(objective.leaves(theta))
    with stage(objective, 0), torch.no_grad(), distance:
        for batch in objective.data:
            objective.evaluate(batch, tensors)
    return distance.least if distance.least < math.inf else math.nan
