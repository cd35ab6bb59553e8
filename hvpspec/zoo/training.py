"""Reproducible training and evaluation of networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import nn

from hvpspec.errors import ComputationError, HvpspecError, InputError, first_line, type_and_line
from hvpspec.zoo.datasets import Dataset
from hvpspec.zoo.networks import check_seed, seeded

Optimizer = Literal["sgd", "adam", "lbfgs"]
Loss = Literal["cross_entropy", "mse"]
Progress = Callable[[int, float], None]

_DEFAULT_LR = {"sgd": 0.1, "adam": 1e-3, "lbfgs": 1.0}

#: The losses of `build_loss`, which take a tensor and average over single examples.
_PYTORCH_LOSSES = (nn.CrossEntropyLoss, nn.MSELoss)

# Bounds the memory for outputs, which changes no result beyond round-off.
_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. `dataclasses.asdict` gives plain data, ready for JSON.

    Attributes:
        optimizer: ``sgd``, ``adam``, or ``lbfgs``, which makes up to 20 L-BFGS iterations per step
            with a line search for the strong Wolfe conditions. L-BFGS uses curvature information of
            earlier steps, so it makes sense only if a batch contains all of the data.
        lr: Learning rate; None stands for 0.1 with ``sgd``, 0.001 with ``adam`` and 1 with
            ``lbfgs``, where it is the first step of the line search.
        momentum: Momentum of ``sgd``, in [0, 1).
        batch_size: Examples per step, at most all of them.
        epochs: Passes over the data; 0 leaves the initial weights.
        l2: Factor λ of the term λ‖θ‖² in the objective, over all trainable parameters.
        seed: Seed of the order of the examples and of dropout.
        loss: ``cross_entropy`` or ``mse``, the mean over a batch.

    Raises:
        InputError: A value is out of range.

    >>> TrainingSettings(optimizer="adam").lr
    0.001
    """

    optimizer: Optimizer = "sgd"
    lr: float | None = None
    momentum: float = 0.0
    batch_size: int = 64
    epochs: int = 20
    l2: float = 0.0
    seed: int = 0
    loss: Loss = "cross_entropy"

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", _DEFAULT_LR.get(self.optimizer))
        lr, momentum, l2 = self.lr, self.momentum, self.l2
        for name, valid, allowed in (
            ("optimizer", self.optimizer in get_args(Optimizer), "sgd, adam or lbfgs"),
            ("lr", _is_real(lr) and lr > 0, "a positive number"),
            ("momentum", _is_real(momentum) and 0 <= momentum < 1, "in [0, 1)"),
            ("l2", _is_real(l2) and l2 >= 0, "0 or a positive number"),
            ("batch_size", _is_whole(self.batch_size, 1), "a whole number, 1 or more"),
            ("epochs", _is_whole(self.epochs, 0), "a whole number, 0 or more"),
            ("loss", self.loss in get_args(Loss), "cross_entropy or mse"),
        ):
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")
        check_seed(self.seed)
        if self.optimizer != "sgd" and momentum != 0:
            raise InputError(
                f"momentum is {momentum}, but {self.optimizer} has none; use sgd or leave it out"
            )


@dataclass(frozen=True)
class TrainingHistory:
    """The result of training.

    Attributes:
        epoch_losses: For each epoch, the mean of the objective over its batches, each evaluated
            before the step and weighted by its size.
        loss: Mean loss over the training data at the end, without the l2 term.
        accuracy: Fraction of the training data classified correctly; None if the targets are not
            classes.

    Raises:
        InputError: A value is not a number.
    """

    epoch_losses: tuple[float, ...]
    loss: float
    accuracy: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epoch_losses", tuple(self.epoch_losses))
        for number in (*self.epoch_losses, self.loss, self.accuracy or 0.0):
            if not _is_real(number):
                raise InputError(f"a loss or accuracy is {number!r}; it must be a finite number")


def build_loss(name: Loss, *, ignore_index: int | None = None) -> nn.Module:
    """Build a loss, which is a mean over the batch.

    Args:
        name: ``cross_entropy``, or ``mse``, which also averages over the outputs of an example.
        ignore_index: A class that the cross-entropy ignores, often 255 in images; None for
            PyTorch's default, -100.

    Raises:
        InputError: The name is unknown, or ``ignore_index`` is given for another loss.

    >>> build_loss("mse")
    MSELoss()
    """
    if name not in get_args(Loss):
        raise InputError(f"loss is {name!r}; it must be cross_entropy or mse")
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(ignore_index=-100 if ignore_index is None else ignore_index)
    if ignore_index is not None:
        raise InputError(f"--ignore-index belongs to the cross_entropy, but the loss is {name}")
    return nn.MSELoss()


def train(
    model: nn.Module,
    data: Dataset,
    settings: TrainingSettings | None = None,
    *,
    progress: Progress | None = None,
) -> TrainingHistory:
    """Train a model in place, starting from its present weights.

    The objective is the mean loss plus l2 times the squared norm of all trainable parameters. The
    examples are shuffled in every epoch. On the same machine, the same seed gives the same weights,
    bit for bit. The model is left in eval mode and without gradients; the global random state is
    not changed.

    Args:
        model: The network. Inputs are moved to its device, and real ones are cast to its dtype.
        data: Training examples.
        settings: How to train; None for the defaults.
        progress: Called after every epoch with its number, from 1, and its mean objective.

    Raises:
        InputError: The model has nothing to train, or cannot take the data.
        ComputationError: The loss became NaN or infinite.
    """
    settings = settings or TrainingSettings()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the model has no trainable parameters; set requires_grad on some")
    inputs, targets = _for_model(model, data)
    criterion, optimizer = build_loss(settings.loss), _optimizer(parameters, settings)
    n, order = len(data), torch.Generator().manual_seed(settings.seed)
    values: list[float] = []

    def descend() -> float:
        """Compute the gradient on ``rows``; L-BFGS calls this several times in a step."""
        optimizer.zero_grad()
        loss: torch.Tensor = _compare(criterion, _outputs(model, inputs[rows]), targets[rows])
        if settings.l2:
            loss = loss + settings.l2 * sum(p.square().sum() for p in parameters)
        values.append(_finite(loss.item(), epoch, settings))
        torch.autograd.backward(loss)
        return values[-1]

    epoch_losses = []
    model.train()
    try:
        with seeded(settings.seed):
            for epoch in range(1, settings.epochs + 1):
                total = 0.0
                for rows in torch.split(torch.randperm(n, generator=order), settings.batch_size):
                    values.clear()
                    optimizer.step(descend)
                    total += values[0] * len(rows)  # the value before the step, the first of it
                epoch_losses.append(total / n)
                if progress:
                    progress(epoch, epoch_losses[-1])
    finally:
        model.zero_grad()
        model.eval()
    loss, accuracy = evaluate(model, data, loss=settings.loss)
    return TrainingHistory(tuple(epoch_losses), _finite(loss, settings.epochs, settings), accuracy)


def evaluate(
    model: nn.Module, data: Dataset, *, loss: Loss = "cross_entropy"
) -> tuple[float, float | None]:
    """Compute a model's mean loss over data and the fraction classified correctly.

    The model is evaluated in eval mode; afterwards its modes are restored.

    Args:
        model: The network.
        data: Examples.
        loss: ``cross_entropy`` or ``mse``.

    Returns:
        The mean loss, and the accuracy in [0, 1] or None if the targets are not classes.

    Raises:
        InputError: The model cannot take the data.
    """
    inputs, targets = _for_model(model, data)
    criterion = build_loss(loss)
    # Targets may also be class probabilities, for which there is no accuracy.
    classes = loss == "cross_entropy" and not targets.is_floating_point()
    total, right = 0.0, 0
    with torch.no_grad(), eval_mode(model):
        for rows in torch.split(torch.arange(len(data)), _EVALUATION_BATCH):
            x, y = inputs[rows], targets[rows]
            outputs = _tensor(_outputs(model, x))
            total += _compare(criterion, outputs, y).item() * len(x)
            if classes:
                right += int((outputs.argmax(dim=1) == y).sum())
    return total / len(data), right / targets.numel() if classes else None


def check_fit(
    model: nn.Module,
    examples: tuple[torch.Tensor, torch.Tensor],
    loss: Callable[[Any, Any], Any],
    *,
    whole: bool = False,
) -> None:
    """Check that a network, a loss and examples fit each other.

    They are tried in eval mode on one example. If that fails, and the loss is a user's own, which
    may need all examples together, they are tried on all.

    Args:
        model: The network; its modes are restored.
        examples: Inputs and targets.
        loss: Function of outputs and targets: one of `build_loss`, which takes a tensor, or any
            other, which takes whatever the network returns.
        whole: Whether to try all examples at once only, since the first dimension may not count
            examples.

    Raises:
        InputError: The network cannot take the inputs, or the loss the outputs and targets.
    """
    inputs, targets = _cast(model, examples)
    with torch.no_grad(), eval_mode(model):
        for rows in [slice(None)] if whole else [slice(1), slice(None)]:
            try:
                _compare(loss, _outputs(model, inputs[rows]), targets[rows])
                return
            except InputError:
                if rows == slice(None) or isinstance(loss, _PYTORCH_LOSSES):
                    raise


def _tensor(outputs: object) -> torch.Tensor:
    """Return outputs that are a tensor or have one as logits; otherwise raise InputError."""
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, torch.Tensor):
        raise InputError(f"the network returns a {type(outputs).__name__}; it must return a tensor")
    return outputs


def _optimizer(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Build the optimizer; the l2 term is part of the objective, not weight decay."""
    assert settings.lr is not None  # __post_init__ has set it
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr)
    if settings.optimizer == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=settings.lr, line_search_fn="strong_wolfe")
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)


def _for_model(model: nn.Module, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Move a data set to the model's device, and cast real numbers to its dtype."""
    if not isinstance(data, Dataset):
        raise InputError(
            f"data is a {type(data).__name__}; training needs a Dataset, with all examples"
        )
    return _cast(model, data.tensors)


def _cast(
    model: nn.Module, examples: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move inputs and targets to the model's device, and cast real numbers to its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs, targets = (
        t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for t in examples
    )
    return inputs, targets


def _outputs(model: nn.Module, inputs: torch.Tensor) -> Any:
    """Evaluate the model; an exception means that it does not fit the data."""
    try:
        return model(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"the network cannot take inputs of shape {tuple(inputs.shape)}, {inputs.dtype}:"
            f" {first_line(error)}"
        ) from error


def _compare(loss: Callable[[Any, Any], Any], outputs: Any, targets: torch.Tensor) -> Any:
    """Evaluate the loss; an exception means that the targets do not fit the outputs."""
    if isinstance(loss, _PYTORCH_LOSSES):
        outputs = _tensor(outputs)
    shape = getattr(outputs, "shape", None)
    shown = f"a {type(outputs).__name__}" if shape is None else f"outputs of shape {tuple(shape)}"
    fit = f"{shown} and targets of shape {tuple(targets.shape)}"
    # Broadcasting (N, 1) against (N,) would compare every output with every target.
    if isinstance(loss, nn.MSELoss) and shape != targets.shape:
        raise InputError(f"mse needs equal shapes, not {fit}; reshape the targets")
    try:
        return loss(outputs, targets)
    except HvpspecError:
        raise
    except Exception as error:  # a user's own code may fail in any way
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        cause = type_and_line(error).rstrip(".")
        raise InputError(
            f"the loss {name} cannot take {fit}, {targets.dtype}: {cause}"
            f"{_remedy(loss, outputs, targets)}"
        ) from error


def _remedy(criterion: object, outputs: torch.Tensor, targets: torch.Tensor) -> str:
    """Return a remedy if the cross-entropy cannot take its targets and the cause is known."""
    if not isinstance(criterion, nn.CrossEntropyLoss) or targets.is_floating_point():
        return ""
    if outputs.ndim == 3 and targets.shape == outputs.shape[:-1]:
        return "; to predict the next token, pass --loss hvpspec:next_token_loss"
    num_classes = outputs.shape[1 if outputs.ndim > 1 else 0]
    beyond = torch.unique(targets[(targets < 0) | (targets >= num_classes)])
    beyond = beyond[beyond != criterion.ignore_index]
    if len(beyond) == 1:
        label = int(beyond)
        return f"; if {label} marks labels to be ignored, pass --ignore-index {label}"
    return ""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode inside the block, and restore its mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True  # not train(), which would change all submodules


def _finite(loss: float, epoch: int, settings: TrainingSettings) -> float:
    """Return a loss, or raise ComputationError if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise ComputationError(
            f"training diverged: the loss is {loss} in epoch {epoch};"
            f" lower the learning rate (lr is {settings.lr})"
        )
    return loss


def _is_real(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int) -> bool:
    """Return whether a value is a whole number, at least ``least``."""
    return type(value) is int and value >= least
