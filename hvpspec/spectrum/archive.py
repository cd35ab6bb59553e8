"""Lanczos coefficients in a file: NumPy's npz without pickles, written whole or not at all."""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvpspec.errors import InputError, first_line
from hvpspec.files import write_atomically
from hvpspec.linalg.krylov import LanczosRun

_FORMAT = "hvpspec spectral measure 1"
_KINDS = {"lengths": "i8", "alphas": "f8", "betas": "f8", "norms": "f8", "exhausted": "?"}

#: Characters of what another library says of a damaged file.
_LONGEST_REASON = 200

#: What foreign bytes make zipfile and NumPy's reader raise.
_BROKEN = (
    EOFError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_runs(path: Path, runs: Sequence[LanczosRun], facts: Mapping[str, int | str]) -> None:
    """Write the coefficients of runs, without bases, and what else is known of them.

    The file is written beside its place and moved there once it is safely on disk.

    Args:
        path: a file there is replaced, and keeps its content if anything fails.
        runs: at least one.
        facts: scalars by name.

    Raises:
        InputError: the path is a folder, or its folder is missing, full or not writable.
    """
    arrays: dict[str, Any] = {
        "format": _FORMAT,
        **facts,
        "lengths": np.array([len(run.alphas) for run in runs], dtype=np.int64),
        "alphas": torch.cat([run.alphas for run in runs]).numpy(),
        "betas": torch.cat([run.betas for run in runs]).numpy(),
        "norms": np.array([run.norm for run in runs], dtype=np.float64),
        "exhausted": np.array([run.exhausted for run in runs], dtype=np.bool_),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer())


def read_runs(path: Path) -> tuple[tuple[LanczosRun, ...], dict[str, Any]]:
    """Read what :func:`write_runs` wrote, without unpickling anything.

    Returns:
        The runs and the facts.

    Raises:
        InputError: there is no such file, or it is damaged or of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    try:
        # Through zipfile, and not np.load, which would take a lone array or a pickle as well.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = {
                name.removesuffix(".npy"): np.lib.format.read_array(
                    io.BytesIO(archive.read(name)), allow_pickle=False
                )
                for name in archive.namelist()
            }
        facts = {name: array.item() for name, array in arrays.items() if name not in _KINDS}
        if facts.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        return _runs(arrays), facts
    except _BROKEN as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> InputError:
    """The error for a file that holds something else."""
    reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else first_line(error)
    if len(reason) > _LONGEST_REASON:  # NumPy repeats a header that it cannot read
        reason = f"{reason[:_LONGEST_REASON]} ..."
    return InputError(
        f"{path} is damaged or not a saved spectral measure ({reason}); compute and save it anew"
    )


def _runs(arrays: Mapping[str, NDArray[Any]]) -> tuple[LanczosRun, ...]:
    """The runs in the arrays of a file; ValueError or KeyError if there are none."""
    for name, kind in _KINDS.items():
        if arrays[name].ndim != 1 or arrays[name].dtype != np.dtype(kind):
            raise ValueError(f"{name!r} has another shape or type")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name!r} is not finite")
    lengths, alphas, betas, norms, exhausted = (arrays[name] for name in _KINDS)
    if not (len(lengths) == len(norms) == len(exhausted) > 0 and (lengths > 0).all()):
        raise ValueError("the number of runs is unclear")
    if not lengths.sum() == len(alphas) == len(betas):
        raise ValueError("the number of steps is unclear")
    if (betas < 0).any() or (norms <= 0).any():
        raise ValueError("a norm is negative")
    stops = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(alphas, stops), np.split(betas, stops), norms, exhausted, strict=True)
    return tuple(
        LanczosRun(torch.tensor(a), torch.tensor(b), float(norm), bool(end))
        for a, b, norm, end in pieces
    )
