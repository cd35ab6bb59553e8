"""Losses, modes and labels of a user's own, by their names on the command line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hvpspec
from tests.cli.conftest import Run

CODE = """
import hvpspec, torch
import torch.nn.functional as F
from torch import nn

def dice(outputs, targets):
    p, t = outputs.softmax(1)[:, 1], targets.float()
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())

whole = hvpspec.Loss(dice, whole=True)
smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
number = 3

class Focal(nn.Module):
    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()

class Unfinished(nn.Module):
    def __init__(self, alpha):
        super().__init__()

def of_every_other(outputs, targets):  # of all 40 examples, and of no fewer
    chosen = torch.arange(40) % 2 == 0
    return F.cross_entropy(outputs[chosen], targets[chosen])

def of_a_tuple(outputs, targets):
    return F.cross_entropy(outputs[0], targets) + outputs[1].square().mean()

def broken(outputs, targets):
    return outputs.missing

def without_arguments():
    return nn.CrossEntropyLoss()

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x), self.layer(x).tanh()

class SignOfTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        return gradient * (1 - x.tanh().square())

class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(SignOfTanh.apply(self.layer(x)))

def normed():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))

def pixels():
    return nn.Conv2d(1, 3, 1)

def words():
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))

def images():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (6, 2, 2), generator=generator)
    y[:3, 1:] = 255
    return torch.randn(6, 1, 2, 2, generator=generator), y

def batches():
    x, y = images()
    return [(x[:2], y[:2]), (x[2:], y[2:])]

def sentences():
    tokens = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(0))
    return tokens, tokens
"""
MODULE = "cli_losses"
PLANE = "--data plane.npz"


@pytest.fixture
def code(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with networks, losses and data; its networks' weights are saved."""
    (workspace / f"{MODULE}.py").write_text(CODE)
    monkeypatch.syspath_prepend(workspace)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("Pair", "Straight", "normed", "pixels", "words"):
            torch.save(getattr(module, name)().state_dict(), f"{name}.pt")
    return module


def spectrum(run: Run, options: str) -> dict[str, Any]:
    """The exact index of a network's loss, as JSON."""
    outcome = run(f"index {options} --exact --json index.json")
    assert not outcome.code, outcome.err
    content: dict[str, Any] = json.loads(Path("index.json").read_text())
    return content


def hessian(model: nn.Module, loss: Any, data: Any, **options: Any) -> list[float]:
    """The eigenvalues from the library."""
    double = (data[0].double(), data[1]) if data[0].is_floating_point() else data
    found = hvpspec.index(hvpspec.HessianOperator(model.double(), loss, double, **options))
    assert found.eigenvalues is not None
    values: list[float] = found.eigenvalues.tolist()
    return values


def loaded(code: Any, name: str) -> nn.Module:
    """A network with the weights that were saved."""
    model: nn.Module = getattr(code, name)()
    model.load_state_dict(torch.load(f"{name}.pt"))
    return model


@pytest.mark.parametrize("name", ["dice", "whole", "smooth", "Focal", "of_every_other"])
def test_a_loss_by_name_is_the_librarys(run: Run, checkpoint: str, code: Any, name: str) -> None:
    content = spectrum(run, f"--model {checkpoint} --l2 0 --loss {MODULE}:{name}")
    found = hvpspec.zoo.load_checkpoint(checkpoint)
    loss = getattr(code, name)
    expected = hessian(
        found.model, loss() if isinstance(loss, type) else loss, found.load_data().tensors
    )
    assert content["eigenvalues"] == pytest.approx(expected, abs=1e-12)
    assert content["subject"]["loss"] == f"{MODULE}:{name}"


@pytest.mark.parametrize("name", ["torch.nn:CrossEntropyLoss", "torch.nn.functional:cross_entropy"])
def test_losses_of_pytorch_by_name(run: Run, checkpoint: str, name: str) -> None:
    by_name = spectrum(run, f"--model {checkpoint} --loss {name}")
    by_default = spectrum(run, f"--model {checkpoint}")
    assert by_name["eigenvalues"] == pytest.approx(by_default["eigenvalues"], abs=1e-12)


def test_a_network_may_return_what_its_loss_takes(run: Run, code: Any) -> None:
    options = f"--model Pair.pt --net {MODULE}:Pair {PLANE}"
    assert spectrum(run, f"{options} --loss {MODULE}:of_a_tuple")["dim"] == 6
    outcome = run(f"index {options}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the network returns a tuple; it must return a tensor" in outcome.err


def test_the_loss_of_a_language_model(run: Run, code: Any) -> None:
    options = f"--model words.pt --net {MODULE}:words --data {MODULE}:sentences"
    content = spectrum(run, f"{options} --loss hvpspec:next_token_loss")
    tokens, labels = code.sentences()

    def next_tokens(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    loss = next_tokens(loaded(code, "words").double()(tokens), labels)
    assert content["loss"] == pytest.approx(loss.item(), rel=1e-12)
    outcome = run(f"index {options}")
    assert outcome.code == 2
    assert "pass --loss hvpspec:next_token_loss" in outcome.err


@pytest.mark.parametrize("data", ["images", "batches"])
def test_labels_that_do_not_count(run: Run, code: Any, data: str) -> None:
    options = f"--model pixels.pt --net {MODULE}:pixels --data {MODULE}:{data}"
    for more in ("", "--ignore-index 254"):
        outcome = run(f"index {options} {more}")
        assert (outcome.code, outcome.out) == (2, "")
        assert "Target 255 is out of bounds; if 255 marks labels to be ignored" in outcome.err
        assert "pass --ignore-index 255" in outcome.err
        assert len(outcome.err.splitlines()) == 1
    content = spectrum(run, f"{options} --ignore-index 255")
    inputs, targets = code.images()
    model, counted = loaded(code, "pixels").double(), targets != 255
    rows = model(inputs.double()).movedim(1, -1)[counted]
    assert content["loss"] == pytest.approx(F.cross_entropy(rows, targets[counted]).item())
    expected = hessian(model, nn.CrossEntropyLoss(ignore_index=255), (inputs, targets))
    assert content["eigenvalues"] == pytest.approx(expected, abs=1e-12)
    assert content["subject"]["loss"] == "cross_entropy (ignore_index=255)"


def test_modules_as_they_are_built(run: Run, code: Any, workspace: Path) -> None:
    options = f"--model normed.pt --net {MODULE}:normed {PLANE}"
    data = hvpspec.zoo.load_data("plane.npz").tensors  # type: ignore[union-attr]
    model = loaded(code, "normed").double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode, training in (("as-given", True), ("eval", False)):
        content = spectrum(run, f"{options} --mode {mode}")
        model.load_state_dict(state)
        loss = F.cross_entropy(model.train(training)(data[0].double()), data[1])
        assert content["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_pseudo_gradients_are_allowed_by_name_only(run: Run, code: Any) -> None:
    options = f"--model Straight.pt --net {MODULE}:Straight {PLANE}"
    outcome = run(f"index {options} --exact")
    assert (outcome.code, outcome.out) == (1, "")
    assert "pseudo_gradient" in outcome.err
    content = spectrum(run, f"{options} --pseudo-gradient")
    assert not content["certified"]
    assert {rung["index"] for rung in content["ladder"]} == {None}
    assert any("pseudo-gradient" in note for note in content["notes"])
    for command in ("density --steps 3", "eigs -k 2", "trace --max-matvecs 4"):
        outcome = run(f"{command} {options} --pseudo-gradient --json result.json")
        assert not outcome.code, outcome.err
        assert "pseudo-gradient" in outcome.out
        notes = json.loads(Path("result.json").read_text())["notes"]
        assert any("pseudo-gradient" in note for note in notes)


@pytest.mark.parametrize("command", ["index", "density", "eigs", "trace"])
@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        ("broken", "the loss broken cannot take outputs of shape (40, 2) and targets of shape"),
        ("without_arguments", "takes 0 positional arguments but 2 were given"),
        ("Unfinished", "failed when called as (): TypeError"),
        ("number", f"{MODULE}:number is a int, which cannot be called with outputs and targets"),
        ("missing", "has no 'missing'"),
        ("Focal --ignore-index 1", "--ignore-index belongs to --loss cross_entropy, not to"),
    ],
)
def test_losses_that_do_not_fit(
    run: Run, checkpoint: str, code: Any, command: str, loss: str, cause: str
) -> None:
    outcome = run(f"{command} --model {checkpoint} --loss {MODULE}:{loss}")
    assert (outcome.code, outcome.out) == (2, "")
    assert cause in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_other_names_are_a_mistake(run: Run, checkpoint: str) -> None:
    outcome = run(f"index --model {checkpoint} --loss hinge")
    assert outcome.code == 2
    assert "'hinge' is not one of cross_entropy, mse, nor module:callable" in outcome.err
    outcome = run(f"index --model {checkpoint} --loss mse --ignore-index 1")
    assert outcome.code == 2
    assert "--ignore-index belongs to the cross_entropy, but the loss is mse" in outcome.err
    assert run(f"index --model {checkpoint} --mode train").code == 2


def test_the_code_of_a_loss_is_not_written_over(run: Run, checkpoint: str, code: Any) -> None:
    outcome = run(f"trace --model {checkpoint} --loss {MODULE}:dice --json {MODULE}.py")
    assert (outcome.code, outcome.out) == (2, "")
    assert "is read by --loss and would be overwritten" in outcome.err
