import hashlib
import os
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from hvpspec.zoo import SAMPLES, Dataset, load_data
from hvpspec.zoo.datasets import FOLDERS, Split
from tests.zoo.rebuild_samples import interleaved, main, read_split, rebuild

SHIPPED = resources.files("hvpspec.zoo.samples")

SHA256 = {
    "mnist-sample.npz": "c68af6a9dc3d454b94a8428855a4bcd402d4a4a0fd089a9d116ea6fb9b534be0",
    "fashion-mnist-sample.npz": "94e51e14c457b98737b73bf27662d21ad0fca713668fe2f0451fc1fbd94b2e70",
}


@pytest.mark.parametrize("file", SHA256)
def test_shipped_files_are_the_recorded_ones(file: str) -> None:
    found = hashlib.sha256((SHIPPED / file).read_bytes()).hexdigest()
    assert found == SHA256[file]
    assert f"{found}  {file}\n" in (SHIPPED / "SHA256SUMS").read_text()


def test_licences_are_shipped() -> None:
    mnist = (SHIPPED / "LICENSE-MNIST").read_text()
    assert "https://creativecommons.org/licenses/by-sa/3.0/" in mnist
    assert all(name in mnist for name in ("LeCun", "Cortes", "Burges", "Changes:"))
    fashion = (SHIPPED / "LICENSE-Fashion-MNIST").read_text()
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in fashion


@pytest.mark.parametrize("source", SAMPLES)
@pytest.mark.parametrize(("split", "size"), [("train", 2000), ("test", 500)])
def test_samples_are_balanced_in_every_prefix(source: str, split: Split, size: int) -> None:
    data = load_data(source, split=split)
    assert isinstance(data, Dataset)
    assert len(data) == size
    for n in (10, 137, size):
        counts = data.subset(n).targets.bincount(minlength=10)
        assert counts.max() - counts.min() <= (1 if n % 10 else 0)
    assert len(data.inputs.unique(dim=0)) >= size - 1  # no image twice, but for true duplicates


def test_rebuilding_is_reproducible_and_follows_the_file_order(
    idx_folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert rebuild(idx_folder, one) == rebuild(idx_folder, two)
    files = sorted(path.name for path in one.iterdir())
    assert files == ["SHA256SUMS", "fashion-mnist-sample.npz", "mnist-sample.npz"]
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
    with np.load(one / "mnist-sample.npz") as sample:
        images, labels = read_split(idx_folder, "mnist", "train")
        np.testing.assert_array_equal(sample["train_labels"], np.tile(np.arange(10), 200))
        np.testing.assert_array_equal(sample["train_images"][3::10], images[labels == 3][:200])
        assert sample["test_images"].shape == (500, 28, 28)


def test_the_choice_takes_the_first_of_each_class_in_turn() -> None:
    labels = np.array([*range(9, -1, -1), 0, *range(10)], dtype=np.uint8)
    chosen = interleaved(labels, 2)
    assert chosen.tolist() == [*range(9, -1, -1), 10, *range(12, 21)]


def test_command_line(idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data-dir", str(idx_folder), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == (tmp_path / "out" / "SHA256SUMS").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "not found" in capsys.readouterr().err


# The originals are not part of the project; where they are at hand, the shipped samples are checked
# against them.
_PLACES = [
    Path(os.environ.get("HVPSPEC_DATA") or "nowhere"),
    Path(__file__).parents[2].parent / "shared" / "data",
]
_ORIGINALS = [
    (place, name)
    for place in _PLACES
    for name, folder in FOLDERS.items()
    if (place / folder / "raw").is_dir()
]

if _ORIGINALS:

    @pytest.mark.parametrize(("place", "name"), _ORIGINALS)
    @pytest.mark.parametrize(("split", "per_class"), [("train", 200), ("test", 50)])
    def test_shipped_samples_are_of_the_originals(
        place: Path, name: str, split: Split, per_class: int
    ) -> None:
        images, labels = read_split(place, name, split)
        rows = interleaved(labels, per_class)
        file = SHIPPED / f"{name}-sample.npz"
        with file.open("rb") as stream, np.load(stream) as sample:
            np.testing.assert_array_equal(sample[f"{split}_images"], images[rows])
            np.testing.assert_array_equal(sample[f"{split}_labels"], labels[rows])
