"""The command line: options in, tables, pictures and files out.

Commands import PyTorch and the rest of the package only when they run, so that ``hvpspec --help``
is fast. ``main`` turns errors into one or two lines and an exit code.
"""

from hvpspec.cli.app import main

__all__ = ["main"]
