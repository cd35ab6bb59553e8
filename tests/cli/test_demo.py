import json

import pytest

from hvpspec.cli import demo
from hvpspec.zoo import load_checkpoint


@pytest.fixture
def small_matrix(monkeypatch):
    """Train briefly, and put a small layer's Hessian in place of the whole network's."""
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    load = demo.load_problem
    monkeypatch.setattr(
        demo, "load_problem", lambda model: load(model, params=["output"], subset=50)
    )


def test_writes_everything(run, tmp_path, small_matrix):
    out = tmp_path / "new" / "out"
    outcome = run(f"demo --out {out} --seed 1")
    assert not outcome.code, outcome.err
    names = {"ckpt.pt", "index.json", "certified.json"}
    names |= {"spectrum.png", "index-curve.png", "certified.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert f"wrote {out / name}" in outcome.out
    content = json.loads((out / "index.json").read_text())
    assert content["dim"] == 110
    assert "they agree" in outcome.out
    certified = json.loads((out / "certified.json").read_text())
    assert [rung["index"] for rung in certified["ladder"]] == [0, 0, 0]
    assert certified["tau"] == 1e-5 * content["norm"]
    assert content["subject"]["network"] == "mlp2 (activation=relu)"
    settings = load_checkpoint(out / "ckpt.pt").settings
    assert settings.seed == 1


def test_folder_that_cannot_be_made(run, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = run(f"demo --out {tmp_path / 'file' / 'out'}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "cannot make the folder" in outcome.err
