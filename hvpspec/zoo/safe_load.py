"""Read files from strangers without running what they hold."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch

from hvpspec.errors import InputError


def require_file(path: Path) -> None:
    """Refuse a path that is no file.

    Raises:
        InputError: Nothing is there, or a folder is.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")


def load_torch_file(path: Path) -> object:
    """Read what `torch.save` wrote: tensors, plain containers, strings and numbers, on the CPU.

    A pickle may name any function to be called when it is read. Those that do are refused, unread.

    Raises:
        InputError: The file is missing, truncated, of another kind, or holds anything but plain
            data.
    """
    require_file(path)
    try:
        with warnings.catch_warnings():
            # PyTorch warns of TorchScript archives before it refuses them; the error is enough.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # these bytes are no pickle
            raise _unreadable(path) from error
        raise InputError(
            f"{path} holds more than tensors and plain data, and was not read, since that could"
            " run code; save the model's state_dict() instead"
        ) from error
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    # A broken file can fail anywhere in the reader, with any exception.
    except Exception as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> InputError:
    """Say that a file is no file of `torch.save`."""
    size = path.stat().st_size
    return InputError(
        f"{path} ({size} bytes) is truncated, damaged, or no plain PyTorch file;"
        " save or fetch it again"
    )
