"""A spectral measure in a file: NumPy's npz without pickles, written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from hvpspec.errors import InputError, first_line
from hvpspec.files import write_atomically
from hvpspec.linalg.krylov import LanczosRun
from hvpspec.linalg.probes import ProbeKind

if TYPE_CHECKING:
    from hvpspec.spectrum.slq import SpectralMeasure

_FORMAT = "hvpspec spectral measure 1"
_KINDS = {"lengths": "i8", "alphas": "f8", "betas": "f8", "norms": "f8", "exhausted": "?"}
_DTYPES = {str(t): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}

#: Characters of what another library says of a damaged file; NumPy repeats what it cannot read.
_LONGEST_REASON = 200


def save_measure(measure: SpectralMeasure, path: Path) -> None:
    """Write the coefficients of the runs, and what else is known of the measure.

    Raises:
        InputError: the path is a folder, or its folder is missing, full or not writable.
    """
    runs = measure.runs
    arrays: dict[str, Any] = {
        "format": _FORMAT,
        "dim": measure.dim,
        "probes": measure.probes,
        "reorthogonalized": measure.reorthogonalized,
        "dtype": str(measure.dtype),
        "num_matvecs": measure.num_matvecs,
        "lengths": np.array([len(run.alphas) for run in runs], dtype=np.int64),
        "alphas": torch.cat([run.alphas for run in runs]).numpy(),
        "betas": torch.cat([run.betas for run in runs]).numpy(),
        "norms": np.array([run.norm for run in runs], dtype=np.float64),
        "exhausted": np.array([run.exhausted for run in runs], dtype=np.bool_),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer())


def load_measure(path: Path) -> dict[str, Any]:
    """Read the fields that :func:`save_measure` wrote, without unpickling anything.

    Raises:
        InputError: there is no such file, or it is damaged or of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    try:
        return _fields(dict(np.load(io.BytesIO(content), allow_pickle=False)))
    except Exception as error:  # NumPy and zipfile raise nearly anything for foreign bytes
        missing = isinstance(error, KeyError)
        reason = f"{error.args[0]!r} is missing" if missing else first_line(error)
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]} ..."
        raise InputError(
            f"{path} is damaged or not a saved spectral measure ({reason}); compute and save it "
            "anew"
        ) from error


def _fields(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The fields of a measure in the arrays of a file; any error if there are none."""
    facts = {name: array.item() for name, array in arrays.items() if name not in _KINDS}
    if facts["format"] != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT!r}")
    if facts["probes"] not in get_args(ProbeKind):
        raise ValueError(f"unknown probes {facts['probes']!r}")
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
    if int(facts["dim"]) < lengths.max():
        raise ValueError("a run is longer than the size of the operator")
    stops = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(alphas, stops), np.split(betas, stops), norms, exhausted, strict=True)
    return {
        "dim": int(facts["dim"]),
        "runs": tuple(
            LanczosRun(torch.tensor(a), torch.tensor(b), float(norm), bool(end))
            for a, b, norm, end in pieces
        ),
        "probes": facts["probes"],
        "reorthogonalized": bool(facts["reorthogonalized"]),
        "dtype": _DTYPES[facts["dtype"]],
        "num_matvecs": int(facts["num_matvecs"]),
    }
