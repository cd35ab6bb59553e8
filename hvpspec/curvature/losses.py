"""What a loss averages over, so that batches of any size combine to the same mean."""

from __future__ import annotations

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

#: How it is known in what way the values of a loss over batches combine, see :func:`as_loss`.
Source = Literal["known", "declared", "assumed"]


@dataclass(frozen=True)
class Loss:
    """A loss with what its mean divides by.

    The loss over several batches is ``sum_b w_b L_b / sum_b w_b`` for a mean and ``sum_b L_b`` for
    a sum, where ``L_b = function(outputs, targets)`` on batch b and ``w_b = weight(outputs,
    targets)``. This is compared with the loss on parts of some batches before an answer is given.

    Attributes:
        function: takes the model's outputs and the targets of a batch, returns a scalar tensor.
        reduction: whether ``function`` returns the ``"mean"`` or the ``"sum"`` over a batch.
        weight: what the mean over a batch divided by; None for the number of examples. For
            targets that can be ignored: the number of those that count.
        convex: whether ``function`` is convex in the outputs for every target, which is what the
            structural bound on the index rests on. PyTorch's own losses need no such word.
        whole: whether the loss couples the examples, as a contrastive loss or the Dice loss does.
            The data must then be one batch, which is never cut.

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
    weight: Weight | None = None
    convex: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(
                "loss must be callable as loss(outputs, targets), got "
                f"{type(self.function).__name__}"
            )
        if self.reduction not in ("mean", "sum"):
            raise InputError(
                f"a loss needs reduction 'mean' or 'sum', got {self.reduction!r}: "
                "the Hessian is that of one number"
            )

    def evaluate(self, outputs: Any, targets: Any) -> Tensor:
        """The loss on a batch as a scalar tensor.

        Raises:
            InputError: the function returns something other than one number.
        """
        loss: Any = self.function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            own = loss is None and hasattr(outputs, "loss")
            remedy = "; the model's own loss needs the labels among its inputs, too" if own else ""
            raise InputError(f"the loss must return one number as a tensor, got {shape}{remedy}")
        return loss.reshape(())

    def batch_weight(self, outputs: Any, targets: Any, num_examples: int) -> float:
        """What batch b counts in the mean over all batches (1 for a sum)."""
        if self.reduction == "sum":
            return 1.0
        return float(num_examples if self.weight is None else self.weight(outputs, targets))


def as_loss(loss: Loss | nn.Module | Callable[[Any, Any], Tensor]) -> tuple[Loss, Source]:
    """Find out how the values of a loss over batches combine.

    Args:
        loss: a :class:`Loss`; a loss module of ``torch.nn`` or its function in
            ``torch.nn.functional`` (also in ``functools.partial`` with keywords); or any callable
            of outputs and targets that returns the mean over the examples of a batch.

    Returns:
        The loss, and where its rule comes from: "known" for a loss of PyTorch, "declared" for a
        :class:`Loss`, "assumed" for another callable, which is taken for a mean over examples.

    Raises:
        InputError: the loss is not callable, or reduces to something other than one number.
    """
    if isinstance(loss, Loss):
        if loss.weight is None and loss.reduction == "mean" and not loss.whole:
            within, source = as_loss(loss.function)
            if source == "known":
                return replace(within, convex=loss.convex), source
        return loss, "declared"
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
            return Loss(module), "known"
        return Loss(module, reduction, _KNOWN[type(module)][1](module)), "known"
    return Loss(module), "assumed"


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
        _require_tensors(module, outputs, targets)
        if not targets.is_floating_point() and outputs.ndim > 1:
            _refuse_classes_last(outputs, targets)
        if targets.is_floating_point():  # class probabilities: a mean over positions
            return float(outputs.numel() // outputs.shape[1 if outputs.ndim > 1 else 0])
        counted = targets[targets != module.ignore_index]
        if module.weight is None:
            return counted.numel()
        return float(module.weight.to(counted.device, torch.float64)[counted].sum())

    return weight


def _require_tensors(module: nn.Module, outputs: Any, targets: Any) -> None:
    """Raise InputError where a loss of PyTorch is given something else than tensors."""
    for what, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise InputError(
                f"{type(module).__name__} takes tensors, but the {what} are of type "
                f"{type(value).__name__}; pass a loss of (outputs, targets) that takes them apart"
            )


def _refuse_classes_last(outputs: Tensor, targets: Tensor) -> None:
    """Raise InputError where class indices do not fit outputs of shape (N, C, ...)."""
    shape = (outputs.shape[0], *outputs.shape[2:])
    if targets.shape == shape:
        return
    message = f"outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}; "
    if outputs.ndim > 2 and targets.shape == outputs.shape[:-1]:
        raise InputError(
            f"{message}the cross-entropy needs classes along dimension 1: use "
            "hvpspec.next_token_loss to predict the next token, or lambda out, y: "
            "F.cross_entropy(out.flatten(0, -2), y.flatten())"
        )
    raise InputError(f"{message}class indices of shape {shape} are needed")


def _element_weight(module: nn.Module) -> Weight:
    """The denominator of a loss that averages over all elements of the outputs."""

    def weight(outputs: Tensor, targets: Tensor) -> float:
        _require_tensors(module, outputs, targets)
        if outputs.shape != targets.shape:  # PyTorch would broadcast one against the other
            raise InputError(
                f"outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}; "
                f"{type(module).__name__} needs them alike, reshape one of them"
            )
        return float(outputs.numel())

    return weight


#: PyTorch's losses that can be differentiated twice: the function, and what the mean divides by.
_KNOWN: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[[Any], Weight | None]]] = {
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
    nn.MultiLabelSoftMarginLoss: (F.multilabel_soft_margin_loss, lambda _: None),
}
_MODULES: dict[Any, type[nn.Module]] = {function: kind for kind, (function, _) in _KNOWN.items()}


def _next_tokens(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in rows, with the token that follows each of them."""
    logits = getattr(outputs, "logits", outputs)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise InputError(
            f"the next-token loss takes logits of shape (b, T, V) and labels (b, T), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def _next_token_cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """The mean cross-entropy over all tokens but the first of each sequence."""
    logits, following = _next_tokens(outputs, labels)
    return F.cross_entropy(logits, following, ignore_index=_IGNORED)


def _num_next_tokens(outputs: Any, labels: Tensor) -> Tensor:
    """The number of tokens that count."""
    return (labels[:, 1:] != _IGNORED).sum()


#: What language models and PyTorch's cross-entropy call a label that does not count.
_IGNORED = -100

#: The loss of a causal language model: the mean cross-entropy of each token given those before it.
#: It takes logits of shape (b, T, V), or an output with an attribute ``logits``, and labels of
#: shape (b, T): the input tokens, or -100 where they do not count. It shifts them itself.
next_token_loss = Loss(_next_token_cross_entropy, weight=_num_next_tokens, convex=True)
