"""Rebuild the shipped samples from the original IDX files.

``python -m tests.zoo.rebuild_samples --data-dir DIR [--out DIR]`` takes the first 200 training
and 50 test images of every class, in file order, and writes them class by class in turn: 0, 1, …,
9, 0, 1, … Any first n of them are then as balanced as n allows. There is no chance in it: the same
IDX files give the same arrays, and with the same zlib the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision import datasets

from hvpspec.errors import InputError
from hvpspec.zoo.datasets import FOLDERS, Split

NUM_CLASSES = 10
SHIPPED = Path(__file__).parents[2] / "hvpspec" / "zoo" / "samples"
PER_CLASS: Mapping[Split, int] = {"train": 200, "test": 50}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.zoo.rebuild_samples",
        description="Rebuild the bundled samples from the IDX files of MNIST and Fashion-MNIST.",
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with MNIST/raw and FashionMNIST/raw"
    )
    parser.add_argument(
        "--out", type=Path, default=SHIPPED, help="where to write (default: in place)"
    )
    options = parser.parse_args(argv)
    try:
        print(rebuild(options.data_dir, options.out), end="")
    except (InputError, OSError, RuntimeError) as error:
        parser.error(str(error))


def rebuild(data_dir: Path, out: Path) -> str:
    """Write the samples and their ``SHA256SUMS``.

    Args:
        data_dir: Folder with ``MNIST/raw`` and ``FashionMNIST/raw``.
        out: Folder to write to, made if need be.

    Returns:
        The text of ``SHA256SUMS``.

    Raises:
        InputError: An IDX file is missing, broken or has too few images of a class.
    """
    out.mkdir(parents=True, exist_ok=True)
    sums = ""
    for name in FOLDERS:
        content = _npz(_sample(data_dir, name))
        (out / f"{name}-sample.npz").write_bytes(content)
        sums += f"{hashlib.sha256(content).hexdigest()}  {name}-sample.npz\n"
    (out / "SHA256SUMS").write_text(sums)
    return sums


def interleaved(labels: NDArray[np.uint8], per_class: int) -> NDArray[np.intp]:
    """Choose the first examples of every class, one class after the other in turn.

    Args:
        labels: Labels 0 to 9, (N,).
        per_class: How many of each class.

    Returns:
        Indices into ``labels``, (10 * per_class,).

    Raises:
        InputError: A class has too few examples.
    """
    chosen = []
    for label in range(NUM_CLASSES):
        (found,) = np.nonzero(labels == label)
        if len(found) < per_class:
            raise InputError(f"class {label} has {len(found)} examples; {per_class} are needed")
        chosen.append(found[:per_class])
    return np.stack(chosen, axis=1).ravel()


def read_split(
    data_dir: Path, name: str, split: Split
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images, (N, 28, 28), and labels, (N,), of one split."""
    found = getattr(datasets, FOLDERS[name])(data_dir, train=split == "train")
    return found.data.numpy(), found.targets.numpy().astype(np.uint8)


def _sample(data_dir: Path, name: str) -> dict[str, NDArray[np.uint8]]:
    """Select the images and labels of one data set."""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        images, labels = read_split(data_dir, name, split)
        rows = interleaved(labels, per_class)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[rows], labels[rows]
    return arrays


def _npz(arrays: Mapping[str, NDArray[np.uint8]]) -> bytes:
    """Pack arrays as NumPy does, with nothing of the day or the machine in the file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, array in arrays.items():
            plain = io.BytesIO()
            np.lib.format.write_array(plain, np.ascontiguousarray(array), version=(1, 0))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # otherwise the platform's own number
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, plain.getvalue(), compresslevel=9)
    return packed.getvalue()


if __name__ == "__main__":
    main()
