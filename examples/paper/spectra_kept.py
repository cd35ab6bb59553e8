"""Spectra that were computed once, and are kept for whoever asks again."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.paper.points import Point, hessian_at, images_of, network_at
from hvpspec.errors import InputError
from hvpspec.files import make_folder, write_atomically
from hvpspec.spectrum import IndexResult, index


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


def spectrum_path(point: Point, images: int, out: Path, matrix: str | None = None) -> Path:
    """Where the spectrum of a point's Hessian is kept, or that of another matrix there.

    Args:
        point: which.
        images: in the Hessian.
        out: folder of the results.
        matrix: a name for it; None for the Hessian.
    """
    name = f"{point.stem}-images{images}" + (f"-{matrix}" if matrix else "")
    return out / "spectra" / f"{name}.npz"


def read_spectrum(path: Path) -> Spectrum:
    """Read what :func:`save_spectrum` wrote.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            return Spectrum(torch.tensor(kept["eigenvalues"]), float(kept["noise_floor"]))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot use {path} ({error}); remove it, to compute it anew") from error


def save_spectrum(path: Path, result: IndexResult) -> None:
    """Keep all eigenvalues as ``eigenvalues`` (n,) in a ``.npz`` file, with ``noise_floor``.

    Args:
        path: the file; its folder is made if it is not there.
        result: of the exact method.

    Raises:
        InputError: it cannot be written.
    """
    assert result.eigenvalues is not None
    make_folder(path.parent)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        eigenvalues=result.eigenvalues.numpy(),
        noise_floor=np.float64(result.noise_floor),
    )
    write_atomically(path, buffer.getbuffer())
