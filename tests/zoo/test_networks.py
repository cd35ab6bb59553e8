from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from hvpspec.errors import InputError
from hvpspec.zoo import ACTIVATIONS, NetworkSpec, build_network, linear


@pytest.mark.parametrize(("name", "count"), [("mlp2", 7960), ("mlp3", 8070), ("cnn", 552)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameter_counts_and_shapes(name: str, count: int, activation: str) -> None:
    network = build_network(name, {"activation": activation})
    assert sum(p.numel() for p in network.parameters()) == count
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    kinds = [type(layer) for layer in network]  # type: ignore[arg-type]
    assert kinds.count(type(ACTIVATIONS[activation]())) == (1 if name == "mlp2" else 2)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mlp2", ["hidden", "output"]),
        ("mlp3", ["hidden1", "hidden2", "output"]),
        ("cnn", ["conv1", "conv2", "output"]),
    ],
)
def test_parameters_carry_readable_names(name: str, layers: list[str]) -> None:
    expected = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert [key for key, _ in build_network(name).named_parameters()] == expected


@pytest.mark.parametrize("name", ["mlp2", "mlp3", "cnn"])
def test_probabilities_instead_of_logits(name: str) -> None:
    x = torch.rand(3, 1, 28, 28)
    found = build_network(name, {"softmax": True}, seed=1)(x)
    assert torch.equal(found, build_network(name, seed=1)(x).softmax(dim=1))


def test_linear_is_a_matrix_and_a_constant() -> None:
    network = linear(3, 2)
    x = torch.rand(5, 3)
    expected = x @ network.output.weight.T + network.output.bias  # type: ignore[union-attr, operator]
    assert torch.allclose(network(x), expected)  # type: ignore[arg-type]
    assert len(list(linear(3, bias=False).parameters())) == 1


@pytest.mark.parametrize("name", ["mlp2", "torchvision.models:squeezenet1_1"])
def test_same_seed_same_weights_and_the_callers_numbers_are_left(name: str) -> None:
    state = torch.get_rng_state()
    one, same, other = (build_network(name, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_a_network_of_torchvision_with_arguments() -> None:
    network = build_network("torchvision.models:resnet18", {"num_classes": 7})
    assert isinstance(network.fc, nn.Linear)
    assert network.fc.out_features == 7


def test_a_network_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n"
        "    def __init__(self): super().__init__(2, 3)"
    )
    monkeypatch.chdir(tmp_path)
    assert build_network("my_networks:Net")(torch.zeros(1, 2)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mlp9", {}, "unknown network 'mlp9'; give one of mlp2, mlp3, cnn, linear, or module"),
        ("mlp2", {"activation": "swish"}, "unknown activation 'swish'; give one of relu, tanh"),
        ("cnn", {"pooling": "sum"}, "unknown pooling 'sum'; give one of max, average"),
        ("mlp2", {"activation": []}, "'mlp2' cannot be built"),
        ("mlp2", {"width": 3}, "'mlp2' cannot be built from .*width"),
        ("mlp2", {"seed": 3}, "'mlp2' cannot be built"),
        ("linear", {}, "'linear' cannot be built.*in_features"),
        ("linear", {"in_features": 0}, "in_features is 0"),
        ("linear", {"in_features": True}, "in_features is True"),
        ("linear", {"in_features": 2, "out_features": "3"}, "out_features is '3'"),
        ("linear", {"in_features": 2, "bias": "no"}, "bias is 'no'"),
        ("no_such_module_anywhere:net", {}, "cannot import 'no_such_module_anywhere'"),
        ("torchvision.models:resnet18", {"depth": 3}, "resnet18 failed when called as .depth=3"),
        ("fractions:Fraction", {}, "returned a Fraction, not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_built_is_named(
    name: str, arguments: Mapping[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_network(name, arguments)


@pytest.mark.parametrize(("name", "arguments"), [(3, {}), ("mlp2", [1])])
def test_a_malformed_spec_is_refused(name: object, arguments: object) -> None:
    with pytest.raises(InputError, match="name and its arguments"):
        NetworkSpec(name, arguments)  # type: ignore[arg-type]
