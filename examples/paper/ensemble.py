"""Many networks trained together: one set of tensors, one step for all of them.

All networks see the same batches in the same order, and differ in their initial weights alone. Adam
works on each weight by itself, so that every network is trained as it would be alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from examples.paper.points import images_of, whole
from hvpspec import ComputationError, InputError, zoo

# Networks whose intermediate results are held at once.
_TOGETHER = 50
_EVALUATION_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """How an ensemble of CNNs is trained, by Adam.

    Attributes:
        data: name of the data set.
        activation: of the networks.
        count: how many, with the seeds 0 to count - 1 of their initial weights.
        images: trained on so many first training images.
        epochs: passes over these.
        batch_size: images in a step.
        lr: learning rate.
    """

    data: str
    activation: str
    count: int
    images: int
    epochs: int
    batch_size: int = 64
    lr: float = 1e-3


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Trained networks.

    Attributes:
        initial: their weights before, float32, shape (count, n).
        final: their weights after, float32, shape (count, n).
        losses: mean loss over the training images, shape (count,).
        accuracies: on these, shape (count,).
    """

    initial: Tensor
    final: Tensor
    losses: Tensor
    accuracies: Tensor


def trained_ensemble(
    settings: EnsembleSettings,
    *,
    out: Path,
    data_dir: Path | None,
    progress: Callable[[int, float], None] | None = None,
) -> Ensemble:
    """Train an ensemble, or go on where that was interrupted, or read it if it is done.

    After every epoch all there is goes into a file, from which training goes on as if it had not
    stopped.

    Args:
        settings: which.
        out: folder of the results; the file lies in ``checkpoints`` below it.
        data_dir: folder of the full data sets.
        progress: called after every epoch with its number and the mean loss of the networks, on the
            first 500 images.

    Raises:
        InputError: the data are not found or do not suffice, or the file cannot be used.
        ComputationError: a loss became NaN or infinite.
    """
    inputs, targets = images_of(settings.data, data_dir).subset(settings.images).tensors
    networks = [zoo.cnn(settings.activation, seed=seed) for seed in range(settings.count)]
    stacked, _ = stack_module_state(list[nn.Module](networks))
    weights = {name: p.detach().clone().requires_grad_() for name, p in stacked.items()}
    initial = _flat(weights)
    optimizer = torch.optim.Adam(weights.values(), lr=settings.lr)
    order = torch.Generator().manual_seed(0)
    path = out / "checkpoints" / f"{_stem(settings)}.pt"
    epochs_done = _restore(path, settings, weights, optimizer, order) if path.exists() else 0
    # A network whose own weights are never used.
    skeleton = zoo.cnn(settings.activation)

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of one network on a batch."""
        return F.cross_entropy(functional_call(skeleton, theta, (x,)), y)

    gradients = vmap(grad(loss), in_dims=(0, None, None), chunk_size=_TOGETHER)
    for epoch in range(epochs_done + 1, settings.epochs + 1):
        for rows in torch.split(
            torch.randperm(settings.images, generator=order), settings.batch_size
        ):
            detached = {name: p.detach() for name, p in weights.items()}
            found = gradients(detached, inputs[rows], targets[rows])
            for name, p in weights.items():
                p.grad = found[name]
            optimizer.step()
        _save(path, settings, weights, optimizer, order, epoch)
        if progress is not None:
            few = inputs[:_EVALUATION_BATCH], targets[:_EVALUATION_BATCH]
            progress(epoch, float(_evaluate(skeleton, weights, *few)[0].mean()))
    losses, accuracies = _evaluate(skeleton, weights, inputs, targets)
    if not bool(losses.isfinite().all()):
        raise ComputationError(
            f"training diverged: the loss of {int((~losses.isfinite()).sum())} of {settings.count}"
            f" networks is no finite number; lower the learning rate (lr is {settings.lr})"
        )
    return Ensemble(initial, _flat(weights), losses, accuracies)


def network_with(activation: str, theta: Tensor) -> nn.Module:
    """The CNN with given weights.

    Args:
        activation: of the network.
        theta: shape (n,).
    """
    model = zoo.cnn(activation)
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model


def _evaluate(
    skeleton: nn.Module, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean loss and the accuracy of every network, float64, each of shape (count,)."""

    def sums(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses, and number of images classified rightly."""
        logits = functional_call(skeleton, theta, (x,))
        return F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(dim=1) == y).sum()

    with torch.no_grad():
        parts = [
            vmap(sums, in_dims=(0, None, None), chunk_size=_TOGETHER)(weights, x, y)
            for x, y in zip(
                torch.split(inputs, _EVALUATION_BATCH),
                torch.split(targets, _EVALUATION_BATCH),
                strict=True,
            )
        ]
    losses, right = (torch.stack(list(part)).double().sum(0) for part in zip(*parts, strict=True))
    return losses / len(inputs), right / len(inputs)


def _flat(weights: dict[str, Tensor]) -> Tensor:
    """All weights, a network in a row."""
    return torch.cat([p.detach().flatten(1) for p in weights.values()], dim=1).clone()


def _stem(settings: EnsembleSettings) -> str:
    """A name for the file of an ensemble."""
    s = settings
    return (
        f"cnn-{s.activation}-{s.data}{s.images}-{s.count}together"
        f"-adam{s.lr:g}-batch{s.batch_size}-epochs{s.epochs}"
    )


def _save(
    path: Path,
    settings: EnsembleSettings,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    epoch: int,
) -> None:
    """Keep all that training needs to go on."""
    state = {
        "settings": asdict(settings),
        "epoch": epoch,
        "weights": {name: p.detach() for name, p in weights.items()},
        "optimizer": optimizer.state_dict(),
        "order": order.get_state(),
    }
    with whole(path) as temporary:
        torch.save(state, temporary)


def _restore(
    path: Path,
    settings: EnsembleSettings,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
) -> int:
    """Take up what a file keeps; return the epochs done."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["settings"] != asdict(settings):
            raise ValueError("it is of another ensemble")
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        order.set_state(state["order"])
        return int(state["epoch"])
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot use {path} ({error}); remove it, to train anew") from error
