"""The program: its commands, its error messages and its exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from hvpspec import __version__
from hvpspec.cli.checkpoints import info, train
from hvpspec.cli.critical import critical, lower_index
from hvpspec.cli.demo import demo
from hvpspec.cli.density import density
from hvpspec.cli.estimates import eigs, trace
from hvpspec.cli.files import checked
from hvpspec.cli.index import index
from hvpspec.cli.processes import TOGETHER, num_processes, rank
from hvpspec.errors import HvpspecError, InputError, type_and_line

_DEBUG = "--debug"
_INTERRUPTED = 130

app = typer.Typer(
    name="hvpspec",
    help="Hessian spectra and Morse indices of neural-network loss landscapes.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (train, info, index, density, eigs, trace, critical, lower_index, demo):
    app.command()(checked(command))


def _print_version(wanted: bool) -> None:
    """Print the version and exit, for ``--version``."""
    if wanted:
        typer.echo(f"hvpspec {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Declare the options of the program itself; `main` handles ``--debug``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0 done, 2 usage or bad input, 1 failure, 130 interrupted.

    Args:
        arguments: what follows the program's name; None for those of the process.

    Raises:
        SystemExit: always.
    """
    # Threads that spin while they wait slow a busy machine down: a demo of one minute took eleven.
    # This must be set before PyTorch loads its OpenMP runtime.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Removed here, so that it also works after a command.
    debug = _DEBUG in arguments
    arguments = [argument for argument in arguments if argument != _DEBUG]
    command = typer.main.get_command(app)
    # Each of several processes reports its own error.
    who = f"process {rank()}: " if num_processes() > 1 else ""
    try:
        _refuse_alone(arguments)
        # Not standalone: typer would print errors in a box and choose the exit code itself.
        code = command.main(arguments, prog_name="hvpspec", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        text, code = _explain(error, debug)
        if text:
            typer.echo(who + text, err=True)
    if code == _INTERRUPTED:
        typer.echo(f"{who}interrupted", err=True)
    sys.exit(code)


def _refuse_alone(arguments: Sequence[str]) -> None:
    """Raise InputError if several processes were started for a command that runs in one."""
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if num_processes() > 1 and named is not None and named not in TOGETHER:
        raise InputError(
            f"{num_processes()} processes cannot work on {named} together, only on "
            f"{', '.join(TOGETHER)}; start one"
        )


def _explain(error: Exception, debug: bool) -> tuple[str, int]:
    """Return a message of one or two lines and the exit code."""
    if isinstance(error, HvpspecError):
        return f"error: {error}", 2 if isinstance(error, InputError) else 1
    # Usage errors are recognised by a method, since their class has moved between versions.
    message = getattr(error, "format_message", None)
    if message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "hvpspec"
        # If pydantic is installed, typer lets it word some messages.
        text = message().replace("Value error, ", "")
        # A bare program or group prints its help instead of an error.
        return (f"error: {text}\nTry '{path} --help'." if text else ""), error.exit_code  # type: ignore[attr-defined]
    text = f"error: {type_and_line(error)}"
    return text if debug else f"{text}\nrun with {_DEBUG} for the traceback", 1
