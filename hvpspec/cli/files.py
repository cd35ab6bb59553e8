"""The files that options name, which are checked before a command starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hvpspec.cli.options import File
from hvpspec.cli.processes import rank
from hvpspec.files import check_target, keep_apart

if TYPE_CHECKING:
    from hvpspec.zoo import Checkpoint


def written_files(
    command: Callable[..., None], options: Mapping[str, Any]
) -> Sequence[tuple[str, Path]]:
    """The files that a command will write, each after the option that names it."""
    marked = _marked(command, options)
    return [(flag, value) for flag, value, mark in marked if mark.use == "written"]


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command refuse to write files that it also reads or that cannot be written."""

    @wraps(command)
    def run(**options: Any) -> None:
        marked = list(_marked(command, options))
        targets = [(flag, value) for flag, value, mark in marked if mark.use != "read"]
        if targets:
            from hvpspec.zoo import source_files

            keep_apart(
                [
                    (flag, file)
                    for flag, value, mark in marked
                    if mark.use == "read"
                    # The value of --net-arg name=value may be a file, too.
                    for name in (str(value), str(value).partition("=")[2])
                    for file in source_files(name, options.get("data_dir"))
                ],
                targets,
            )
        if rank() == 0:
            for _, value, mark in marked:
                if mark.use == "written":
                    check_target(value, mark.suffixes)
        command(**options)

    return run


def spare_recorded_data(
    trained: Checkpoint, data_dir: Path | None, written: Sequence[tuple[str, Path]]
) -> None:
    """Raise InputError if a command would overwrite the data that a checkpoint was trained on."""
    if trained.data is not None:
        from hvpspec.zoo import source_files

        files = source_files(trained.data.source, data_dir)
        keep_apart([(str(trained.path), file) for file in files], written)


def _marked(
    command: Callable[..., None], options: Mapping[str, Any]
) -> Iterator[tuple[str, Any, File]]:
    """Each option that names a file as the user writes it, with its value and its mark."""
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        _, setting, *marks = get_args(parameter.annotation)
        value = options.get(name)
        if marks and isinstance(mark := marks[-1], File) and value is not None:
            # An argument has no flag; help pages show its name in capitals.
            flag = setting.default if isinstance(setting.default, str) else name.upper()
            for one in value if isinstance(value, list) else [value]:
                yield flag, one, mark
