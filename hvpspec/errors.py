"""The exceptions that hvpspec raises on purpose; any other exception is a bug.

Every message has one or two lines, which name the cause, the value and the remedy. The command line
prints it unchanged.
"""

from __future__ import annotations


class HvpspecError(Exception):
    """Base class of every error hvpspec raises on purpose."""


class InputError(HvpspecError, ValueError):
    """An argument, file or data set cannot be used as given (exit code 2 on the command line)."""


class ComputationError(HvpspecError, RuntimeError):
    """The inputs were accepted, but no correct result can be computed (exit code 1)."""


class NonFiniteError(ComputationError):
    """A loss, gradient or product is NaN or infinite."""


class DataChangedError(ComputationError):
    """The loss differs between two passes over the data, so the function is not well defined."""


class NotDifferentiableError(ComputationError):
    """The loss has no second derivative that PyTorch can compute with respect to the parameters."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def type_and_line(error: BaseException) -> str:
    """Return an error's type and, if it has a message, the first line of that."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"
