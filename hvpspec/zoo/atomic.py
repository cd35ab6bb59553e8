"""Write a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from hvpspec.errors import InputError


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place and move it there once it is safely on disk.

    Args:
        path: Where to; a file there is replaced, and keeps its content if anything fails.
        content: What to write.

    Raises:
        InputError: The path is a folder, or its folder is missing, full or not writable.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; name a file in a folder you can write to"
        ) from error
