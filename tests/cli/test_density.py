import json

import pytest


@pytest.mark.parametrize("option", ["", " --symlog"])
def test_picture_and_numbers(run, checkpoint, option):
    outcome = run(
        f"density --model {checkpoint} --exact{option} --bins 20 --out s.svg --json s.json"
    )
    assert not outcome.code
    assert "wrote s.svg" in outcome.out
    with open("s.svg") as file:
        assert "<svg" in file.read()
    with open("s.json") as file:
        content = json.load(file)
    assert (content["format"], content["version"]) == ("hvpspec-density", 1)
    assert sum(content["counts"]) + content["num_zero"] == len(content["eigenvalues"]) == 6
    assert (content["linear_threshold"] is None) == (option == "")


def test_only_the_exact_one_exists(run, checkpoint):
    outcome = run(f"density --model {checkpoint} --out s.png")
    assert outcome.code == 2
    assert "pass --exact" in outcome.err


@pytest.mark.parametrize("out", ["s.gif", "s", "missing/s.png"])
def test_target_is_checked_before_the_work(run, workspace, out):
    outcome = run(f"density --model nothing.pt --exact --out {out}")
    assert outcome.code == 2
    assert "cannot write" in outcome.err
