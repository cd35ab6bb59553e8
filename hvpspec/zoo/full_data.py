"""Find the full MNIST and Fashion-MNIST on disk, or download them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hvpspec.errors import InputError

Split = Literal["train", "test"]

#: What torchvision calls the data sets: its classes, and its folders on disk.
FOLDERS: Mapping[str, str] = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def read_full(
    name: str, split: Split, data_dir: str | Path | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all images, (N, 28, 28), and labels, (N,), of one split.

    They are looked for in ``data_dir``, in ``$HVPSPEC_DATA`` and in `cache_dir`, in this order, and
    otherwise downloaded to the last.

    Raises:
        InputError: A named folder does not exist, a file is broken, or nothing was found and the
            download failed.
    """
    from torchvision import datasets

    kind, looked_in = getattr(datasets, FOLDERS[name]), list(folders(data_dir))
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
    # A broken file can fail anywhere in torchvision's reader, with any exception.
    except Exception as error:
        raw = folder / FOLDERS[name] / "raw"
        raise InputError(
            f"the {split} split in {raw} is broken ({type(error).__name__}); delete it, and unpack"
            " or fetch it again"
        ) from error
    images, labels = data.data.numpy(), data.targets.numpy()
    if images.shape[1:] != (28, 28):
        raise InputError(f"{folder} holds images of shape {images.shape}, not (N, 28, 28)")
    return images, labels


def raw_files(folder: Path, name: str) -> list[Path]:
    """The files of a data set in torchvision's layout below a folder."""
    raw = folder / FOLDERS[name] / "raw"
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return [raw / f"{split}-{kind}" for split in ("train", "t10k") for kind in kinds]


def cache_dir() -> Path:
    """Give the folder that downloads go to: ``hvpspec/data`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hvpspec" / "data"


def folders(data_dir: str | Path | None) -> Iterator[Path]:
    """Give the folders to look in, of which those that the user named must exist.

    Raises:
        InputError: A named folder does not exist.
    """
    named = {"--data-dir": data_dir, "HVPSPEC_DATA": os.environ.get("HVPSPEC_DATA")}
    for origin, given in named.items():
        if given:
            folder = Path(given).expanduser()
            if not folder.is_dir():
                raise InputError(f"{origin} is {str(given)!r}, which is not a folder; correct it")
            yield folder
    yield cache_dir()
