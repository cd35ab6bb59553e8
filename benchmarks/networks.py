"""The networks and data that benchmarks run on.

Weights are those of initialisation and data are random where only costs are measured: what a
product takes depends on neither. The paper's networks can also be trained on images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from hvpspec.zoo import Dataset, TrainingSettings, build_network, cnn, mlp2, train


@dataclass(frozen=True)
class Problem:
    """A network with data: inputs (N, ...) and targets (N, ...) for cross-entropy."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    batch_size: int

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The data in batches, as a loader would give them."""
        pairs = zip(
            self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True
        )
        return list(pairs)


class Block(nn.Module):
    """A transformer's block: attention and a perceptron, each on a normalised residual stream."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model over 256 tokens, of four blocks of width 128: 0.87 million parameters."""

    def __init__(self, vocabulary: int = 256, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).mT


class ViT(nn.Module):
    """A vision transformer on 32 x 32 images in patches of 4 x 4, of four blocks of width 128."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def resnet18() -> nn.Module:
    """ResNet-18 as it is used on 32 x 32 images: 11.2 million parameters."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def perceptron() -> nn.Module:
    """A perceptron 300-24-24-10, narrower than the paper's."""
    return nn.Sequential(
        nn.Linear(300, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10)
    )


def small_cnn(inputs: int, channels: int) -> Callable[[], nn.Module]:
    """A convolutional network of two layers with few channels on images of 20 x 20."""
    return lambda: nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1), nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(25 * channels, 10),
    )  # fmt: skip


def _images(shape: tuple[int, ...], batch_size: int) -> Callable[[nn.Module], Problem]:
    return lambda model: Problem(
        model, torch.randn(shape), torch.randint(10, shape[:1]), batch_size
    )


def _tokens(sequences: int, batch_size: int) -> Callable[[nn.Module], Problem]:
    def make(model: nn.Module) -> Problem:
        tokens = torch.randint(256, (sequences, 65))
        return Problem(model, tokens[:, :-1], tokens[:, 1:], batch_size)

    return make


_MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Problem]]] = {
    "mlp2": (lambda: mlp2("tanh"), _images((10_000, 1, 28, 28), 1000)),
    "cnn": (lambda: cnn("tanh"), _images((2_000, 1, 28, 28), 500)),
    "perceptron": (perceptron, _images((2_000, 300), 500)),
    "cnn4": (small_cnn(4, 4), _images((512, 4, 20, 20), 256)),
    "cnn8": (small_cnn(3, 8), _images((512, 3, 20, 20), 256)),
    "gpt": (GPT, _tokens(16, 8)),
    "vit": (ViT, _images((64, 3, 32, 32), 32)),
    "resnet18": (resnet18, _images((16, 3, 32, 32), 8)),
}
NAMES = tuple(_MAKERS)


def problem(name: str) -> Problem:
    """Build a problem by its name, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build, data = _MAKERS[name]
        return data(build().eval())


def trained(name: str, activation: str, images: Dataset, *, epochs: int, side: int = 28) -> Problem:
    """A network of the paper after some training, with its data.

    Args:
        name: of the network.
        activation: of its hidden layers.
        images: shape (N, 1, 28, 28).
        epochs: of training.
        side: pixels that the images of a perceptron are shrunk to, for a quick look: 28, 14 or 7.
    """
    model, inputs = build_network(name, {"activation": activation}), images.inputs
    if side != 28:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.hidden = nn.Linear(side**2, model.hidden.out_features)
        inputs = F.avg_pool2d(inputs, 28 // side)
    data = Dataset(images.name, inputs, images.targets)
    history = train(model, data, TrainingSettings(epochs=epochs))
    print(f"{name}, {activation}: trained to loss {history.loss:.4f}", flush=True)
    return Problem(model, inputs, images.targets, len(inputs))
