"""Importing and calling a user's own code by its name, ``module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from operator import attrgetter
from pathlib import Path
from typing import cast

from hvpspec.errors import HvpspecError, InputError, type_and_line


def is_code_name(name: str) -> bool:
    """Return whether a name has the form ``module:callable``, so that resolving it runs code.

    >>> is_code_name("torchvision.models:resnet18"), is_code_name("mnist-sample")
    (True, False)
    """
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def call_by_name(name: str, arguments: Mapping[str, object]) -> object:
    """Import ``module:callable``, call it with keyword arguments and return what it returns.

    The callable may be dotted, such as ``networks:Net.small``. The current directory is searched
    last, after Python's usual path: a user's own file is found, but cannot shadow an installed
    package.

    Raises:
        InputError: The name is malformed, the module cannot be imported, it has no such callable,
            or the call fails.
    """
    function = find_by_name(name)
    if not callable(function):
        raise InputError(f"{name} is a {type(function).__name__}, which cannot be called")
    try:
        with _current_directory_last():
            return cast("Callable[..., object]", function)(**arguments)
    except HvpspecError:
        raise
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        cause = type_and_line(error)
        raise InputError(f"{name} failed when called as ({shown}): {cause}") from error


def find_by_name(name: str) -> object:
    """Import the object named ``module:name`` and return it.

    Raises:
        InputError: The name is malformed, the module cannot be imported, or it has no such name.
    """
    if not is_code_name(name):
        raise InputError(f"{name!r} is not of the form module:callable")
    module_name, _, path = name.partition(":")
    with _current_directory_last():
        try:
            module = importlib.import_module(module_name)
        # A script without a main guard may call sys.exit when imported.
        except (Exception, SystemExit) as error:
            cause = type_and_line(error)
            raise InputError(f"cannot import {module_name!r} of {name!r}: {cause}") from error
        try:
            return attrgetter(path)(module)  # may import, too, where a module loads names lazily
        except AttributeError as error:
            raise InputError(f"{module_name!r} has no {path!r}; check the name {name!r}") from error


def module_file(name: str) -> Path | None:
    """Return the file of the module in ``module:callable``, or None, without running it."""
    module_name, _, _ = name.partition(":")
    parts, path, spec = module_name.split("."), None, None
    with _current_directory_last():
        for i in range(len(parts)):
            # Not `importlib.util.find_spec`, which imports the parent packages.
            spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
            if spec is None:
                return None
            path = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


@contextmanager
def _current_directory_last() -> Iterator[None]:
    """Append the current directory to the import path inside the block."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        if here in sys.path:  # a user's module may have changed the path, too
            sys.path.remove(here)
