"""Which options name files, and the refusal to write over what a command reads."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from typer.models import ArgumentInfo, ParameterInfo

from hvpspec.errors import InputError
from hvpspec.files import keep_apart

if TYPE_CHECKING:
    from hvpspec.zoo import Checkpoint


class Names(Enum):
    """What an option names, beside ``typer.Option`` in its annotation."""

    READ = "a file or data, also behind name="
    CODE = "code, if it has the form module:callable"
    WRITTEN = "a file"
    KEPT = "a folder, below which products are written and read"


#: Values of options, each behind the option as people write it.
Named = Sequence[tuple[str, Any]]


def named_by(command: Callable[..., None], options: Mapping[str, Any], kind: Names) -> Named:
    """Give what the options of a command name.

    Args:
        command: its options carry a `Names` in their annotations.
        options: their values, by the names of parameters.
        kind: which of them.
    """
    named: list[tuple[str, Any]] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        marks = get_args(parameter.annotation)
        value = options.get(name)
        if kind in marks and value is not None:
            (info,) = (mark for mark in marks if isinstance(mark, ParameterInfo))
            # Typer takes what stands first in an annotation for the option, not for a default.
            option = info.default if isinstance(info.default, str) else f"--{name}"
            shown = name.upper() if isinstance(info, ArgumentInfo) else option.replace("_", "-")
            named += [(shown, v) for v in (value if isinstance(value, list) else [value])]
    return named


def apart(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command refuse, before it does anything, to write over what it reads.

    Args:
        command: its options carry a `Names` in their annotations.
    """

    @wraps(command)
    def run(**options: Any) -> None:
        written = named_by(command, options, Names.WRITTEN)
        folders = named_by(command, options, Names.KEPT)
        if written or folders:
            from hvpspec.zoo.importing import is_code_name

            code = [n for n in named_by(command, options, Names.CODE) if is_code_name(n[1])]
            read = [*named_by(command, options, Names.READ), *code]
            keep_apart(_files_read(read, options.get("data_dir")), [*written, *folders])
            _keep_out(written, folders)
        command(**options)

    return run


def spare_recorded_data(trained: Checkpoint, data_dir: Path | None, written: Named) -> None:
    """Refuse to write over the data that a checkpoint says it was trained on.

    Args:
        trained: the checkpoint.
        data_dir: folder of the full data sets.
        written: the files that are written, each behind its option.

    Raises:
        InputError: one of them is a file of the data.
    """
    if trained.data is not None:
        from hvpspec.zoo import source_files

        files = source_files(trained.data.source, data_dir)
        keep_apart([(str(trained.path), file) for file in files], written)


def _files_read(read: Named, data_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """The files behind options, which name files, data or code."""
    from hvpspec.zoo import source_files

    for option, value in read:
        if isinstance(value, Path):
            yield option, value
        else:
            yield from ((option, f) for f in source_files(value.rpartition("=")[2], data_dir))


def _keep_out(written: Named, folders: Named) -> None:
    """Refuse files among the products, which are in folders below the one that is named."""
    for writer, target in written:
        place = os.path.dirname(os.path.realpath(target))
        for option, folder in folders:
            if place.startswith(os.path.join(os.path.realpath(folder), "")):
                raise InputError(
                    f"{target} ({writer}) lies where {option} {folder} keeps its products;"
                    " write to another folder"
                )
