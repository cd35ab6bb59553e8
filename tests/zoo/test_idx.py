from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hvpspec.errors import InputError
from hvpspec.zoo.idx import idx_files, read_idx, read_split

Write = Callable[[Path, NDArray[np.uint8]], None]


def test_an_array_comes_back(tmp_path: Path, write_idx: Write) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x1f\x8b\x08\x00packed", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00", "not an IDX file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "announces 5 bytes of data but holds 3"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x02abc", "announces 2 bytes of data but holds 3"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "announces 79228162458924105385300197375 bytes"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_idx(tmp_path / "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nothing_here: No such file"):
        read_idx(tmp_path / "nothing_here")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((3, 28, 28), (4,), "holds 3 images, but t10k-labels-idx1-ubyte labels of shape .4,"),
        ((3, 28, 27), (3,), r"shape \(3, 28, 27\), not \(N, 28, 28\)"),
        ((3,), (3,), r"shape \(3,\), not"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, write_idx: Write, images: tuple[int], labels: tuple[int], message: str
) -> None:
    for file, shape in zip(idx_files(tmp_path, "mnist", "test"), (images, labels), strict=True):
        write_idx(file, np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=message):
        read_split(tmp_path, "mnist", "test")
