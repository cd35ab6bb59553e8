"""How JSON is written, and how networks and settings are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hvpspec.files import write_atomically


def network_text(name: str, arguments: Mapping[str, object]) -> str:
    """Name a network with its arguments.

    >>> network_text("mlp2", {"activation": "tanh"})
    'mlp2 (activation=tanh)'
    """
    return f"{name} ({pairs(arguments)})" if arguments else name


def write_json(path: str | PathLike[str], content: Mapping[str, Any]) -> None:
    """Write plain data as JSON, whole or not at all.

    Args:
        path: the file; one that exists is replaced.
        content: finite numbers, strings, lists and mappings, such as ``result.to_dict()``.

    Raises:
        InputError: it cannot be written.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(path), f"{text}\n".encode())


def pairs(values: Mapping[str, object], joiner: str = "=") -> str:
    """List names with their values."""
    return ", ".join(f"{name}{joiner}{value}" for name, value in values.items())
