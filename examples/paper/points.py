"""The points of a loss landscape that experiments look at, and the Hessian there."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.paper.pooling import FixedPooling
from hvpspec import zoo
from hvpspec.curvature import GGNOperator, HessianOperator
from hvpspec.curvature.choice import EngineName
from hvpspec.errors import InputError
from hvpspec.files import make_folder
from hvpspec.linalg import SymmetricOperator
from hvpspec.linalg.facts import PointFacts
from hvpspec.linalg.operator import Progress
from hvpspec.zoo.training import Optimizer

OperatorT = TypeVar("OperatorT", HessianOperator, GGNOperator)

#: The paper's networks, and with what it trained each.
OPTIMIZERS: Mapping[str, Optimizer] = {"cnn": "adam", "mlp2": "sgd", "mlp3": "sgd"}

# Images in one graph of the CNN: what is kept of them stays in the cache, which halves the time of
# a product.
_CNN_CHUNK = 100

# With so many images, what tracing takes is gained by faster products.
_TRACED = 2000


@dataclass(frozen=True)
class Protocol:
    """How the networks are trained, under a name; the optimizer is the paper's for each network.

    Attributes:
        name: what results call it.
        epochs: passes over the training data.
        batch_size: images per step.
        lr: learning rate by optimizer.
    """

    name: str
    epochs: int
    batch_size: int = 64
    lr: Mapping[str, float] = field(default_factory=lambda: {"adam": 1e-3, "sgd": 0.1})

    def for_epochs(self, epochs: int) -> Protocol:
        """The same, ended sooner or later."""
        return self if epochs == self.epochs else replace(self, epochs=epochs)

    def training(self, net: str) -> dict[str, Any]:
        """The fields of a `Point` that say how a network was trained."""
        if self.epochs == 0:
            return {"protocol": self.name, "epochs": 0}
        optimizer = OPTIMIZERS[net]
        return {
            "protocol": self.name,
            "epochs": self.epochs,
            "optimizer": optimizer,
            "lr": self.lr[optimizer],
            "batch_size": self.batch_size,
        }


#: The paper gives no epochs, rates or batches: these are common ones, and lower the loss far.
STANDARD = Protocol("standard", epochs=20)
#: What networks return.
HEADS = ("logits", "softmax")
#: To see everything work in minutes.
QUICK = Protocol("quick", epochs=3)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network's weights, by how they were come by.

    Attributes:
        net: ``cnn``, ``mlp2`` or ``mlp3``.
        data: the training data, a name that `hvpspec.zoo.load_data` knows.
        activation: of the network.
        seed: of the initial weights and the order of the images.
        epochs: of training; 0 for the initial weights.
        optimizer: None for the initial weights, as for the following.
        lr: learning rate.
        batch_size: images per step.
        head: what the network returns and the cross-entropy takes for logits: ``logits``, or
            ``softmax`` of them, once too often, with which the loss is not convex in the logits.
        protocol: the name of all this, by which no two points differ.
    """

    net: str
    data: str
    activation: str
    seed: int
    epochs: int
    optimizer: Optimizer | None = None
    lr: float | None = None
    batch_size: int | None = None
    head: str = "logits"
    protocol: str = field(compare=False)

    @property
    def state(self) -> str:
        """``trained``, or ``random`` for initial weights."""
        return "trained" if self.epochs else "random"

    @property
    def stem(self) -> str:
        """A name for files about this point."""
        parts = [self.net, self.activation, self.data, f"seed{self.seed}", self.state]
        if self.head != "logits":
            parts.insert(1, self.head)
        if self.epochs:
            parts += [f"{self.optimizer}{self.lr:g}", f"batch{self.batch_size}"]
            parts += [f"epochs{self.epochs}"]
        return "-".join(parts)


def network_at(
    point: Point,
    *,
    out: Path,
    data_dir: Path | None,
    l2: float = 0.0,
    milestones: Collection[int] = (),
) -> nn.Module:
    """Train the network of a point, or read it if that was done before.

    Args:
        point: which.
        out: folder of the results; checkpoints lie in ``checkpoints`` below it.
        data_dir: folder of the full data sets.
        l2: coefficient of the squared norm in what is minimised.
        milestones: epochs at which training passes by points that will be asked for, too.

    Raises:
        HvpspecError: the data are not found, a file cannot be used, or training diverged.
    """
    if point.head not in HEADS:
        raise InputError(f"head is {point.head!r}; it must be one of {', '.join(HEADS)}")
    softmax = {"softmax": True} if point.head == "softmax" else {}
    network = zoo.NetworkSpec(point.net, {"activation": point.activation, **softmax})
    model = zoo.build_network(network.name, network.arguments, seed=point.seed)
    if point.optimizer is None or point.batch_size is None:
        return model
    regularised = f"-l2{l2:g}" if l2 else ""

    def path_at(epochs: int) -> Path:
        """The checkpoint after so many epochs."""
        return out / "checkpoints" / f"{replace(point, epochs=epochs).stem}{regularised}.pt"

    if path_at(point.epochs).exists():
        return zoo.load_checkpoint(path_at(point.epochs)).model
    data = images_of(point.data, data_dir)
    settings = zoo.TrainingSettings(
        optimizer=point.optimizer,
        lr=point.lr,
        batch_size=point.batch_size,
        epochs=point.epochs,
        l2=l2,
        seed=point.seed,
    )
    make_folder(out / "checkpoints")

    def save(history: zoo.TrainingHistory) -> None:
        """Keep the weights after so many epochs as the history has."""
        epochs = len(history.epoch_losses)
        zoo.save_checkpoint(
            path_at(epochs),
            model,
            network,
            data=zoo.DataSource(point.data),
            settings=replace(settings, epochs=epochs),
            history=history,
        )

    objectives: list[float] = []

    def pass_by(epoch: int, objective: float) -> None:
        """Keep the weights at a milestone: the first epochs are those of a shorter training."""
        objectives.append(objective)
        if epoch in milestones and epoch < point.epochs:
            save(zoo.TrainingHistory(tuple(objectives), *zoo.evaluate(model, data)))

    save(zoo.train(model, data, settings, progress=pass_by))
    return model


@lru_cache(maxsize=2)
def images_of(data: str, data_dir: Path | None) -> zoo.Dataset:
    """Load the training images of a data set, once in a process for the last two asked for.

    Raises:
        InputError: they are not found, or the name is not one of a data set in memory.
    """
    found = zoo.load_data(data, data_dir=data_dir)
    if not isinstance(found, zoo.Dataset):
        raise InputError(f"{data} gives batches; experiments need all images in memory")
    return found


def hessian_at(
    model: nn.Module, data: zoo.Dataset, dtype: torch.dtype, *, l2: float = 0.0
) -> HessianOperator:
    """The Hessian of the mean cross-entropy over some images, plus ``l2 ‖θ‖²``.

    That of the CNN is computed as in :class:`FixedPooling`, which is the same up to round-off.

    Args:
        model: one of the paper's networks.
        data: the images.
        dtype: to compute in.
        l2: coefficient of the squared norm of the parameters.
    """
    near, examples, options = _prepared(model, data, dtype)
    return _reproducible(HessianOperator, near, examples, dtype, l2=l2, **options)


def gauss_newton_at(model: nn.Module, data: zoo.Dataset, dtype: torch.dtype) -> GGNOperator:
    """The Gauss-Newton part of `hessian_at`, computed in the same way.

    Args:
        model: one of the paper's networks.
        data: the images.
        dtype: to compute in.
    """
    near, examples, options = _prepared(model, data, dtype)
    return _reproducible(GGNOperator, near, examples, dtype, **options)


def _prepared(
    model: nn.Module, data: zoo.Dataset, dtype: torch.dtype
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The network or what equals it near its weights, its data, and how products are made."""
    engine = "double-backward" if len(data) < _TRACED else "linearised"
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model, data.tensors, {"engine": engine}
    # A copy, since near ties the dtype may decide which entry a pooling chooses.
    near = FixedPooling(copy.deepcopy(model).to(dtype))
    images, labels = data.tensors
    chunks = [near.inputs_for(chunk) for chunk in torch.split(images.to(dtype), _CNN_CHUNK)]
    inputs = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    options = {"chunk_size": _CNN_CHUNK, "engine": engine}
    return near, TensorDataset(*inputs, labels), options


def plain_hessian(
    model: nn.Module, data: Any, dtype: torch.dtype, *, l2: float = 0.0
) -> HessianOperator:
    """The Hessian of the mean cross-entropy plus ``l2 ‖θ‖²``, through the network as it is.

    Args:
        model: the network.
        data: as for `HessianOperator`.
        dtype: to compute in.
        l2: coefficient of the squared norm of the parameters.
    """
    return _reproducible(HessianOperator, model, data, dtype, l2=l2)


def _reproducible(
    kind: type[OperatorT],
    model: nn.Module,
    data: Any,
    dtype: torch.dtype,
    engine: EngineName = "double-backward",
    **options: Any,
) -> OperatorT:
    """An operator of the mean cross-entropy that gives the same bits again.

    Its products are made in one and the same way, whatever is fastest at the moment.
    """
    loss = nn.CrossEntropyLoss()
    return kind(model, loss, data, dtype=dtype, engine=engine, **options)


class Assembled(SymmetricOperator):
    """An operator whose matrix is there already: asked for again, it is not assembled again.

    Args:
        A: the operator, for products and facts.
        matrix: its matrix, shape (n, n).
    """

    _keeps_apart = True

    def __init__(self, A: SymmetricOperator, matrix: Tensor) -> None:
        super().__init__(A.shape[0], dtype=A.dtype, device=A.device)
        self._A, self._matrix = A, matrix

    @property
    def unit_roundoff(self) -> float:
        """That of the operator."""
        return self._A.unit_roundoff

    def check_symmetry(self) -> None:
        """Check the operator."""
        self._A.check_symmetry()

    def _matmat(self, V: Tensor) -> Tensor:
        return self._A.matmat(V)

    def to_dense(self, *, progress: Progress | None = None) -> Tensor:
        """A copy of the matrix."""
        return self._matrix.clone()

    def facts(self) -> PointFacts:
        """What is known of the operator."""
        return self._A.facts()
