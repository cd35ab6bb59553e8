"""Call a user's own code by its name, ``module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from hvpspec.errors import HvpspecError, InputError


def is_code_name(name: str) -> bool:
    """Tell whether a name has the form ``module:callable``, so that resolving it runs code.

    >>> is_code_name("torchvision.models:resnet18"), is_code_name("mnist-sample")
    (True, False)
    """
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def call_by_name(name: str, arguments: Mapping[str, object]) -> object:
    """Import ``module:callable``, call it with keyword arguments and return what it returns.

    Modules are looked for where Python looks and, last of all, in the current directory: a user's
    own file is found, but cannot shadow an installed package.

    Args:
        name: Such as ``torchvision.models:resnet18``; the callable may be dotted, as ``Net.small``.
        arguments: Keyword arguments.

    Raises:
        InputError: The name is malformed, the module cannot be imported, it has no such callable,
            or the call fails.
    """
    if not is_code_name(name):
        raise InputError(f"{name!r} is not of the form module:callable")
    with _current_directory_last():
        function = _resolve(name)
        try:
            return function(**arguments)
        except HvpspecError:
            raise
        except Exception as error:
            shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise InputError(f"{name} failed when called as ({shown}): {_short(error)}") from error


def _resolve(name: str) -> Callable[..., object]:
    """Import the module and look the callable up."""
    module_name, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    # A script without a main guard may call sys.exit when imported.
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot import {module_name!r} of {name!r}: {_short(error)}") from error
    try:
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except AttributeError as error:
        raise InputError(f"{module_name!r} has no {path!r}; check the name {name!r}") from error
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}, which cannot be called")
    return cast("Callable[..., object]", found)


@contextmanager
def _current_directory_last() -> Iterator[None]:
    """Let imports inside the block find modules of the current directory too."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _short(error: BaseException) -> str:
    """Name an exception and give the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
