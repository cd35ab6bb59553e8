import dataclasses
import json
import math
import os

import pytest
import torch

import hvpspec
from hvpspec.cli.demo import compare
from hvpspec.errors import InputError
from hvpspec.files import write_json
from hvpspec.linalg.operator import IndexBound, PointFacts
from hvpspec.results import Subject
from hvpspec.spectrum import Rung, describe_gradient, relative_decrease


@pytest.fixture
def result():
    """Index 1, with one negative sign that is round-off."""
    found = hvpspec.index(
        torch.diag(torch.tensor([3.0, 1.0, -1e-12, -2.0], dtype=torch.float64)), 1e-6
    )
    facts = PointFacts(0.5, 0.1, IndexBound(2, 2, "Because of [layer]."), ("a note",))
    return dataclasses.replace(found, facts=facts, noise_floor=1e-10)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("gradient_norm", "norm", "loss", "sentence"),
    [
        (0.0, 1.0, 1.0, "a critical point to working precision"),
        (0.0, 0.0, 0.0, "a critical point to working precision"),
        (1e-6, 1.0, 1.0, "a critical point to working precision"),
        (1e-200, 1.0, 1.0, "a critical point to working precision"),
        (1e-4, 1.0, 1.0, "nearly a critical point"),
        (1e-4, 1.0, -1.0, "nearly a critical point"),
        (1e-2, 1.0, 1.0, "not a critical point"),
        (1e-9, 0.0, 1.0, "not a critical point"),
        (1e-9, 1.0, 0.0, "not a critical point"),
    ],
)
def test_gradient_sentence(gradient_norm, norm, loss, sentence):
    assert describe_gradient(gradient_norm, norm, loss).startswith(sentence)


def test_relative_decrease_has_no_units():
    expected = relative_decrease(0.1, 5.0, 0.2)
    c, s = 1e5, 1e-3  # the loss times c, the parameters divided by s
    assert relative_decrease(c * s * 0.1, c * s**2 * 5.0, c * 0.2) == pytest.approx(expected)


def test_relative_decrease_is_what_a_step_brings_to_a_quadratic():
    H, theta = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([1.0, 0.0])
    f = lambda x: float(x @ H @ x) / 2 + 1.0  # noqa: E731
    g = H @ theta
    brought = (f(theta) - f(theta - g / 4)) / f(theta)
    assert relative_decrease(float(g.norm()), 4.0, f(theta)) == pytest.approx(brought)


def test_index_as_json(result):
    content = json.loads(json.dumps(result.to_dict(seconds=1.5), allow_nan=False))
    assert (content["format"], content["version"]) == ("hvpspec-index", 1)
    for name in ("index", "lower", "upper", "tau", "noise_floor", "raw_count", "nullity", "dim"):
        assert content[name] == getattr(result, name)
    assert content["bound"] == {"upper": 2, "psd_dim": 2, "reason": "Because of [layer]."}
    assert content["relative_decrease"] == pytest.approx(0.1**2 / (2 * 3 * 0.5))
    assert content["eigenvalues"] == [-2.0, -1e-12, 1.0, 3.0]
    assert (content["lambda_min"], content["lambda_max"]) == (-2.0, 3.0)


def test_unknown_and_infinite_are_null_in_json():
    found = hvpspec.index(torch.zeros(3, 3), method="inertia")
    content = found.to_dict()
    for name in ("loss", "relative_decrease", "bound", "eigenvalues", "lambda_min", "subject"):
        assert content[name] is None
    facts = PointFacts(loss=0.0, gradient_norm=1.0)
    content = dataclasses.replace(found, facts=facts).to_dict()
    assert content["relative_decrease"] is None
    assert "inf" in content["critical_point"]
    json.dumps(content, allow_nan=False)


def test_index_table(result):
    subject = Subject("net", "data", 7, 4, "mse", 0.5, ("a.*",), "net.pt")
    text = result.summary(subject=subject, seconds=1.5)
    for part in (
        "net on data, 7 examples; 4 parameters of a.*",
        "eigenvalues below −τ, τ = 1e-06",
        "partly round-off: counts signs below the noise floor (1)",
        "Because of [layer].",  # brackets are not read as markup
        "mse + 0.5 ‖θ‖²",
        "a note",
        "1.5 s",
    ):
        assert part in text


def test_raw_count_without_round_off(result):
    text = str(dataclasses.replace(result, noise_floor=1e-15))
    assert "none of it round-off" in text


def test_table_of_counts_alone():
    text = str(hvpspec.index(torch.eye(3), method="inertia"))
    assert "not known without the eigenvalues" in text
    assert "‖H‖" in text
    assert "upper bound  none" in text


def test_table_of_an_interval(result):
    text = str(dataclasses.replace(result, ladder=(Rung(1e-11, 1, 3, 2.0),)))
    assert "[1, 3]" in text
    assert "τ = 1e-11 lies below the noise floor 1e-10" in text
    uncertified = dataclasses.replace(result, ladder=(Rung(1e-6, 1, 3, 2.0),))
    assert "not certified" in str(uncertified)


def test_table_of_a_ladder(result):
    rungs = [(1.0, 1, 1), (0.1, 2, 2), (0.01, 2, 4), (1e-11, 2, 5)]
    ladder = tuple(Rung(tau, low, high, float(low)) for tau, low, high in rungs)
    free = dataclasses.replace(
        result,
        ladder=ladder,
        method="certified",
        confidence=0.99,
        positive=None,
        eigenvalues=None,
    )
    text = str(free)
    assert "certified down to τ = 0.1, bracketed below it" in text
    for part in ("[2, 4]", "0.033 ‖H‖ · certified", "τ lies below the noise floor", "0.99"):
        assert part in text
    assert "nullity" not in text
    content = free.to_dict()
    assert [rung["index"] for rung in content["ladder"]] == [1, 2, None, None]
    guess = dataclasses.replace(free, method="quadrature")
    assert "certified" not in str(guess)
    assert {rung["index"] for rung in guess.to_dict()["ladder"]} == {None}


def test_comparison(result):
    ladder = (Rung(1.0, 1, 1, 1.0), Rung(0.1, 0, 3, 1.0), Rung(0.01, 2, 2, 2.0))
    certified = dataclasses.replace(result, ladder=ladder, confidence=0.99)
    lines = compare(certified, result, seconds=(1.0, 50.0)).splitlines()
    for tau, verdict in (("1 ", "agree"), ("0.1 ", "holds it"), ("0.01 ", "DISAGREE")):
        (line,) = (line for line in lines if line.strip().startswith(tau))
        assert verdict in line


@pytest.mark.parametrize("width", [40, 80])
def test_tables_fit_a_narrow_terminal(result, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(result)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]
