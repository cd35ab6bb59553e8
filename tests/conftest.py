"""Settings of the whole test run."""

import os

# Threads that spin while they wait make a busy machine many times slower; said before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from hvpspec.zoo.datasets import FOLDERS, raw_files

# A shell has commands in the background ignore Ctrl-C, and what they start inherits that, so that
# tests of an interrupt would wait for their time limits.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: what is red was red before the change. To search anew, run with
# --hypothesis-profile default.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def _write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def write_idx() -> Callable[[Path, NDArray[np.uint8]], None]:
    return _write_idx


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder in torchvision's layout with random images, 210 and 60 of every class."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    for name in FOLDERS:
        train_images, train_labels, test_images, test_labels = raw_files(folder, name)
        for size, images_file, labels_file in (
            (210, train_images, train_labels),
            (60, test_images, test_labels),
        ):
            labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), size))
            images = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
            _write_idx(images_file, images)
            _write_idx(labels_file, labels)
    return folder
