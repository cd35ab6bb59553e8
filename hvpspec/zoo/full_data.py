"""Find the full MNIST and Fashion-MNIST on disk, or download them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvpspec.errors import InputError
from hvpspec.zoo.idx import FOLDERS, Split, idx_files, read_split


def read_full(
    name: str, split: Split, data_dir: str | Path | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read all images, (N, 28, 28), and labels, (N,), of one split.

    They are looked for in ``data_dir``, in ``$HVPSPEC_DATA`` and in `cache_dir`, in this order, and
    otherwise downloaded to the last.

    Args:
        name: ``mnist`` or ``fashion-mnist``.
        split: ``train`` or ``test``.
        data_dir: Folder with ``MNIST/raw`` or ``FashionMNIST/raw``, if the user named one.

    Raises:
        InputError: A named folder does not exist, a file is broken, or nothing was found and the
            download failed.
    """
    looked_in = []
    for folder in folders(data_dir):
        if all(file.exists() for file in idx_files(folder, name, split)):
            return read_split(folder, name, split)
        looked_in.append(folder)
    _download(name, looked_in)
    return read_split(cache_dir(), name, split)


def cache_dir() -> Path:
    """Give the folder that downloads go to: ``hvpspec/data`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hvpspec" / "data"


def folders(data_dir: str | Path | None) -> Iterator[Path]:
    """Give the folders to look in, refusing those that the user named and that do not exist.

    Args:
        data_dir: The one named with the call, if any.

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


def _download(name: str, looked_in: list[Path]) -> None:
    """Let torchvision fetch the files into the cache."""
    from torchvision import datasets

    target = cache_dir()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):  # standard output belongs to the caller's results
            getattr(datasets, FOLDERS[name])(target, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        places = ", ".join(map(str, looked_in))
        raise InputError(
            f"{name} is not in {places}, and its download failed ({type(error).__name__}).\n"
            f"Put the four unpacked IDX files in DIR/{FOLDERS[name]}/raw and pass --data-dir DIR or"
            f" set HVPSPEC_DATA=DIR, or use {name}-sample, which is bundled."
        ) from error
