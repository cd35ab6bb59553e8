"""What a loss averages over, so that batches of any size combine to the same mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpspec.errors import InputError

#: What the mean over a batch divided by, from its outputs and targets.
Weight = Callable[[Any, Any], "float | Tensor"]


def num_examples(outputs: Any, targets: Any) -> float:
    """The number of examples: the length of the targets, or of the outputs without targets."""
    return float(len(targets if isinstance(targets, Tensor) else outputs))


@dataclass(frozen=True)
class Loss:
    """A loss with what its mean divides by.

    The loss over several batches is ``sum_b w_b L_b / sum_b w_b`` for a mean and ``sum_b L_b`` for
    a sum, where ``L_b = function(outputs, targets)`` on batch b and ``w_b = weight(outputs,
    targets)``.

    Attributes:
        function: takes the model's outputs and the targets of a batch, returns a scalar tensor.
        reduction: whether ``function`` returns the ``"mean"`` or the ``"sum"`` over a batch.
        weight: what the mean over a batch divided by; the number of examples if not given. For
            targets that can be ignored: the number of those that count.
        convex: whether ``function`` is convex in the outputs for every target, which is what the
            structural bound on the index rests on. PyTorch's own losses need no such word.

    Example:
        A language model's loss, which shifts the labels and averages over tokens:

        >>> def next_token(logits, labels):
        ...     return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        >>> def num_tokens(logits, labels):
        ...     return (labels[:, 1:] != -100).sum()
        >>> loss = Loss(next_token, weight=num_tokens, convex=True)
    """

    function: Callable[[Any, Any], Tensor]
    reduction: Literal["mean", "sum"] = "mean"
    weight: Weight = num_examples
    convex: bool = False

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise InputError(
                f"a loss needs reduction 'mean' or 'sum', got {self.reduction!r}: "
                "the Hessian is that of one number"
            )

    def to(self, device: torch.device, dtype: torch.dtype) -> Loss:
        """Return the same loss with the tensors of a loss module (class weights) converted."""
        if not isinstance(self.function, nn.Module):
            return self
        return replace(self, function=copy.deepcopy(self.function).to(device=device, dtype=dtype))

    def evaluate(self, outputs: Any, targets: Any) -> Tensor:
        """The loss on a batch as a scalar tensor.

        Raises:
            InputError: the function returns something other than one number.
        """
        loss = self.function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss must return one number as a tensor, got {shape}")
        return loss.reshape(())

    def batch_weight(self, outputs: Any, targets: Any) -> float:
        """What batch b counts in the mean over all batches (1 for a sum)."""
        return float(self.weight(outputs, targets)) if self.reduction == "mean" else 1.0


def as_loss(loss: Loss | nn.Module | Callable[[Any, Any], Tensor]) -> tuple[Loss, bool]:
    """Find out how the values of a loss over batches combine.

    Args:
        loss: a :class:`Loss`; a loss module of ``torch.nn`` or its function in
            ``torch.nn.functional`` (also in ``functools.partial`` with keywords); or any callable
            of outputs and targets that returns the mean over the examples of a batch.

    Returns:
        The loss, and whether its rule was only assumed (the last case), so that the caller can
        check it on data.

    Raises:
        InputError: the loss is not callable, or reduces to something other than one number.
    """
    if isinstance(loss, Loss):
        return loss, False
    if not callable(loss):
        raise InputError(
            f"loss must be callable as loss(outputs, targets), got {type(loss).__name__}"
        )
    module = _as_module(loss)
    if isinstance(module, nn.BCELoss) or module is F.binary_cross_entropy:
        raise InputError(
            "PyTorch's second derivative of BCELoss is wrong where a sigmoid saturates; "
            "use BCEWithLogitsLoss on the logits"
        )
    if isinstance(module, nn.Module) and type(module) in _KNOWN:
        reduction: Any = module.reduction
        if reduction == "batchmean":  # KLDivLoss: a mean over the examples
            return Loss(module), False
        return Loss(module, reduction, _KNOWN[type(module)][1](module)), False
    return Loss(module), True


def _as_module(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the module that a function of torch.nn.functional stands for, else the loss."""
    keywords: dict[str, Any] = {}
    function = loss
    if isinstance(loss, partial) and not loss.args:
        function, keywords = loss.func, dict(loss.keywords)
    return _MODULES[function](**keywords) if function in _MODULES else loss


def _label_weight(module: Any) -> Weight:
    """The denominator of cross-entropy and negative log-likelihood, as PyTorch documents it."""

    def weight(outputs: Tensor, targets: Tensor) -> float:
        if targets.is_floating_point():  # class probabilities: a mean over positions
            return float(outputs.numel() // outputs.shape[1 if outputs.ndim > 1 else 0])
        counted = targets[targets != module.ignore_index]
        if module.weight is None:
            return counted.numel()
        return float(module.weight.to(counted.device, torch.float64)[counted].sum())

    return weight


def _element_weight(module: nn.Module) -> Weight:
    """The denominator of a loss that averages over all elements of the outputs."""

    def weight(outputs: Tensor, targets: Tensor) -> float:
        if outputs.shape != targets.shape:  # PyTorch would broadcast one against the other
            raise InputError(
                f"outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}; "
                f"{type(module).__name__} needs them alike, reshape one of them"
            )
        return float(outputs.numel())

    return weight


def _example_weight(module: nn.Module) -> Weight:
    """The denominator of a loss that averages over the examples of a batch."""
    return num_examples


#: PyTorch's losses that can be differentiated twice: the function, and what the mean divides by.
_KNOWN: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[[Any], Weight]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, _label_weight),
    nn.NLLLoss: (F.nll_loss, _label_weight),
    nn.MSELoss: (F.mse_loss, _element_weight),
    nn.L1Loss: (F.l1_loss, _element_weight),
    nn.SmoothL1Loss: (F.smooth_l1_loss, _element_weight),
    nn.HuberLoss: (F.huber_loss, _element_weight),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, _element_weight),
    nn.SoftMarginLoss: (F.soft_margin_loss, _element_weight),
    nn.KLDivLoss: (F.kl_div, _element_weight),
    nn.PoissonNLLLoss: (F.poisson_nll_loss, _element_weight),
    nn.MultiLabelSoftMarginLoss: (F.multilabel_soft_margin_loss, _example_weight),
}
_MODULES: dict[Any, type[nn.Module]] = {function: kind for kind, (function, _) in _KNOWN.items()}
