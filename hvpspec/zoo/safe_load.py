"""Reading untrusted files of `torch.save` without running code."""

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
    """A placeholder for an object that was not constructed; ignores its arguments and state."""

    def __new__(cls, *_: object) -> Unread:
        """Accept any arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Ignore the state of the object."""


#: What is often saved beside weights: numbers and arrays of NumPy, paths, times, versions.
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
    """Raise InputError if a path does not exist or is a folder."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")


def load_torch_file(path: Path, *, remedy: str, unread: Iterable[str] = ()) -> object:
    """Read what `torch.save` wrote: tensors, plain containers, strings and numbers, on the CPU.

    A pickle can name any function, to be called when it is read. Such files are refused, except for
    the functions and classes in ``unread``, such as ``numpy.dtype``, whose results are replaced by
    an `Unread`.

    Raises:
        InputError: The file is missing, truncated, has another format, or contains anything but
            plain data; then the message ends with ``remedy``, how to save it otherwise.
    """
    require_file(path)
    try:
        with warnings.catch_warnings(), safe_globals([(Unread, name) for name in unread]):
            # PyTorch warns about TorchScript archives and then refuses them; the error is enough.
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
    # A broken file can raise any exception in the reader.
    except Exception as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{path} is a TorchScript archive, which is code; load it in Python with"
                " torch.jit.load and save its weights: torch.save(net.state_dict(), 'weights.pt')"
            ) from error
        raise _unreadable(path) from error


def _refused(error: pickle.UnpicklingError) -> str:
    """Return what PyTorch refused to construct, from its message."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else f"what PyTorch refuses ({first_line(error)})"


def _unreadable(path: Path) -> InputError:
    """Return the error for a file that was not written by `torch.save`, or is damaged."""
    size = path.stat().st_size
    return InputError(
        f"{path} ({size} bytes) is truncated, damaged, or not a PyTorch file;"
        " save or fetch it again"
    )
