"""Files of results read back, those that an earlier program wrote, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hvpspec.errors import InputError, first_line
from hvpspec.results import FORMER_NAMES

# To the whole and to each layer.
_ADDED_TO_MEASURES = {"reorthogonalized": True}
#: The formats, and what was added to each within its version, as earlier files mean it.
_ADDED: Mapping[str, Mapping[str, bool | None]] = {
    "hvpspec-index": {"provenance": None},
    "hvpspec-density": {"provenance": None, "notes": None, "seconds": None},
    "hvpspec-measure": {
        "provenance": None,
        "notes": None,
        "gauss_newton": None,
        "seconds": None,
        **_ADDED_TO_MEASURES,
    },
    "hvpspec-eigs": {"provenance": None, "notes": None},
    "hvpspec-trace": {"provenance": None, "notes": None},
    "hvpspec-checkpoint-info": {"weights": None},
}
_VERSION = 1


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a file that ``--json`` wrote.

    Args:
        path: the file, of this version of hvpspec or an earlier one.

    Returns:
        Its fields by name, see docs: JSON; with those that a later program added, and methods by
        their present names.

    Raises:
        InputError: it cannot be read, is another kind of file, or of a later version.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # those of JSON and of UTF-8 are ValueErrors
        raise InputError(f"{path} is no JSON, or damaged: {first_line(error)}") from error
    kind = content.get("format") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _ADDED:
        raise InputError(
            f"{path} is no result of hvpspec: its format is {kind!r}, not one of "
            f"{', '.join(_ADDED)}"
        )
    version = content.get("version")
    if version != _VERSION or version is True:
        raise InputError(
            f"{path} is of version {version!r} of {kind}, and this hvpspec reads {_VERSION}; "
            "update hvpspec"
        )
    if kind == "hvpspec-measure":
        content = {**content, "layers": _completed(path, content.get("layers"))}
    method = content.get("method")
    if isinstance(method, str):
        content = {**content, "method": FORMER_NAMES.get(method, method)}
    return {**_ADDED[kind], **content}


def _completed(path: Path, layers: object) -> dict[str, Any] | None:
    """Layers with what was added to them as to the whole."""
    if layers is None:
        return None
    if not isinstance(layers, dict) or not all(isinstance(x, dict) for x in layers.values()):
        raise InputError(f"{path} is damaged: its layers are no objects by name")
    return {name: {**_ADDED_TO_MEASURES, **layer} for name, layer in layers.items()}


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which no result holds."""
    raise ValueError(f"it holds {constant}")
