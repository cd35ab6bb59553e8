"""Processes that are copied from one that has loaded PyTorch already, which takes longest."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from hvpspec.cli import main
from hvpspec.recording import kept_tensors

LOADED = [
    "pytest",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.fx.experimental.proxy_tensor",
    "hvpspec.cli.app",
    "hvpspec.curvature",
    "hvpspec.plotting",
    "hvpspec.results",
    "hvpspec.spectrum",
    "hvpspec.zoo",
]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LOADED)

#: A variable ``files:seconds``: when the program has written so many files of a checkpoint, each
#: further one takes so much longer, so that it can be killed there however busy the machine is.
SLOW_AFTER = "SLOW_AFTER"

_numbers = itertools.count()


class Program:
    """The program in a process of its own, in the present directory.

    Args:
        command: words.
        others: arguments that follow as they are.
        environment: variables that are others there.
    """

    def __init__(self, command: str, *others: str, **environment: str) -> None:
        number = next(_numbers)
        self._printed = [Path(f".printed-{number}.{kind}").absolute() for kind in ("out", "err")]
        for path in self._printed:
            path.touch()
        printed = [str(path) for path in self._printed]
        self._process = SERVER.Process(
            target=_run,
            args=([*command.split(), *others], os.getcwd(), printed, environment),
            daemon=True,  # what a failed test leaves ends with the tests
        )
        self._process.start()

    @property
    def out(self) -> str:
        """What it printed."""
        return self._printed[0].read_text()

    @property
    def err(self) -> str:
        """What it printed as errors and progress."""
        return self._printed[1].read_text()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        assert self.runs, self.err
        os.kill(self._process.pid, number)

    def ended(self, seconds: float = 120) -> int:
        """Wait for its end, and return its exit code: minus the signal's number if one ended it."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise AssertionError(f"it did not end in {seconds} seconds: {self.err}")
        return code


def programs_together(command: str, *others: str, size: int, **environment: str) -> list[Program]:
    """As many processes as torchrun would start, told the same as by it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        Program(command, *others, RANK=str(r), LOCAL_RANK=str(r), **environment)
        for r in range(size)
    ]


def _slow_down(files: int, seconds: float) -> None:
    """Make each file of a checkpoint after the first ones take longer to write."""
    write, num_written = kept_tensors.write_atomically, itertools.count()

    def write_slowly(path: Path, content: bytes) -> None:
        if path.suffix == ".safetensors" and next(num_written) >= files:
            time.sleep(seconds)
        write(path, content)

    kept_tensors.write_atomically = write_slowly


def _run(words: list[str], folder: str, printed: list[str], environment: dict[str, str]) -> None:
    """Be the program."""
    import torch

    os.chdir(folder)
    os.environ |= {"COLUMNS": "200", **environment}
    for number, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if SLOW_AFTER in os.environ:
        files, seconds = os.environ[SLOW_AFTER].split(":")
        _slow_down(int(files), float(seconds))
    sys.argv = ["hvpspec"]
    main(words)
