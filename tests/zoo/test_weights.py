from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hvpspec.errors import InputError
from hvpspec.zoo import load_checkpoint, mlp2

X = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return dict(mlp2("tanh", seed=7).state_dict())


def _loaded(path: Path) -> nn.Module:
    return load_checkpoint(path, net="mlp2", net_arguments={"activation": "tanh"}).model


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_foreign_weights(
    tmp_path: Path, state: dict[str, Any], suffix: str, wrapper: str | None, prefix: str
) -> None:
    content = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / f"w.{suffix}")
    assert torch.equal(_loaded(tmp_path / f"w.{suffix}")(X), mlp2("tanh", seed=7)(X))


def test_safetensors(tmp_path: Path, state: dict[str, Any]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(_loaded(tmp_path / "w.safetensors")(X), mlp2("tanh", seed=7)(X))


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}", b"x" * 99])
def test_broken_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"w.safetensors is no readable safetensors file"):
        _loaded(tmp_path / "w.safetensors")


def test_missing_safetensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"w.safetensors does not exist"):
        _loaded(tmp_path / "w.safetensors")


def test_float64_weights_are_not_rounded(tmp_path: Path) -> None:
    exact = mlp2("tanh", seed=7).double()
    with torch.no_grad():
        exact.output.bias += 1e-12  # type: ignore[union-attr, operator]
    torch.save(exact.state_dict(), tmp_path / "w.pt")
    model = _loaded(tmp_path / "w.pt")
    assert torch.equal(model.output.bias, exact.output.bias)  # type: ignore[union-attr, arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    torch.save(mlp2("tanh", seed=7).bfloat16().state_dict(), tmp_path / "w.pt")
    assert {p.dtype for p in _loaded(tmp_path / "w.pt").parameters()} == {torch.float32}


def test_tied_weights_stay_tied_and_may_be_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.Tied", Tied, raising=False)
    weight = torch.rand(3, 3)
    save_file({"one.weight": weight}, tmp_path / "w.safetensors")
    checkpoint = load_checkpoint(tmp_path / "w.safetensors", net="torch.nn:Tied")
    assert checkpoint.model.one.weight is checkpoint.model.two.weight  # type: ignore[union-attr]
    assert torch.equal(checkpoint.model.two.weight, weight)  # type: ignore[union-attr, arg-type]
    assert checkpoint.num_parameters == 9


def test_a_network_whose_own_names_begin_with_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torch.nn.Wrapped", lambda: nn.ModuleDict({"module": nn.Linear(2, 2)}), raising=False
    )
    torch.save(nn.ModuleDict({"module": nn.Linear(2, 2)}).state_dict(), tmp_path / "w.pt")
    load_checkpoint(tmp_path / "w.pt", net="torch.nn:Wrapped")


def _bad(state: dict[str, Any]) -> dict[str, tuple[object, str]]:
    few = {name: state[name] for name in ("output.weight", "output.bias")}
    many = {**state, **{f"extra{i}": torch.ones(1) for i in range(5)}}
    other = {**state, "output.bias": torch.zeros(7)}
    nan = {**state, "output.bias": torch.full((10,), torch.nan)}
    return {
        "missing": (few, r"2 missing \(hidden.weight, hidden.bias\)"),
        "unexpected": (many, r"5 unexpected \(extra0, extra1, extra2 and 2 more\)"),
        "shape": (other, r"1 of another shape \(output.bias \(7,\) instead of \(10,\)\)"),
        "nan": (nan, "tensor 'output.bias' has NaN or infinite values"),
        "nothing": ({}, "holds no weights"),
        "a list": ([state], "holds no weights"),
        "a number": ({**state, "epoch": 3}, "entry 'epoch' is a int, not a tensor"),
        "number as name": ({3: torch.ones(1)}, "entry 3 is a Tensor"),
        "complex": ({**state, "output.bias": torch.ones(10) + 1j}, "torch.complex64"),
        "sparse": ({**state, "output.bias": torch.ones(10).to_sparse()}, "torch.sparse_coo"),
        "meta": ({**state, "output.bias": torch.ones(10, device="meta")}, "on meta"),
    }


@pytest.mark.parametrize("case", _bad({name: torch.ones(1) for name in mlp2().state_dict()}))
def test_weights_that_do_not_fit(tmp_path: Path, state: dict[str, Any], case: str) -> None:
    content, message = _bad(state)[case]
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message) as caught:
        _loaded(tmp_path / "w.pt")
    assert len(str(caught.value).splitlines()) == 1
