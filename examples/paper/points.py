"""The points of a loss landscape that experiments look at, and the Hessian there."""

from __future__ import annotations

import copy
import os
import secrets
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.paper.pooling import FixedPooling
from examples.paper.results import Record
from hvpspec import GGNOperator, HessianOperator, IndexResult, InputError, index, zoo

Optimizer = Literal["sgd", "adam", "lbfgs"]

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
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)

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


PointT = TypeVar("PointT", bound=Point)


def runs_at_points(
    kind: type[PointT],
    nets: Sequence[str],
    data: Sequence[str],
    activations: Sequence[str],
    seeds: int,
    protocols: Sequence[Protocol],
    **settings: Any,
) -> list[PointT]:
    """List runs at all combinations of some points: all of the first seed, then of the next.

    Args:
        kind: of the runs.
        nets: names of networks.
        data: names of data sets.
        activations: of the networks.
        seeds: how many, from 0.
        protocols: of the training.
        settings: the other fields of the runs, which all of them share.
    """
    return [
        kind(
            net=net,
            data=source,
            activation=activation,
            seed=seed,
            **protocol.training(net),
            **settings,
        )
        for seed, net, source, activation, protocol in product(
            range(seeds), nets, data, activations, protocols
        )
    ]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all, whatever ends the program.

    Args:
        path: where the file is in the end; its folder is made if it is not there.

    Yields:
        Where to write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return HessianOperator(near, nn.CrossEntropyLoss(), examples, dtype=dtype, l2=l2, **options)


def gauss_newton_at(model: nn.Module, data: zoo.Dataset, dtype: torch.dtype) -> GGNOperator:
    """The Gauss-Newton part of `hessian_at`, computed in the same way.

    Args:
        model: one of the paper's networks.
        data: the images.
        dtype: to compute in.
    """
    near, examples, options = _prepared(model, data, dtype)
    return GGNOperator(near, nn.CrossEntropyLoss(), examples, dtype=dtype, **options)


def _prepared(
    model: nn.Module, data: zoo.Dataset, dtype: torch.dtype
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The network or what equals it near its weights, its data, and how products are made.

    A named engine gives the same bits in every run. What tracing costs is gained by faster products
    where there are many images.
    """
    engine = "double-backward" if len(data) < _TRACED else "linearised"
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model, data.tensors, {"engine": engine}
    # A copy, since near ties the dtype may decide which entry a pooling chooses.
    near = FixedPooling(copy.deepcopy(model).to(dtype))
    images, labels = data.tensors
    chunks = [near.inputs_for(chunk) for chunk in torch.split(images.to(dtype), _CNN_CHUNK)]
    inputs = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return near, TensorDataset(*inputs, labels), {"chunk_size": _CNN_CHUNK, "engine": engine}


@dataclass(frozen=True, eq=False)
class Spectrum:
    """All eigenvalues of a float64 matrix.

    Attributes:
        eigenvalues: ascending, float64, shape (n,).
        noise_floor: bound on the error of an eigenvalue.
    """

    eigenvalues: Tensor
    noise_floor: float

    @property
    def norm(self) -> float:
        """The largest absolute eigenvalue."""
        return float(self.eigenvalues[[0, -1]].abs().max())


def spectrum_at(point: Point, images: int, *, out: Path, data_dir: Path | None) -> Spectrum:
    """The spectrum of the Hessian at a point, read if it is kept, else computed and kept.

    Args:
        point: which.
        images: the Hessian is that of the mean loss over so many first training images.
        out: folder of the results.
        data_dir: folder of the full data sets.

    Raises:
        HvpspecError: the data are not found or do not suffice, training diverged, or the file
            cannot be used.
    """
    path = spectrum_path(point, images, out)
    if not path.exists():
        model = network_at(point, out=out, data_dir=data_dir)
        data = images_of(point.data, data_dir).subset(images)
        save_spectrum(path, index(hessian_at(model, data, torch.float64), method="exact"))
    return read_spectrum(path)


def spectrum_path(point: Point, images: int, out: Path, matrix: str = "hessian") -> Path:
    """Where the spectrum of a matrix at a point is kept, in ``spectra`` below ``out``."""
    name = f"{point.stem}-images{images}" + ("" if matrix == "hessian" else f"-{matrix}")
    return out / "spectra" / f"{name}.npz"


def read_spectrum(path: Path) -> Spectrum:
    """Read what :func:`save_spectrum` wrote.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            return Spectrum(torch.tensor(kept["eigenvalues"]), float(kept["noise_floor"]))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot use {path} ({error}); remove it, to compute it anew") from error


def save_spectrum(path: Path, result: IndexResult) -> None:
    """Keep all eigenvalues (n,), ascending, and the noise floor in a ``.npz`` file.

    Args:
        path: the file; its folder is made if it is not there.
        result: of the exact method.
    """
    assert result.eigenvalues is not None
    content = {"eigenvalues": result.eigenvalues, "noise_floor": np.float64(result.noise_floor)}
    with whole(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **content)


#: Further resolutions of an index, in units of the norm.
RATIOS = tuple(10.0**-k for k in range(10, 2, -1))


def index_record(result: IndexResult) -> Record:
    """What a line tells of an index.

    Args:
        result: of the exact method, for a float64 Hessian.
    """
    assert result.eigenvalues is not None  # the exact method has them
    ladder = result.curve(torch.tensor(RATIOS, dtype=torch.float64) * result.norm)
    return {
        "dtype": "float64",
        "method": result.method,
        "dim": result.dim,
        "tau": result.tau,
        "index": result.index,
        "raw_count": result.raw_count,
        "nullity": result.nullity,
        "grad_norm": result.gradient_norm,
        "loss": result.loss,
        "noise_floor": result.noise_floor,
        "norm": result.norm,
        "lambda_min": float(result.eigenvalues[0]),
        "lambda_max": float(result.eigenvalues[-1]),
        "bound": result.bound.upper if result.bound else None,
        "ladder": {
            f"{ratio:.0e}": int(count) for ratio, count in zip(RATIOS, ladder.counts, strict=True)
        },
    }
