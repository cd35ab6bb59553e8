"""The networks of the zoo, building a network from its name, and seeding its weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from hvpspec.errors import InputError
from hvpspec.zoo.importing import call_by_name, is_code_name

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


@dataclass(frozen=True)
class NetworkSpec:
    """The name and arguments that build a network.

    >>> print(NetworkSpec("mlp2", {"activation": "tanh"}))
    mlp2 (activation=tanh)

    Attributes:
        name: One of `NETWORKS`, or ``module:callable``.
        arguments: Its keyword arguments, which JSON must be able to represent.

    Raises:
        InputError: The name is not a string or the arguments are not a mapping.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.arguments, Mapping):
            raise InputError(
                f"a network is a name and its arguments, not {self.name!r} and {self.arguments!r}"
            )

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.name} ({arguments})" if arguments else self.name


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generators inside the block, and restore their states after it.

    The initialisers and dropout accept no other generator.

    Raises:
        InputError: The seed is not a whole number in [0, 2**63).
    """
    check_seed(seed)
    # Empty before CUDA is initialised; a seed set now would be applied later, outside the block.
    cuda = list(range(len(torch.cuda.default_generators)))
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def check_seed(seed: object) -> None:
    """Raise InputError for a seed that is not a whole number in [0, 2**63)."""
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1")


def mlp2(activation: str = "relu", *, softmax: bool = False, seed: int = 0) -> nn.Sequential:
    """Build the 2-layer perceptron 784-10-10 for images of shape (N, 1, 28, 28).

    Args:
        activation: One of `ACTIVATIONS`.
        softmax: Whether to return probabilities instead of logits.
        seed: Seed of the initial weights; the global random state is not changed.

    Raises:
        InputError: Unknown activation or invalid seed.

    >>> sum(p.numel() for p in mlp2().parameters())
    7960
    """
    act = _activation(activation)
    with seeded(seed):
        return _sequential(
            softmax,
            flatten=nn.Flatten(),
            hidden=nn.Linear(784, 10),
            activation=act(),
            output=nn.Linear(10, 10),
        )


def mlp3(activation: str = "relu", *, softmax: bool = False, seed: int = 0) -> nn.Sequential:
    """Build the 3-layer perceptron 784-10-10-10; arguments and errors are those of `mlp2`.

    >>> sum(p.numel() for p in mlp3().parameters())
    8070
    """
    act = _activation(activation)
    with seeded(seed):
        return _sequential(
            softmax,
            flatten=nn.Flatten(),
            hidden1=nn.Linear(784, 10),
            activation1=act(),
            hidden2=nn.Linear(10, 10),
            activation2=act(),
            output=nn.Linear(10, 10),
        )


def cnn(
    activation: str = "relu", *, pooling: str = "max", softmax: bool = False, seed: int = 0
) -> nn.Sequential:
    """Build the small convolutional network; other arguments and errors are those of `mlp2`.

    Two 5x5 convolutions of one channel (stride 1, padding 2), each followed by the activation and
    2x2 pooling, then a linear layer 49-10.

    Args:
        activation: One of `ACTIVATIONS`.
        pooling: "max", or "average" for a smooth network.
        softmax: Whether it returns probabilities instead of logits.
        seed: Seed of the initial weights.

    Raises:
        InputError: Unknown activation or pooling, or invalid seed.

    >>> sum(p.numel() for p in cnn().parameters())
    552
    """
    act = _activation(activation)
    pools: Mapping[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
    if pooling not in pools:
        raise InputError(f"unknown pooling {pooling!r}; give one of {', '.join(pools)}")
    pool = pools[pooling]
    with seeded(seed):
        return _sequential(
            softmax,
            conv1=nn.Conv2d(1, 1, kernel_size=5, padding=2),
            activation1=act(),
            pool1=pool(2),
            conv2=nn.Conv2d(1, 1, kernel_size=5, padding=2),
            activation2=act(),
            pool2=pool(2),
            flatten=nn.Flatten(),
            output=nn.Linear(49, 10),
        )


def linear(
    in_features: int, out_features: int = 1, bias: bool = True, *, seed: int = 0
) -> nn.Sequential:
    """Build a linear model; with a squared loss this is linear regression.

    Args:
        in_features: Number of entries of one example, whatever its shape.
        out_features: Number of outputs for it.
        bias: Whether to add a constant.
        seed: Seed of the initial weights; the global random state is not changed.

    Raises:
        InputError: A size is not a positive whole number, or the seed is invalid.

    >>> sum(p.numel() for p in linear(2).parameters())
    3
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if type(size) is not int or size < 1:
            raise InputError(f"{name} is {size!r}; it must be a whole number, 1 or more")
    if not isinstance(bias, bool):
        raise InputError(f"bias is {bias!r}; it must be True or False")
    with seeded(seed):
        output = nn.Linear(in_features, out_features, bias=bias)
        return _sequential(False, flatten=nn.Flatten(), output=output)


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp2": mlp2,
    "mlp3": mlp3,
    "cnn": cnn,
    "linear": linear,
}


def build_network(
    name: str, arguments: Mapping[str, object] | None = None, *, seed: int = 0
) -> nn.Module:
    """Build a network from its name.

    A ``module:callable`` is imported and called, so name only code you trust. The current directory
    is searched last, after Python's usual path.

    Args:
        name: One of `NETWORKS`, or ``module:callable`` such as ``torchvision.models:resnet18``.
        arguments: Keyword arguments for the network.
        seed: Seed of the initial weights: same seed, same weights. The global random state is not
            changed.

    Returns:
        The network, on the device and in the mode in which it was built.

    Raises:
        InputError: The name is unknown, the import fails, the arguments are wrong, or the result is
            not a `torch.nn.Module`.

    >>> build_network("mlp2", {"activation": "tanh"}).activation
    Tanh()
    """
    arguments = dict(arguments or {})
    if name in NETWORKS:
        try:
            return NETWORKS[name](seed=seed, **arguments)
        except TypeError as error:
            raise InputError(
                f"network {name!r} cannot be built from {arguments}: {error}"
            ) from error
    if not is_code_name(name):
        known = ", ".join(NETWORKS)
        raise InputError(f"unknown network {name!r}; give one of {known}, or module:callable")
    with seeded(seed):
        network = call_by_name(name, arguments)
    if not isinstance(network, nn.Module):
        raise InputError(f"{name} returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def _activation(name: str) -> Callable[[], nn.Module]:
    """Look an activation up by name."""
    if name not in ACTIVATIONS:
        raise InputError(f"unknown activation {name!r}; give one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _sequential(softmax: bool, **layers: nn.Module) -> nn.Sequential:
    """Chain named layers, so that parameters are named ``hidden.weight``, not ``1.weight``."""
    if softmax:
        layers["softmax"] = nn.Softmax(dim=1)
    return nn.Sequential(OrderedDict(layers))
