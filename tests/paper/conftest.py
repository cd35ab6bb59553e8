import pytest

from examples.paper.__main__ import main
from tests.cli.conftest import Outcome, one_thread  # noqa: F401


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the experiments' program in this process; words of a string are arguments."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(command):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(command.split())
        captured = capsys.readouterr()
        return Outcome(exit_info.value.code, captured.out, captured.err)

    return call
