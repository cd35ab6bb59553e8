"""Files that options name: none is written over what is read, all are checked before the work."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hvpspec.cli.options import Names
from hvpspec.cli.processes import rank
from hvpspec.errors import InputError
from hvpspec.files import check_target, keep_apart

if TYPE_CHECKING:
    from hvpspec.zoo import Checkpoint


#: Values of options, each behind the option as people write it.
Named = Sequence[tuple[str, Any]]


def named_by(command: Callable[..., None], options: Mapping[str, Any], use: str) -> Named:
    """The values of those options of a command that have a use, see `Names`."""
    return [
        (option, value) for option, value, names in _named(command, options) if names.use == use
    ]


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command refuse files before it does anything: those it reads, or could not write."""

    @wraps(command)
    def run(**options: Any) -> None:
        written, kept = (named_by(command, options, use) for use in ("written", "kept"))
        if written or kept:
            from hvpspec.zoo.importing import is_code_name

            code = [n for n in named_by(command, options, "code") if is_code_name(n[1])]
            read = [*named_by(command, options, "read"), *code]
            keep_apart(_files_read(read, options.get("data_dir")), [*written, *kept])
            _keep_out(written, kept)
        if rank() == 0:
            for _, value, names in _named(command, options):
                if names.use == "written":
                    check_target(value, names.suffixes)
        command(**options)

    return run


def spare_recorded_data(trained: Checkpoint, data_dir: Path | None, written: Named) -> None:
    """Raise InputError if a file to be written is one of the data that a checkpoint records."""
    if trained.data is not None:
        from hvpspec.zoo import source_files

        files = source_files(trained.data.source, data_dir)
        keep_apart([(str(trained.path), file) for file in files], written)


def _named(
    command: Callable[..., None], options: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Names]]:
    """Each option as people write it, one of its values, and what that names."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        marks = get_args(parameter.annotation)
        value = options.get(name)
        if isinstance(marks[-1], Names) and value is not None:
            # Typer takes what stands first in an annotation for the option, not for a default.
            flag = marks[1].default
            for one in value if isinstance(value, list) else [value]:
                yield flag if isinstance(flag, str) else name.upper(), one, marks[-1]


def _files_read(read: Named, data_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """The files behind options, which name files, data or code."""
    from hvpspec.zoo import source_files

    for option, value in read:
        if isinstance(value, Path):
            yield option, value
        else:
            yield from ((option, f) for f in source_files(value.rpartition("=")[2], data_dir))


def _keep_out(written: Named, kept: Named) -> None:
    """Refuse files among the products, which lie in folders below the one that is named."""
    for writer, target in written:
        place = os.path.dirname(os.path.realpath(target))
        for option, folder in kept:
            if place.startswith(os.path.join(os.path.realpath(folder), "")):
                raise InputError(
                    f"{target} ({writer}) lies where {option} {folder} keeps its products;"
                    " write to another folder"
                )
