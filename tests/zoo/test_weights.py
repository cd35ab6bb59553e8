from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hvpspec.errors import InputError
from hvpspec.zoo import NetworkSpec, build_network, load_checkpoint, mlp2, save_checkpoint
from hvpspec.zoo.weights import state_dicts

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
@pytest.mark.parametrize("wrapper", [None, "state_dict", "my_own_entry"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "my.own_prefix."])
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
    with pytest.raises(InputError, match=r"w.safetensors is not a readable safetensors file"):
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
        "nothing": ({}, r"holds no weights \(named tensors\); it holds a dict"),
        "a list": ([state], "holds no weights .* it holds a list"),
        "number as name": ({3: torch.ones(1)}, "holds no weights .* it holds 3"),
        "only others": ({"epoch": 3, "args": {}}, "holds no weights .* it holds epoch, args"),
        "complex": (
            {**state, "output.bias": torch.ones(10) + 1j},
            r"of another kind \(output.bias torch.complex64 instead of torch.float32\)",
        ),
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


# Files as people write them


def _other(seed: int = 8) -> dict[str, torch.Tensor]:
    return dict(mlp2("tanh", seed=seed).state_dict())


def _under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _files(state: dict[str, Any]) -> dict[str, tuple[object, str | None]]:
    """Files that hold one set of weights beyond doubt, and where."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(10, 784)}}, "param_groups": [{"lr": 0.1}]}
    lightning = {"epoch": 3, "pytorch-lightning_version": "2.4.0", "optimizer_states": [optimizer]}
    criterion = {"criterion.weight": torch.ones(10)}
    cnn = build_network("cnn").state_dict()
    itself: dict[str, Any] = {"weights": state}
    itself["self"] = itself
    return {
        "bare": (state, None),
        "among numbers": ({**state, "epoch": 3, "acc": np.float64(92.1)}, None),
        "named": ({"net": state, "acc": 92.1, "optimizer": optimizer}, "net"),
        "nested": ({"model": {"state_dict": state, "config": {"a": 1}}}, "model.state_dict"),
        "a wrapper in an entry": ({"model": _under("module.", state)}, "model.module"),
        "lightning": ({**lightning, "state_dict": _under("net.", state)}, "state_dict.net"),
        "lightning, with the loss's": (
            {**lightning, "state_dict": {**_under("net.", state), **criterion}},
            "state_dict.net",
        ),
        "another network beside it": ({"classifier": state, "cnn": dict(cnn)}, "classifier"),
        "a small one in the same": (
            {"state_dict": {**_under("big.", state), **_under("small.", dict(cnn))}},
            "state_dict.big",
        ),
        "average only": ({"params_ema": state}, "params_ema"),
        "average, too": ({"params_ema": _other(), "params": state}, "params"),
        "average of a wrapper": (
            {"model": state, "model_ema": _under("module.", _other())},
            "model",
        ),
        "average in the same": (
            {"state_dict": {**_under("ema_net.", _other()), **_under("net.", state)}},
            "state_dict.net",
        ),
        "twice the same": ({"model": state, "net": dict(state)}, "model"),
        "beside one with nan": (
            {"model": state, "ema": {n: t * torch.nan for n, t in state.items()}},
            "model",
        ),
        "half precision": ({"model": {n: t.half().float() for n, t in state.items()}}, "model"),
        "of itself": (itself, "weights"),
    }


@pytest.mark.parametrize("case", _files({name: torch.ones(1) for name in mlp2().state_dict()}))
def test_the_weights_that_fit_are_found(
    tmp_path: Path, state: dict[str, torch.Tensor], case: str
) -> None:
    content, place = _files(state)[case]
    torch.save(content, tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt", net="mlp2", net_arguments={"activation": "tanh"})
    assert found.weights == place
    tolerance = 1e-3 if case == "half precision" else 0.0  # 11 bits
    torch.testing.assert_close(
        found.model(X), mlp2("tanh", seed=7)(X), rtol=tolerance, atol=tolerance
    )


def _ambiguous(state: dict[str, Any]) -> dict[str, tuple[object, str, str]]:
    """Files that hold several sets, the message about them, and a name for the one meant."""
    parts = {**_under("student.", state), **_under("teacher.", _other())}
    big = {f"discriminator.{i}.weight": torch.ones(100, 100) for i in range(9)}
    return {
        "no average": (
            {"best": _other(), "last": state},
            "2 sets of weights that fit the network: best, last; choose one with --weights",
            "last",
        ),
        "prefixes": (
            {"state_dict": parts},
            "fit the network: state_dict.student, state_dict.teacher",
            "state_dict.student",
        ),
        "a part of the name": ({"state_dict": parts}, "state_dict.student", "student"),
        "averages only": (
            {"ema": _under("module.", state), "swa": _other()},
            "ema.module, swa",
            "ema",
        ),
        "the beginning of another": (
            {"net": state, "other": {"net": _other()}},
            "fit the network: net, other.net",
            "net",
        ),
        "the smaller part": (
            {"state_dict": {**_under("generator.", state), **big}},
            "state_dict.generator fits the network, but may be a part of a larger one",
            "state_dict.generator",
        ),
    }


@pytest.mark.parametrize("case", _ambiguous({name: torch.ones(1) for name in mlp2().state_dict()}))
def test_which_weights_are_meant_is_asked(
    tmp_path: Path, state: dict[str, torch.Tensor], case: str
) -> None:
    content, message, name = _ambiguous(state)[case]
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message) as caught:
        _loaded(tmp_path / "w.pt")
    assert len(str(caught.value).splitlines()) == 1
    model = load_checkpoint(tmp_path / "w.pt", net="mlp2", weights=name).model
    assert torch.equal(model.output.bias, state["output.bias"])  # type: ignore[union-attr, arg-type]


def test_named_weights_that_are_not_there_or_do_not_fit(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    torch.save({"model": state, "cnn": build_network("cnn").state_dict()}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"no weights named ema; it holds model \(4 tensors\), cnn"
    ):
        load_checkpoint(tmp_path / "w.pt", net="mlp2", weights="ema")
    with pytest.raises(InputError, match=r"the weights cnn in .* 2 missing \(hidden.weight, hid"):
        load_checkpoint(tmp_path / "w.pt", net="mlp2", weights="cnn")
    with pytest.raises(
        InputError, match=r"holds weights, model \(4 tensors\), cnn .6 tensors\), b"
    ):
        load_checkpoint(tmp_path / "w.pt")
    save_checkpoint(tmp_path / "own.pt", mlp2("tanh"), NetworkSpec("mlp2"))
    with pytest.raises(InputError, match="one set of weights; leave out --weights model"):
        load_checkpoint(tmp_path / "own.pt", weights="model")


def test_the_nearest_weights_are_compared_where_none_fit(tmp_path: Path) -> None:
    short = _other()
    del short["output.bias"]
    content = {"state_dict": _under("net.", short), "optimizer": {"a": torch.ones(1)}}
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"state_dict.net in .* 1 missing \(output.bias\)$"):
        _loaded(tmp_path / "w.pt")


def test_numbers_of_half_precision_beside_numpy_ones(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in _other(7).items()}
    torch.save({"net": state, "acc": np.float64(92.1), "losses": np.arange(3)}, tmp_path / "w.pt")
    assert {p.dtype for p in _loaded(tmp_path / "w.pt").parameters()} == {torch.float32}


def test_complex_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch.nn.Complex", lambda: nn.Linear(2, 2, dtype=torch.complex64), raising=False
    )
    for dtype in (torch.complex64, torch.complex128):
        layer = nn.Linear(2, 2, dtype=dtype)
        torch.save(layer.state_dict(), tmp_path / "w.pt")
        model = load_checkpoint(tmp_path / "w.pt", net="torch.nn:Complex").model
        assert torch.equal(model.weight, layer.weight)  # type: ignore[arg-type]
        assert model.weight.dtype == dtype


def test_lazy_layers_take_the_shapes_of_the_file(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "w.pt")
    found = load_checkpoint(
        tmp_path / "w.pt", net="torch.nn:LazyLinear", net_arguments={"out_features": 2}
    )
    assert torch.equal(found.model.weight, layer.weight)  # type: ignore[arg-type]


def test_a_file_may_be_as_deep_as_it_likes() -> None:
    deep: dict[str, Any] = {"net": {"a": torch.ones(1)}}
    for _ in range(2000):  # more than Python calls within each other
        deep = {"a": deep}
    assert list(state_dicts(Path("w.pt"), deep)) == ["a." * 2000 + "net"]


@pytest.mark.parametrize("prefix", ["", "net.", "module.net."])
def test_a_network_that_is_wrapped_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    def wrapped() -> nn.Module:
        return nn.ModuleDict({"module": nn.ModuleDict({"net": mlp2("tanh")})})

    monkeypatch.setattr("torch.nn.Wrapped", wrapped, raising=False)
    state = _other(7)
    torch.save(_under(prefix, state), tmp_path / "w.pt")
    model = load_checkpoint(tmp_path / "w.pt", net="torch.nn:Wrapped").model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name.removeprefix("module.net.")])


def test_a_layer_of_another_network_is_not_taken_for_a_linear_one(tmp_path: Path) -> None:
    torch.save(_other(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="do not fit the network"):
        load_checkpoint(
            tmp_path / "w.pt", net="linear", net_arguments={"in_features": 784, "out_features": 10}
        )


def test_modes(tmp_path: Path) -> None:
    torch.save(nn.BatchNorm1d(3).state_dict(), tmp_path / "w.pt")
    options: dict[str, Any] = {"net": "torch.nn:BatchNorm1d", "net_arguments": {"num_features": 3}}
    assert not load_checkpoint(tmp_path / "w.pt", **options).model.training
    assert load_checkpoint(tmp_path / "w.pt", **options, mode="as given").model.training
