"""Writing and reading checkpoints: a trained network and what is needed to rebuild it.

A checkpoint is a file of `torch.save` that contains plain data, see docs: Checkpoints. Reading one
never runs code that it contains or names: it is unpickled as plain data, and a network or data
source of the form ``module:callable`` is used only if the caller names it too.
"""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from hvpspec import __version__
from hvpspec.errors import InputError
from hvpspec.files import write_atomically
from hvpspec.results import Result, Row, Subject, plain, text_table
from hvpspec.zoo.datasets import Dataset, DataSource, load_data
from hvpspec.zoo.importing import is_code_name
from hvpspec.zoo.networks import NETWORKS, NetworkSpec, build_network
from hvpspec.zoo.training import TrainingHistory, TrainingSettings
from hvpspec.zoo.weights import (
    check_state_dict,
    choose_weights,
    describe,
    load_weights,
    read_weights_file,
    state_dicts,
)

FORMAT = "hvpspec-checkpoint"
VERSION = 1

#: Whether a network is put into eval mode or left in the modes in which it was built.
Mode = Literal["eval", "as given"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a network: a ``parameter`` or a ``buffer`` with ``count`` entries."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    kind: str


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Result):
    """A network with its weights, and their origin.

    Attributes:
        path: The file it was read from.
        model: The network, on the CPU, in eval mode unless it was read "as given".
        network: The name and arguments that build it.
        data: What it was trained on, if known.
        settings: How it was trained, if known.
        history: The result of training, if known.
        versions: Versions of the software that wrote it; empty for foreign weights.
        weights: Place of foreign weights in the file, such as ``state_dict.net``; None for a
            checkpoint, and if the file itself is the state_dict.
    """

    path: Path
    model: nn.Module
    network: NetworkSpec
    data: DataSource | None = None
    settings: TrainingSettings | None = None
    history: TrainingHistory | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: str | None = None

    @property
    def num_parameters(self) -> int:
        """Number of trainable and frozen parameters, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All parameters and buffers."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return tuple(
            TensorInfo(
                name,
                tuple(t.shape),
                str(t.dtype).removeprefix("torch."),
                t.numel(),
                "parameter" if name in parameters else "buffer",
            )
            for name, t in self.model.state_dict().items()
        )

    def load_data(
        self,
        source: str | None = None,
        *,
        data_dir: str | Path | None = None,
        subset: int | None = None,
    ) -> Dataset | Iterable[Any]:
        """Load the data that the network was trained on, or other data.

        Args:
            source: As for `hvpspec.zoo.load_data`; None for the recorded source.
            data_dir: Folder of the full data sets.
            subset: Number of first examples to use; None for the recorded number, or for all of
                another source.

        Raises:
            InputError: No data are recorded or given, the recorded source is code that the caller
                has not named, or the data cannot be loaded.
        """
        if source is not None:
            return load_data(source, data_dir=data_dir, subset=subset)
        if self.data is None:
            raise InputError(f"{self.path} does not say what it was trained on; pass --data")
        recorded = self.data
        subset = recorded.subset if subset is None else subset
        if is_code_name(recorded.source):
            remedy = f"--data {recorded.source}" + ("" if subset is None else f" --subset {subset}")
            raise InputError(
                f"{self.path} names the code {recorded.source} as its data; code that only a file"
                f" names is not run: pass {remedy} to allow it"
            )
        return load_data(recorded.source, split=recorded.split, data_dir=data_dir, subset=subset)

    def summary(self, *, subject: Subject | None = None, seconds: float | None = None) -> str:
        """What ``hvpspec info`` prints: where the network comes from, and its tensors."""
        tensors: list[Row] = [("tensor", "shape", "dtype", "count", "")]
        for t in self.tensors:
            shape = " × ".join(map(str, t.shape)) or "scalar"
            kind = "" if t.kind == "parameter" else t.kind
            tensors.append((t.name, shape, t.dtype, f"{t.count:>12,}", kind))
        about = super().summary(subject=subject, seconds=seconds)
        return f"{about}\n\n{text_table('', tensors)}"

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """The lines of the table, each a label and a value."""
        data, settings, history = self.data, self.settings, self.history
        training = ", ".join(f"{k}={v}" for k, v in asdict(settings).items()) if settings else ""
        rows: list[Row] = [
            ("network", str(self.network)),
            ("parameters", f"{self.num_parameters:,}"),
            ("data", str(data) if data else "not recorded"),
            ("training", training or "not recorded"),
        ]
        if history:
            accuracy = f", accuracy {history.accuracy:.2%}" if history.accuracy is not None else ""
            rows.append(("result", f"training loss {history.loss:.5g}{accuracy}"))
        if self.weights is not None:
            rows.append(("weights", self.weights))
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [*rows, ("written by", versions or "not recorded")]

    def _title(self) -> str:
        return str(self.path)

    def _content(self) -> dict[str, Any]:
        names = ("network", "num_parameters", "tensors", "data", "settings", "history")
        return {
            "format": "hvpspec-checkpoint-info",
            "version": 1,
            "file": str(self.path),
            **{name: plain(getattr(self, name)) for name in (*names, "versions", "weights")},
        }


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    network: NetworkSpec,
    *,
    data: DataSource | None = None,
    settings: TrainingSettings | None = None,
    history: TrainingHistory | None = None,
) -> None:
    """Write a checkpoint, atomically.

    Args:
        path: The file; an existing one is replaced.
        model: The network whose weights are written.
        network: The name and arguments that build it.
        data: What it was trained on.
        settings: How it was trained.
        history: The result of training.

    Raises:
        InputError: The file cannot be written, the network's arguments are not plain, or its
            weights are not finite.
    """
    path = Path(path)
    state = check_state_dict("the network", model.state_dict())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "network": _without_code(network),
        # Clones, since `torch.save` writes the whole storage of a view.
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in state.items()},
        "data": _without_code(data),
        "training": {"settings": _without_code(settings), "history": _without_code(history)},
        "versions": {
            "hvpspec": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    # In memory first: a failure of torch.save must not leave half a file.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(
    path: str | Path,
    *,
    net: str | None = None,
    net_arguments: Mapping[str, object] | None = None,
    weights: str | None = None,
    mode: Mode = "eval",
) -> Checkpoint:
    """Read a checkpoint, or foreign weights for a network that the caller names.

    Foreign weights are a ``.safetensors`` file, or a state_dict written by `torch.save`, alone or
    nested in dictionaries. The set that fits the network is used; prefixes that wrappers have added
    to all names are removed. If several sets fit, the one that is not a running average (``ema``,
    ``swa``) is used, unless ``weights`` names another.

    Args:
        path: The file.
        net: The network, as for `build_network`. Required for foreign weights, and if the
            checkpoint names a ``module:callable``, which is run only if it is named here too;
            otherwise it replaces the network in the checkpoint.
        net_arguments: Arguments of ``net``. By default those in the checkpoint, if it names the
            same network, or none.
        weights: The set of foreign weights to use: the entries that lead to it and the prefix of
            its names, joined by dots, such as ``params_ema`` or ``state_dict.net``; a part of this
            suffices if it is unique.
        mode: ``"eval"`` puts the network in eval mode, ``"as given"`` leaves each module in the
            mode in which it was built.

    Raises:
        InputError: The file is missing, damaged, of a newer version or not plain data; the network
            is not named or cannot be built; or the weights do not fit it or are not finite.
    """
    path = Path(path)
    if net_arguments is not None and net is None:
        raise InputError(f"network arguments {dict(net_arguments)} are given without --net")
    content = read_weights_file(path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        states = state_dicts(path, content)
        if net is None:
            raise InputError(
                f"{path} holds weights, {describe(states)}, but not the network they belong to;"
                f" pass --net, one of {', '.join(NETWORKS)} or module:callable"
            )
        network = NetworkSpec(net, dict(net_arguments or {}))
        model = build_network(network.name, network.arguments)
        chosen = choose_weights(path, states, model, weights)
        load_weights(model, check_state_dict(path, chosen.tensors), path)
        found = Checkpoint(path, model, network, weights=chosen.name or None)
    elif weights is None:
        found = _read_own(path, content, net, net_arguments)
    else:
        raise InputError(
            f"{path} is a checkpoint of hvpspec, with one set of weights; leave out"
            f" --weights {weights}"
        )
    if mode == "eval":
        found.model.eval()
    return found


def _read_own(
    path: Path,
    content: Mapping[str, Any],
    net: str | None,
    net_arguments: Mapping[str, object] | None,
) -> Checkpoint:
    """Build the network of a checkpoint in our format; code that only the file names is not run."""
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"{path} is a checkpoint of version {version}, but this hvpspec reads up to {VERSION};"
            " upgrade hvpspec"
        )
    try:
        if version != VERSION:
            raise TypeError(f"version is {version!r}")
        network = _record(NetworkSpec, content["network"])
        data = _record(DataSource, content["data"])
        settings = _record(TrainingSettings, content["training"]["settings"])
        history = _record(TrainingHistory, content["training"]["history"])
        versions = {str(key): str(value) for key, value in content["versions"].items()}
        if network is None:
            raise TypeError("no network")
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path} is a malformed checkpoint ({error}); save it again") from error
    if net is not None:
        if net_arguments is None:
            net_arguments = network.arguments if net == network.name else {}
        network = NetworkSpec(net, dict(net_arguments))
    elif network.name not in NETWORKS:
        raise InputError(
            f"{path} names the code {network.name} as its network; code that only a file names"
            f" is not run: pass --net {network.name} to allow it"
        )
    state = check_state_dict(path, content.get("state_dict"))
    model = build_network(network.name, network.arguments)
    load_weights(model, state, path)
    return Checkpoint(path, model, network, data, settings, history, versions)


def _without_code(
    record: NetworkSpec | DataSource | TrainingSettings | TrainingHistory | None,
) -> object:
    """Convert a record to types that JSON has, which can be read back without running code."""
    if record is None:
        return None
    try:
        return json.loads(json.dumps(asdict(record)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{record} cannot be saved: {error}; give plain values") from error


def _record(kind: type[_T], fields: object) -> _T | None:
    """Rebuild a dataclass from the plain data that it was saved as; None stays None."""
    if fields is None:
        return None
    if not isinstance(fields, Mapping):
        raise TypeError(f"{kind.__name__} is a {type(fields).__name__}")
    return kind(**fields)
