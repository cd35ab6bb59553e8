"""Bars for library calls, where somebody watches; a callable is called all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console

import hvpspec
from hvpspec.progress import shown

VALUES = torch.linspace(-1, 3, 40).double()


def ask(question: str, progress: Any) -> Any:
    A = hvpspec.FunctionOperator(40, lambda v: VALUES * v)
    return {
        "index": lambda: hvpspec.index(A, progress=progress),
        "certified": lambda: hvpspec.index(A, 0.5, method="certified", progress=progress),
        "measure": lambda: hvpspec.spectral_measure(A, 2, 5, progress=progress),
        "eigsh": lambda: hvpspec.eigsh(A, 2, progress=progress),
        "trace": lambda: hvpspec.trace(A, 12, progress=progress),
        "norm": lambda: hvpspec.frobenius_norm(A, 12, progress=progress),
        "diagonal": lambda: hvpspec.diagonal(A, 12, progress=progress),
        "matrix": lambda: A.to_dense(progress=progress),
    }[question]()


QUESTIONS = ["index", "certified", "measure", "eigsh", "trace", "norm", "diagonal", "matrix"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_true_shows_a_bar_to_a_terminal_alone(
    question: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ask(question, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    watched = ask(question, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "/" in err  # done of how many
    assert hvpspec.results.plain(watched) == hvpspec.results.plain(quiet)
    assert hvpspec.results.plain(ask(question, None)) == hvpspec.results.plain(quiet)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_callable_is_told(question: str) -> None:
    seen: list[tuple[int, int]] = []
    ask(question, lambda done, total: seen.append((done, total)))
    assert seen
    assert all(0 < done <= total for done, total in seen)
    assert seen == sorted(seen)


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))

    def fail() -> None:
        with shown(True, "work") as report:
            assert report is not None
            report(1, 2)
            raise ValueError("mine")

    for _ in range(2):  # rich allows one live display at a time
        with pytest.raises(ValueError, match="mine"):
            fail()
