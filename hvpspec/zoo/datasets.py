"""Data sets by name, from a file, or from a user's own code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hvpspec.errors import InputError
from hvpspec.zoo.importing import call_by_name, is_code_name, module_file
from hvpspec.zoo.safe_load import load_torch_file, require_file

Split = Literal["train", "test"]

#: The names of the data sets in torchvision, of both classes and folders.
FOLDERS: Mapping[str, str] = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}

#: Types of a single array, as opposed to a container of arrays.
_ARRAY = (torch.Tensor, np.ndarray)

SAMPLES = tuple(f"{name}-sample" for name in FOLDERS)


@dataclass(frozen=True)
class DataSource:
    """The data that were used, as arguments of `load_data`.

    Attributes:
        source: Name, file or ``module:callable``.
        split: ``train`` or ``test``.
        subset: Number of first examples used, or None for all.

    Raises:
        InputError: A value has the wrong type.
    """

    source: str
    split: Split = "train"
    subset: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise InputError(f"source is {self.source!r}; it must be a name or path")
        if self.split not in get_args(Split):
            raise InputError(f"split is {self.split!r}; it must be 'train' or 'test'")
        if self.subset is not None and (type(self.subset) is not int or self.subset < 1):
            raise InputError(f"subset is {self.subset!r}; it must be a whole number, 1 or more")

    def __str__(self) -> str:
        first = f", first {self.subset:,} examples" if self.subset else ""
        return f"{self.source}, {self.split} split{first}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples and their targets, in memory.

    Attributes:
        name: The source.
        inputs: One row per example, (N, …).
        targets: Class numbers as int64, (N,), or values to be predicted, (N, …).

    Raises:
        InputError: There are no examples, lengths differ, or numbers are NaN or infinite.
    """

    name: str
    inputs: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim == 0 or self.targets.ndim == 0:
            raise InputError(f"{self.name}: inputs and targets need one row per example")
        if len(self.inputs) != len(self.targets):
            raise InputError(
                f"{self.name}: {len(self.inputs)} inputs but {len(self.targets)} targets;"
                " the two must agree"
            )
        if len(self.inputs) == 0:
            raise InputError(f"{self.name}: there are no examples")
        for what, tensor in (("inputs", self.inputs), ("targets", self.targets)):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise InputError(
                    f"{self.name}: {bad} of {tensor.numel()} numbers in {what} are NaN or infinite;"
                    " remove or replace them"
                )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair (inputs, targets)."""
        return self.inputs, self.targets

    def subset(self, n: int) -> Dataset:
        """Take the first n examples.

        In the bundled samples the classes alternate, so the first n examples are balanced.

        Raises:
            InputError: n is not a whole number from 1 to the number of examples.
        """
        if type(n) is not int or not 1 <= n <= len(self):
            raise InputError(
                f"subset is {n!r}; {self.name} has {len(self)} examples, so give 1 to {len(self)}"
            )
        return replace(self, inputs=self.inputs[:n], targets=self.targets[:n])


def load_data(
    source: str,
    *,
    split: Split = "train",
    data_dir: str | Path | None = None,
    subset: int | None = None,
) -> Dataset | Iterable[Any]:
    """Load data from a source.

    Args:
        source: One of:

            - ``mnist-sample``, ``fashion-mnist-sample``: 2,000 training and 500 test images,
              bundled.
            - ``mnist``, ``fashion-mnist``: 60,000 and 10,000 images, looked for in ``data_dir``,
              in the folder named by the environment variable ``HVPSPEC_DATA``, and in
              ``~/.cache/hvpspec/data`` (``$XDG_CACHE_HOME`` replaces ``~/.cache`` if set). If they
              are not found, they are downloaded to the last.
            - a path ending in ``.npz`` or ``.pt``: arrays named ``inputs`` and ``targets``, and for
              the test split ``test_inputs`` and ``test_targets``. Floating-point numbers are kept
              as they are; integers and booleans become int64.
            - ``module:callable``: called without arguments; returns a pair (inputs, targets) of
              tensors or arrays, a `Dataset`, or batches that can be iterated over repeatedly, such
              as a DataLoader. This runs code, so name only code you trust.
        split: ``train`` or ``test``. A ``module:callable`` has only the split ``train``.
        data_dir: Folder with ``MNIST/raw`` or ``FashionMNIST/raw``.
        subset: Number of first examples to use; None for all.

    Returns:
        A `Dataset`, or the user's own batches unchanged. Images have shape (N, 1, 28, 28), float32,
        in [0, 1].

    Raises:
        InputError: The source is unknown, missing or unreadable, lacks the split, contains NaN or
            infinite numbers, or has fewer examples than requested.

    >>> load_data("mnist-sample", subset=50).inputs.shape
    torch.Size([50, 1, 28, 28])
    """
    DataSource(source, split)  # which checks them
    label = source if split == "train" else f"{source} ({split})"
    data: Dataset | Iterable[Any]
    if source in SAMPLES:
        with np.load(_sample_file(source), allow_pickle=False) as arrays:
            data = _images(label, arrays[f"{split}_images"], arrays[f"{split}_labels"])
    elif source in FOLDERS:
        data = _images(label, *_read_full(source, split, data_dir))
    elif source.endswith((".npz", ".pt")):
        data = _read_file(Path(source), split, label)
    elif is_code_name(source):
        data = _call(source, split)
    else:
        names = ", ".join([*FOLDERS, *SAMPLES])
        raise InputError(
            f"unknown data {source!r}; give one of {names}, a .npz or .pt file, or module:callable"
        )
    if subset is None:
        return data
    if not isinstance(data, Dataset):
        raise InputError(f"subset is {subset!r}, but {source} gives batches; shorten them there")
    return data.subset(subset)


def source_files(source: str, data_dir: str | Path | None = None) -> list[Path]:
    """Return the files from which data or code with this name would be read; nothing is run.

    Args:
        source: As for `load_data`, or the name of any other file.
        data_dir: Folder with ``MNIST/raw`` or ``FashionMNIST/raw``.

    Raises:
        InputError: A folder that was named for a full data set does not exist.
    """
    if source in SAMPLES:
        return [_sample_file(source)]
    if source in FOLDERS:
        return [file for folder in _folders(data_dir) for file in raw_files(folder, source)]
    if is_code_name(source):
        file = module_file(source)
        return [] if file is None else [file]
    return [Path(source)] if os.path.isfile(source) else []


def cache_dir() -> Path:
    """Return the folder for downloads: ``hvpspec/data`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hvpspec" / "data"


def _images(label: str, images: NDArray[np.uint8], labels: NDArray[Any]) -> Dataset:
    """Convert bytes to numbers in [0, 1] and add a channel axis."""
    inputs = torch.from_numpy(images.astype(np.float32)).unsqueeze(1).div_(255)
    return Dataset(label, inputs, torch.from_numpy(labels.astype(np.int64)))


def _sample_file(source: str) -> Path:
    """Return the file of a bundled sample."""
    return Path(__file__).parent / "samples" / f"{source}.npz"


def _read_full(
    name: str, split: Split, data_dir: str | Path | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the images, (N, 28, 28), and labels, (N,), of a split; download them if necessary."""
    from torchvision import datasets

    kind, looked_in = getattr(datasets, FOLDERS[name]), list(_folders(data_dir))
    found = (f for f in looked_in if all(file.exists() for file in raw_files(f, name)))
    folder = next(found, None)
    if folder is None:
        folder = cache_dir()
        try:
            with redirect_stdout(sys.stderr):  # standard output belongs to the caller's results
                kind(folder, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            places = ", ".join(map(str, looked_in))
            raise InputError(
                f"{name} is not in {places}, and its download failed ({type(error).__name__}).\n"
                f"Put the four unpacked IDX files in DIR/{FOLDERS[name]}/raw and pass --data-dir"
                f" DIR or set HVPSPEC_DATA=DIR, or use {name}-sample, which is bundled."
            ) from error
    try:
        data = kind(folder, train=split == "train")
    # A broken file can raise any exception in torchvision's reader.
    except Exception as error:
        raw = folder / FOLDERS[name] / "raw"
        raise InputError(
            f"the {split} split in {raw} is broken ({type(error).__name__}); delete it, and unpack"
            " or fetch it again"
        ) from error
    # The arrays themselves; indexing the data set would convert one image at a time.
    images, labels = data.data.numpy(), data.targets.numpy()
    if images.shape[1:] != (28, 28):
        raise InputError(f"{folder} holds images of shape {images.shape}, not (N, 28, 28)")
    return images, labels


def raw_files(folder: Path, name: str) -> list[Path]:
    """Return the files of a data set in torchvision's layout."""
    raw = folder / FOLDERS[name] / "raw"
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return [raw / f"{split}-{kind}" for split in ("train", "t10k") for kind in kinds]


def _folders(data_dir: str | Path | None) -> Iterator[Path]:
    """Return the folders to search, in order; those that the user named must exist."""
    named = {"--data-dir": data_dir, "HVPSPEC_DATA": os.environ.get("HVPSPEC_DATA")}
    for origin, given in named.items():
        if given:
            folder = Path(given).expanduser()
            if not folder.is_dir():
                raise InputError(f"{origin} is {str(given)!r}, which is not a folder; correct it")
            yield folder
    yield cache_dir()


def _read_file(path: Path, split: Split, label: str) -> Dataset:
    """Read a user's own arrays."""
    prefix = "" if split == "train" else f"{split}_"
    names = (f"{prefix}inputs", f"{prefix}targets")
    if path.suffix == ".npz":
        found: object = _read_npz(path, names)
    else:
        remedy = f"save tensors alone: torch.save({{{names[0]!r}: x, {names[1]!r}: y}}, 'data.pt')"
        found = load_torch_file(path, remedy=remedy)
    if not isinstance(found, dict) or not all(name in found for name in names):
        held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path} has no {names[0]!r} and {names[1]!r}; it holds: {held[:200]}")
    return Dataset(label, *(_tensor(label, found[name]) for name in names))


def _read_npz(path: Path, names: tuple[str, str]) -> dict[str, Any]:
    """Read the named arrays of a NumPy archive; the others are None."""
    require_file(path)
    try:
        # Opened here, since NumPy does not close a broken file.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] if name in names else None for name in archive.files}
    # A broken archive can raise any exception in zipfile or NumPy; so can arrays of objects.
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as plain NumPy arrays ({error}); save them with numpy.savez"
        ) from error


def _call(source: str, split: Split) -> Dataset | Iterable[Any]:
    """Get data from a user's own code."""
    if split != "train":
        raise InputError(
            f"{source} has no {split} split; name the callable that returns those data"
        )
    data = call_by_name(source, {})
    if isinstance(data, Dataset):
        return data
    if (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(array, _ARRAY) for array in data)
    ):
        return Dataset(source, *(_tensor(source, array) for array in data))
    if isinstance(data, Iterator):
        raise InputError(
            f"{source} returned a {type(data).__name__}, which can be read only once;"
            " return a list of batches or a DataLoader"
        )
    if isinstance(data, Iterable) and not isinstance(data, _ARRAY):
        return data
    raise InputError(
        f"{source} returned a {type(data).__name__}; return (inputs, targets), a Dataset, or"
        " batches such as a DataLoader"
    )


def _tensor(label: str, array: object) -> torch.Tensor:
    """Convert an array to a tensor; real numbers keep their dtype, integers become int64."""
    try:
        # A copy, since PyTorch does not accept read-only arrays or negative strides.
        tensor = torch.as_tensor(array.copy() if isinstance(array, np.ndarray) else array).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{label}: inputs and targets must be arrays of numbers ({error})"
        ) from error
    if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(
            f"{label}: inputs or targets are {tensor.dtype}, {tensor.layout}, on {tensor.device};"
            " give dense arrays of real numbers"
        )
    return tensor if tensor.is_floating_point() else tensor.to(torch.int64)
