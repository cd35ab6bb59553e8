"""``hvpspec critical`` and ``hvpspec lower-index``."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run

NET = "--net tiny_cli_network:make"


@pytest.fixture
def trained(workspace: Path, run: Run) -> str:
    """A network of 17 parameters with one hidden layer, trained a little."""
    outcome = run(f"train {NET} --data plane.npz --epochs 5 --l2 0.02 --out net.pt")
    assert not outcome.code, outcome.err
    return "net.pt"


def test_a_checkpoint_goes_to_a_proved_minimum(trained: str, run: Run) -> None:
    outcome = run(
        f"critical --model {trained} {NET} --data plane.npz --out point.pt --json point.json"
    )
    assert not outcome.code, outcome.err
    assert "minimum" in outcome.out
    assert "proved" in outcome.out
    told = json.loads(Path("point.json").read_text())
    assert told["format"] == "hvpspec-critical-point"
    assert told["certified"] is True
    assert told["kind"] == "minimum"
    assert told["subject"]["num_parameters"] == len(told["theta"]) == 17
    # f = L + l2 ||theta||^2, and L alone may go down in some directions.
    norm2 = sum(x * x for x in told["theta"])
    assert told["loss"]["value"] == pytest.approx(told["value"] - 0.02 * norm2, rel=1e-12)
    assert told["loss"]["index"] >= 0
    assert told["seconds"] > 0


def test_the_point_is_a_checkpoint_that_other_commands_take(trained: str, run: Run) -> None:
    critical = f"critical {NET} --data plane.npz"
    run(f"{critical} --model {trained} --out point.pt --json first.json")
    outcome = run(f"index --model point.pt {NET} --data plane.npz --exact --json index.json")
    assert not outcome.code, outcome.err
    index, first = (json.loads(Path(f"{name}.json").read_text()) for name in ("index", "first"))
    assert index["index"] == 0
    assert index["loss"] == pytest.approx(first["value"], rel=1e-14)
    assert index["gradient_norm"] < 1e-14
    assert "float64" in run(f"info point.pt {NET}").out
    # It is critical already: nothing is left to do, but to prove it.
    again = run(f"{critical} --model point.pt --json again.json")
    assert not again.code, again.err
    told = json.loads(Path("again.json").read_text())
    assert told["value"] == pytest.approx(first["value"], rel=1e-14)
    assert told["num_gradients"] < 30


def test_a_saddle_and_a_way_down_from_it(trained: str, run: Run) -> None:
    base = f"{NET} --data plane.npz"
    outcome = run(f"critical --model {trained} {base} --target nearest --json saddle.json")
    assert not outcome.code, outcome.err
    outcome = run(
        f"lower-index --model {trained} {base} --tau 1e-3 --plot way.png --json way.json"
        " --out low.pt"
    )
    assert not outcome.code, outcome.err
    told = json.loads(Path("way.json").read_text())
    assert told["values"] == sorted(told["values"], reverse=True)
    assert told["taus"] == [1e-3]
    assert told["end"]["kind"] == "minimum"
    assert Path("way.png").read_bytes().startswith(b"\x89PNG")
    assert Path("low.pt").exists()


def test_a_stopped_walk_goes_on(trained: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvpspec.landscape import landscapes

    command = f"critical --model {trained} {NET} --data plane.npz --checkpoint kept"
    both, calls = landscapes.NetworkLandscape.value_and_gradient, 0

    def interrupted(
        self: landscapes.NetworkLandscape, theta: torch.Tensor
    ) -> tuple[float, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return both(self, theta)

    monkeypatch.setattr(landscapes.NetworkLandscape, "value_and_gradient", interrupted)
    outcome = run(f"{command} --out best.pt")
    assert outcome.code == 130
    assert "the last point is kept in kept" in outcome.err
    assert "wrote best.pt" in outcome.err
    outcome = run(f"{command} --json end.json")
    assert not outcome.code, outcome.err
    assert json.loads(Path("end.json").read_text())["certified"]
    outcome = run(f"{command} --target 1")
    assert outcome.code == 2
    assert "kept holds the point of another run, with another task" in outcome.err
    Path("kept/point.safetensors").write_bytes(b"no")
    outcome = run(command)
    assert outcome.code == 2
    assert "is damaged" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target top", "target must be 'minimum', 'nearest' or an index from 0 to 17"),
        ("--target 18", "an index from 0 to 17, got 18"),
        ("--max-gradients 0", "greater than or equal to 1"),
        ("--engine batched", "No such option: --engine"),
        ("--out net.pt", "net.pt"),
    ],
)
def test_mistakes(trained: str, run: Run, options: str, message: str) -> None:
    before = Path(trained).read_bytes()
    outcome = run(f"critical --model {trained} {NET} --data plane.npz {options}")
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert Path(trained).read_bytes() == before


def test_kinks(workspace: Path, run: Run) -> None:
    Path("tiny_relu.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))\n"
    )
    base = "--net tiny_relu:make --data plane.npz"
    assert not run(f"train {base} --epochs 5 --l2 0.02 --out relu.pt").code
    outcome = run(f"critical --model relu.pt {base}")
    assert outcome.code == 1
    assert "layer '1' has kinks (ReLU); use Softplus, Tanh or GELU" in outcome.err
    outcome = run(f"critical --model relu.pt {base} --allow-kinks")
    assert not outcome.code, outcome.err
    assert "not proved: f is not twice differentiable everywhere" in outcome.out


def test_without_l2_a_network_may_go_to_infinity(trained: str, run: Run) -> None:
    outcome = run(f"critical --model {trained} {NET} --data plane.npz --l2 0 --max-gradients 300")
    assert not outcome.code, outcome.err
    assert "not proved" in outcome.out
