"""Read the IDX files in which MNIST and Fashion-MNIST are published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hvpspec.errors import InputError

Split = Literal["train", "test"]

# Folder names below the data folder; torchvision's classes carry the same names.
FOLDERS: Mapping[str, str] = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}

_PREFIXES: Mapping[str, str] = {"train": "train", "test": "t10k"}


def idx_files(data_dir: Path, name: str, split: Split) -> tuple[Path, Path]:
    """Give the paths of the images and the labels in torchvision's layout.

    Args:
        data_dir: The folder that holds ``MNIST/raw`` or ``FashionMNIST/raw``.
        name: One of `FOLDERS`.
        split: ``train`` or ``test``.
    """
    raw = data_dir / FOLDERS[name] / "raw"
    prefix = _PREFIXES[split]
    return raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"


def read_split(
    data_dir: Path, name: str, split: Split
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images, (N, 28, 28), and labels, (N,), of one split.

    Raises:
        InputError: A file is missing or broken, or their lengths differ.
    """
    images_file, labels_file = idx_files(data_dir, name, split)
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise InputError(f"{images_file} holds arrays of shape {images.shape}, not (N, 28, 28)")
    if labels.shape != images.shape[:1]:
        raise InputError(
            f"{images_file} holds {len(images)} images, but {labels_file.name} labels of shape"
            f" {labels.shape}; the two must agree"
        )
    return images, labels


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    The file starts with two zero bytes, the type (8: unsigned byte), the number of dimensions and
    each dimension as a big-endian 32-bit integer; the numbers follow, last index fastest.

    Raises:
        InputError: The file cannot be read, is no such file, or has not the length it announces.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise InputError(f"{path} is not an IDX file of unsigned bytes; unpack or fetch it again")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise InputError(
            f"{path} announces {expected} bytes of data but holds {len(content) - start};"
            " delete it and fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
