"""Train a network to a point of its loss, reproducibly."""

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

_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. `dataclasses.asdict` gives plain data, ready for JSON.

    Attributes:
        optimizer: ``sgd``, ``adam``, or ``lbfgs``: in each step up to 20 iterations of L-BFGS
            with a line search for the strong Wolfe conditions. What L-BFGS learns of the curvature
            in one step it uses in the next, which only makes sense if a batch is all of the data.
        lr: Learning rate; None stands for 0.1 with ``sgd``, 0.001 with ``adam`` and 1 with
            ``lbfgs``, whose line search starts from it.
        momentum: Momentum of ``sgd``, in [0, 1).
        batch_size: Examples per step; with fewer, all of them.
        epochs: Passes over the data; 0 leaves the initial weights.
        l2: Factor λ of the term λ‖θ‖² in the objective, over all trainable parameters.
        seed: Seed of the order of the examples and of dropout.
        loss: ``cross_entropy`` or ``mse``, the mean over a batch.

    Raises:
        InputError: A value is out of its range.

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
    """What training came to.

    Attributes:
        epoch_losses: Mean of the objective over the steps of each epoch, each on its batch and
            before it is made, weighted by batch size.
        loss: Mean loss over the training data at the end, without the l2 term.
        accuracy: Fraction of the training data classified rightly, or None where the targets
            are not classes.

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
    """Build the loss that training minimises, a mean over the batch.

    Args:
        name: ``cross_entropy``, or ``mse``, which also averages over the outputs of an example.
        ignore_index: A class that does not count in the cross-entropy, as 255 marks it in many
            images; None for PyTorch's own, -100.

    Raises:
        InputError: Unknown name, or an ``ignore_index`` for another loss.

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
    """Train a model in place, from the weights it has.

    The objective is the mean loss plus l2 times the squared norm of all trainable parameters. Its
    batches are drawn anew in every epoch. On the same machine, the same seed gives the same
    weights, bit for bit. The model is left in eval mode and without gradients; the caller's random
    numbers are left alone.

    Args:
        model: The network. Floating-point inputs are cast to its dtype and moved to its device.
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
        """Give the parameters the gradient on ``rows``; L-BFGS asks for it again within a step."""
        optimizer.zero_grad()
        loss = _compare(criterion, _tensor(_outputs(model, inputs[rows])), targets[rows])
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
                    total += values[0] * len(rows)
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
    """Compute a model's mean loss over data and the fraction classified rightly.

    The model is evaluated in eval mode; its modes are left as found.

    Args:
        model: The network.
        data: Examples.
        loss: ``cross_entropy`` or ``mse``.

    Returns:
        The mean loss, and the accuracy in [0, 1] or None where the targets are not classes.

    Raises:
        InputError: The model cannot take the data.
    """
    inputs, targets = _for_model(model, data)
    criterion = build_loss(loss)
    # Targets may also be probabilities, which no prediction equals.
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
    """Say in plain words if a network, a loss and examples do not fit each other.

    They are tried in eval mode on one example and, where that fails for a loss which may be one of
    all examples together, on these.

    Args:
        model: The network; its modes are left as found.
        examples: Inputs and targets.
        loss: Of outputs and targets: one of `build_loss`, which takes a tensor, or any other, which
            takes whatever the network returns.
        whole: Whether only all examples together are tried, as those of a batch that may have
            another dimension first.

    Raises:
        InputError: One of them cannot take what it gets.
    """
    inputs, targets = _cast(model, examples)
    with torch.no_grad(), eval_mode(model):
        if not whole:
            try:
                _try(model, inputs[:1], targets[:1], loss)
            except InputError:
                if isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss):
                    raise
                whole = True
        if whole:
            _try(model, inputs, targets, loss)


def _try(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: Callable[[Any, Any], Any],
) -> None:
    """Raise InputError if a network cannot take inputs, or a loss what it returns."""
    outputs = _outputs(model, inputs)
    if isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss):
        _compare(loss, _tensor(getattr(outputs, "logits", outputs)), targets)
        return
    try:
        loss(outputs, targets)
    except HvpspecError:
        raise
    except Exception as error:  # a user's own code may fail in any way
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        shape = getattr(outputs, "shape", None)
        shown = f"a {type(outputs).__name__} as outputs"
        if shape is not None:
            shown = f"outputs of shape {tuple(shape)}"
        raise InputError(
            f"the loss {name} cannot take {shown} and targets of shape"
            f" {tuple(targets.shape)}, {targets.dtype}: {type_and_line(error)}"
        ) from error


def _tensor(outputs: object) -> torch.Tensor:
    """Refuse outputs that are not a tensor."""
    if not isinstance(outputs, torch.Tensor):
        raise InputError(f"the network returns a {type(outputs).__name__}; it must return a tensor")
    return outputs


def _optimizer(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Build the optimizer; the l2 term is in the objective, not in its weight decay."""
    assert settings.lr is not None  # __post_init__ has set it
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr)
    if settings.optimizer == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=settings.lr, line_search_fn="strong_wolfe")
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)


def _for_model(model: nn.Module, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Move data to the model's device and give real numbers its dtype."""
    if not isinstance(data, Dataset):
        raise InputError(
            f"data is a {type(data).__name__}; training needs a Dataset, all in memory"
        )
    return _cast(model, data.tensors)


def _cast(
    model: nn.Module, examples: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move inputs and targets to the model's device and give real numbers its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs, targets = (
        t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for t in examples
    )
    return inputs, targets


def _outputs(model: nn.Module, inputs: torch.Tensor) -> Any:
    """Run the model; a failure here means that it does not fit the data."""
    try:
        return model(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"the network cannot take inputs of shape {tuple(inputs.shape)}, {inputs.dtype}:"
            f" {first_line(error)}"
        ) from error


def _compare(criterion: nn.Module, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Apply the loss; a failure here means that the targets do not fit the outputs."""
    fit = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
    # Broadcasting (N, 1) against (N,) would compare every output with every target.
    if isinstance(criterion, nn.MSELoss) and outputs.shape != targets.shape:
        raise InputError(f"mse needs equal shapes, not {fit}; reshape the targets")
    try:
        loss: torch.Tensor = criterion(outputs, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"the loss cannot take {fit}, {targets.dtype}: {first_line(error).rstrip('.')}"
            f"{_remedy(criterion, outputs, targets)}"
        ) from error
    return loss


def _remedy(criterion: nn.Module, outputs: torch.Tensor, targets: torch.Tensor) -> str:
    """What helps where the cross-entropy cannot take its targets, if that can be told."""
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
    """Put every module into eval mode, and back into its own mode after the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finite(loss: float, epoch: int, settings: TrainingSettings) -> float:
    """Refuse a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise ComputationError(
            f"training diverged: the loss is {loss} in epoch {epoch};"
            f" lower the learning rate (lr is {settings.lr})"
        )
    return loss


def _is_real(value: object) -> TypeGuard[float]:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int) -> bool:
    """Tell whether a value is a whole number of at least so much."""
    return type(value) is int and value >= least
