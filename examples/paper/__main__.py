"""``python -m examples.paper``: exit codes are 0 done, 1 failure, 2 bad input, 130 interrupted."""

import sys
from collections.abc import Sequence

from examples.paper.commands import app
from hvpspec.errors import HvpspecError, InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the experiments.

    Args:
        arguments: what follows the program's name; None for those of the process.
    """
    try:
        app(arguments, prog_name="python -m examples.paper")
    except HvpspecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main()
