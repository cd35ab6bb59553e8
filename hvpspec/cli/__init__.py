"""The command line: options in, tables, pictures and files out.

Each command has a module of its own, which imports PyTorch and the rest only when it runs, so that
``hvpspec --help`` answers at once. Errors leave through ``main``, which turns them into one or two
lines and an exit code.
"""

from hvpspec.cli.app import main

__all__ = ["main"]
