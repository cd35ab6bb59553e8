"""Read files from strangers without running what they hold."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.serialization import safe_globals

from hvpspec.errors import InputError, first_line


class Unread:
    """Stands for an object that was not read: takes what it would be made of, and keeps nothing."""

    def __new__(cls, *_: object) -> Unread:
        """Make one of anything."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Leave out what the object would hold."""


#: What people keep beside weights: numbers and arrays of NumPy, paths, times, versions.
BESIDE_WEIGHTS = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *(f"{m}.{kind}Path" for m in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
    *(f"datetime.{kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")),
    "torch.torch_version.TorchVersion",
)


def require_file(path: Path) -> None:
    """Refuse a path that is not a file.

    Raises:
        InputError: Nothing is there, or a folder is.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")


def load_torch_file(path: Path, *, remedy: str, unread: Iterable[str] = ()) -> object:
    """Read what `torch.save` wrote: tensors, plain containers, strings and numbers, on the CPU.

    A pickle may name any function to be called when it is read. Files that do are refused, but for
    the functions and classes in ``unread``, such as ``numpy.dtype``: an `Unread` stands for what
    they would make.

    Raises:
        InputError: The file is missing, truncated, of another kind, or holds anything but plain
            data; ``remedy`` says how to save it so that it can be read.
    """
    require_file(path)
    try:
        with warnings.catch_warnings(), safe_globals([(Unread, name) for name in unread]):
            # PyTorch warns of TorchScript archives before it refuses them; the error is enough.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # these bytes are not a pickle
            raise _unreadable(path) from error
        raise InputError(
            f"{path} holds {_refused(error)}, which is not plain data, and was not read, since that"
            f" could run code; {remedy}"
        ) from error
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    # A broken file can fail anywhere in the reader, with any exception.
    except Exception as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{path} is a TorchScript archive, which is code; load it in Python with"
                " torch.jit.load and save its weights: torch.save(net.state_dict(), 'weights.pt')"
            ) from error
        raise _unreadable(path) from error


def _refused(error: pickle.UnpicklingError) -> str:
    """Name what PyTorch refused to make, from its message."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else f"what PyTorch refuses ({first_line(error)})"


def _unreadable(path: Path) -> InputError:
    """Say that a file was not written by `torch.save`."""
    size = path.stat().st_size
    return InputError(
        f"{path} ({size} bytes) is truncated, damaged, or not a PyTorch file;"
        " save or fetch it again"
    )
