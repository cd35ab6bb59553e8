"""What is claimed affine must be affine, and what the paper's bounds rest on must be claimed."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from hvpspec import HessianOperator, Loss, structural_upper_bound
from hvpspec.curvature import graph, structure
from hvpspec.curvature.structure import (
    FlatDirections,
    affine_in,
    affine_together,
    ignores_shifts,
    index_bound,
    is_convex,
    last_weight,
)
from hvpspec.errors import InputError


def names_of(model: nn.Module, *inputs: Tensor) -> list[str]:
    """The layers found affine on one batch."""
    outputs, layers = [model(*inputs)], {}
    for name, parameter in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    return [name for name, leaves in layers.items() if affine_in(outputs, leaves)]


# --- operations: what is claimed of each is measured -------------------------------------------


class Case:
    """A function of tensors of given shapes; all entries are standard normal, plus ``shift``."""

    def __init__(
        self, function: Callable[..., Tensor], *shapes: tuple[int, ...], shift: float = 0.0
    ):
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.args = [
            torch.randn(shape, generator=generator, dtype=torch.float64) + shift for shape in shapes
        ]

    def node_names(self) -> set[str]:
        """The names of all nodes in the graph of the function."""
        outputs = self.function(*[arg.clone().requires_grad_() for arg in self.args])
        return {node.name() for node in graph.nodes([outputs])}

    def claimed(self, subset: tuple[int, ...]) -> bool:
        """What ``affine_in`` says for some of the arguments while the others are constants."""
        args = [arg.clone().requires_grad_(i in subset) for i, arg in enumerate(self.args)]
        return affine_in([self.function(*args)], [args[i] for i in subset])

    def measured(self, subset: tuple[int, ...]) -> bool:
        """Whether the second difference along a random direction in ``subset`` vanishes."""
        generator = torch.Generator().manual_seed(1)
        direction = [
            torch.randn(arg.shape, generator=generator, dtype=torch.float64) * (i in subset)
            for i, arg in enumerate(self.args)
        ]
        below, here, above = (
            self.function(*[a + h * d for a, d in zip(self.args, direction, strict=True)]).detach()
            for h in (-1e-4, 0.0, 1e-4)
        )
        # A curvature of order 1 gives 1e-8; round-off gives 1e-15.
        return bool((above - 2 * here + below).abs().max() < 1e-12)


def batch_norm(training: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        return F.batch_norm(x, mean, var, weight, bias, training)

    return function


ROWS = torch.tensor([2, 0, 1, 1])
INDEX = torch.tensor([[0, 1, 2], [2, 0, 1]])
MASK = torch.tensor([[True, False, True], [False, False, True]])
aten = torch.ops.aten

CASES = [
    # moved, copied, selected, put together
    Case(aten.alias, (2, 3)),
    Case(lambda x: x.as_strided((2, 2), (1, 2)), (2, 3)),
    Case(lambda x, y: torch.cat([x, y]), (2, 3), (1, 3)),
    Case(lambda x: x.clone().diagonal(), (3, 3)),
    Case(lambda x: F.embedding(ROWS, x), (3, 2)),
    Case(lambda x: x.expand(4, 3), (1, 3)),
    Case(lambda x: x.flip(0).roll(1), (5,)),
    Case(lambda x: x.gather(0, INDEX), (3, 3)),
    Case(lambda x: x[ROWS], (3, 2)),
    Case(lambda x, y: x.index_add(0, ROWS, y), (3, 2), (4, 2)),
    Case(lambda x, y: x.index_put((ROWS[:3],), y), (3, 2), (3, 2)),
    Case(lambda x, y: x.index_put((ROWS,), y, accumulate=True), (3, 2), (4, 2)),
    Case(lambda x: x.index_select(0, ROWS), (3, 2)),
    Case(lambda x: x.masked_fill(MASK, 2.0), (2, 3)),
    Case(lambda x, y: x.masked_fill(MASK, y), (2, 3), ()),
    Case(lambda x: x.masked_select(MASK), (2, 3)),
    Case(lambda x: x.permute(2, 0, 1).transpose(0, 1), (2, 3, 4)),
    Case(lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 2)),
    Case(lambda x: F.pixel_unshuffle(x, 2), (1, 1, 4, 4)),
    Case(lambda x: x.repeat(2, 2), (2, 3)),
    Case(lambda x: aten._reshape_alias(x, (3, 2), (2, 1)), (2, 3)),
    Case(lambda x: aten._unsafe_view(x, (3, 2)), (2, 3)),
    Case(lambda x, y: x.scatter(0, INDEX, y), (3, 3), (2, 3)),
    Case(lambda x: x.scatter(0, INDEX, 2.0), (3, 3)),
    Case(lambda x, y: x.scatter_add(0, INDEX, y), (3, 3), (2, 3)),
    Case(lambda x: x[:, 1] + x.select(1, 0) + x[:, 1:].sum(), (2, 3)),
    Case(lambda x: x.split(2)[1] + x.split([3, 2])[1] + x.chunk(2)[1], (5, 1)),
    Case(lambda x: x.squeeze() + x.squeeze(1) + x.squeeze((0, 1)), (1, 1, 3)),
    Case(lambda x, y: torch.stack([x, y]), (3,), (3,)),
    Case(lambda x: x.t().reshape(-1), (2, 3)),
    Case(aten._to_copy, (2, 3)),
    Case(lambda x: x.tril() + x.triu(1), (3, 3)),
    Case(lambda x: x.unbind()[1], (3, 2)),
    Case(lambda x: x.unfold(0, 2, 1).unsqueeze(0), (5,)),
    Case(lambda x: x.view(3, 2), (2, 3)),
    Case(lambda x, y: torch.where(MASK, x, y), (2, 3), (2, 3)),
    # sums, multiples, activations, comparisons
    Case(torch.abs, (5,)),
    Case(torch.add, (3,), (3,)),
    Case(lambda x: aten.add(x, 1.0), (3,)),
    Case(lambda x: aten.add.Scalar(x, 1.0), (3,)),
    Case(lambda x: x.amax(1) + x.amin(1), (3, 4)),
    Case(lambda x, y, z: torch.clamp(x, y, z), (9,), (9,), (9,)),
    Case(lambda x: x.clamp(-0.5, 0.5) + x.clamp_min(0.1) + x.clamp_max(0.3), (9,)),
    Case(lambda x, y: torch.clamp_min(x, y) + torch.clamp_max(x, y), (9,), (9,)),
    Case(lambda x: x.cumsum(0), (5,)),
    Case(lambda x: aten.div.Scalar(x, 2.0), (3,)),
    Case(F.hardsigmoid, (9,), shift=2.0),
    Case(F.hardtanh, (9,)),
    Case(F.relu6, (9,)),
    Case(F.leaky_relu, (9,)),
    Case(lambda x: F.leaky_relu(x.clone(), inplace=True), (9,)),
    Case(lambda x: x.max() + x.max(0).values + x.min() + x.min(0).values, (4, 3)),
    Case(lambda x, y: torch.maximum(x, y) + torch.minimum(x, y.flip(0)), (9,), (9,)),
    Case(lambda x: x.mean() + x.mean(0) + x.sum() + x.sum(0), (4, 3)),
    Case(lambda x: aten.mul.Scalar(x, 2.0), (3,)),
    Case(lambda x: -x, (3,)),
    Case(torch.relu, (9,)),
    Case(lambda x: F.relu(x.clone(), inplace=True), (9,)),
    Case(torch.rsub, (3,), (3,)),
    Case(lambda x: 1 - x, (3,)),
    Case(F.softshrink, (9,)),
    Case(torch.sub, (3,), (3,)),
    Case(lambda x: aten.sub.Scalar(x, 1.0), (3,)),
    Case(lambda x: F.threshold(x, 0.1, 0.0), (9,)),
    # pooling, padding, resampling
    Case(lambda x: F.adaptive_avg_pool2d(x, 2), (1, 5, 5)),
    Case(lambda x: F.adaptive_avg_pool3d(x, 2), (1, 3, 3, 3)),
    Case(lambda x: F.adaptive_max_pool2d(x, 2), (1, 5, 5)),
    Case(lambda x: F.adaptive_max_pool3d(x, 2), (1, 3, 3, 3)),
    Case(lambda x: F.avg_pool1d(x, 2), (1, 6)),
    Case(lambda x: F.avg_pool2d(x, 2), (1, 4, 4)),
    Case(lambda x: F.avg_pool3d(x, 2), (1, 4, 4, 4)),
    Case(lambda x: F.fold(F.unfold(x, 2), (3, 3), 2), (1, 1, 3, 3)),
    Case(lambda x: F.pad(x, (1, 1)), (1, 4)),
    Case(lambda x: F.max_pool1d(x, 2), (1, 6)),
    Case(lambda x: F.max_pool2d(x, 2), (1, 4, 4)),
    Case(lambda x: F.max_pool3d(x, 2), (1, 4, 4, 4)),
    *(
        Case(lambda x, mode=mode, d=d: F.pad(x, (1, 1) * d, mode=mode), (1, 1, *(3,) * d))
        for mode in ("reflect", "replicate")
        for d in (1, 2, 3)
    ),
    *(
        Case(lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), (1, 1, *(3,) * d))
        for mode, d in [
            *(("nearest", d) for d in (1, 2, 3)),
            ("linear", 1),
            ("bilinear", 2),
            ("trilinear", 3),
        ]
    ),
    # products, with each argument's place
    Case(torch.addbmm, (2, 4), (5, 2, 3), (5, 3, 4)),
    Case(torch.addcmul, (3,), (3,), (3,)),
    Case(torch.addmm, (4,), (2, 3), (3, 4)),
    Case(torch.addmv, (2,), (2, 3), (3,)),
    Case(torch.addr, (2, 3), (2,), (3,)),
    Case(torch.baddbmm, (5, 2, 4), (5, 2, 3), (5, 3, 4)),
    Case(torch.bmm, (5, 2, 3), (5, 3, 4)),
    Case(lambda x, w, b: F.conv1d(x, w, b), (2, 3, 5), (4, 3, 2), (4,)),
    Case(lambda x, w: F.conv1d(x, w), (2, 3, 5), (4, 3, 2)),
    Case(lambda x, w, b: F.conv2d(x, w, b, groups=2), (1, 4, 3, 3), (2, 2, 2, 2), (2,)),
    Case(lambda x, w, b: F.conv3d(x, w, b), (1, 1, 3, 3, 3), (1, 1, 2, 2, 2), (1,)),
    Case(lambda x, w, b: F.conv_transpose2d(x, w, b), (1, 2, 3, 3), (2, 1, 2, 2), (1,)),
    Case(torch.div, (3,), (3,), shift=3.0),
    Case(torch.dot, (3,), (3,)),
    Case(lambda x, w, b: F.linear(x, w, b), (5, 3), (2, 3), (2,)),
    Case(lambda x, w, b: F.linear(x, w, b), (3,), (2, 3), (2,)),
    Case(lambda x, w, b: F.linear(x, w, b), (5, 4, 3), (2, 3), (2,)),
    Case(lambda x, w, b: F.linear(x.mT, w, b), (5, 3, 4), (2, 3), (2,)),
    Case(lambda x, w: F.linear(x, w), (5, 4, 3), (2, 3)),
    Case(torch.mm, (2, 3), (3, 4)),
    Case(torch.mul, (3,), (3,)),
    Case(torch.mv, (2, 3), (3,)),
    Case(torch.matmul, (5, 1, 2, 3), (6, 3, 4)),
    Case(lambda x, y: torch.einsum("bij,kj->bki", x, y), (5, 2, 3), (4, 3)),
    Case(F.prelu, (4, 3), (3,)),
    Case(lambda x, w, b: F.group_norm(x, 2, w, b), (2, 4, 3), (4,), (4,)),
    Case(lambda x: F.group_norm(x, 2), (2, 4, 3)),
    Case(lambda x, w, b: F.layer_norm(x, (3,), w, b), (4, 3), (3,), (3,)),
    Case(lambda x, w: F.layer_norm(x, (3,), w), (4, 3), (3,)),
    Case(lambda x, w: F.rms_norm(x, (3,), w), (4, 3), (3,)),
    Case(batch_norm(training=False), (4, 3), (3,), (3,)),
    Case(batch_norm(training=True), (4, 3), (3,), (3,)),
    Case(lambda x: F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double()), (4, 3)),
    Case(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2, 3, 4), (3,), (3,)),
    Case(lambda x, y, w, b: F.bilinear(x, y, w, b), (4, 3), (4, 2), (5, 3, 2), (5,)),
    # curved operations
    Case(torch.tanh, (3,)),
    Case(lambda x: x.softmax(0), (3,)),
    Case(lambda x: x**2, (3,)),
    Case(lambda x: x * x, (3,)),
    Case(lambda x, y: torch.outer(x, y), (3,), (2,)),
    Case(torch.prod, (3,)),
    Case(F.gelu, (3,)),
    Case(torch.cdist, (3, 2), (4, 2)),
    Case(F.scaled_dot_product_attention, (1, 3, 2), (1, 3, 2), (1, 3, 2)),
]

# Reached on other devices only.
ELSEWHERE = {"CudnnBatchNormBackward0", "MiopenBatchNormBackward0", "LinearBackward0"}


@pytest.mark.parametrize("case", CASES)
def test_an_operation_is_claimed_affine_only_where_it_is(case: Case) -> None:
    known = structure._PIECEWISE_LINEAR | structure._ROLES.keys() | structure._BATCH_NORMS
    all_known = case.node_names() <= known | {"torch::autograd::AccumulateGrad"}
    indices = range(len(case.args))
    for size in range(1, len(case.args) + 1):
        for subset in itertools.combinations(indices, size):
            claimed, measured = case.claimed(subset), case.measured(subset)
            assert measured or not claimed, subset
            assert claimed or not (measured and all_known), subset


def test_every_operation_in_the_tables_has_been_measured() -> None:
    met = set.union(*(case.node_names() for case in CASES))
    assert met >= structure._PIECEWISE_LINEAR
    assert (structure._ROLES.keys() | structure._BATCH_NORMS) - ELSEWHERE <= met


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_operations_of_other_devices_are_spelled_as_torch_does(name: str) -> None:
    node = getattr(torch._C._functions, name)
    assert "BatchNorm" not in name or hasattr(node, "_saved_training")


# --- networks -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """``x + V relu(W x)`` and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.outer(torch.relu(self.inner(x))))


class TwoLayer(nn.Module):
    """``W2 relu(W1 x)``, with one matrix for both if ``tied``."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Recurrent(nn.Module):
    """One ReLU layer used twice, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))


class TiedEmbedding(nn.Module):
    """A bag of words whose logits use the embedding again, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(4, 3), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        features = torch.relu(self.hidden(self.embedding(tokens)))
        return F.linear(features, self.embedding.weight)


class ReusedHead(nn.Module):
    """A head whose weight also scales its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.head.weight))


class Attention(nn.Module):
    """A transformer block of one head, and the classifier after it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x)[0]).mean(1))


class Sequence(nn.Module):
    """The last state of an LSTM, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class PassOn(torch.autograd.Function):
    """The identity, as a function that autograd cannot look into."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return PassOn.apply(x)


class TopLevel(nn.Module):
    """Two parameters that belong to no submodule and are affine together."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


def mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), activation, nn.Linear(3, 3), activation, nn.Linear(3, 3))


def convolutional(*middle: nn.Module) -> nn.Sequential:
    """A convolution of 1 x 4 x 4 images to two channels, ``middle`` (halving the size), a head."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), *middle, nn.Flatten(), nn.Linear(8, 3))


def trained_batch_norm() -> nn.BatchNorm2d:
    """A batch normalisation whose running statistics are not the trivial ones."""
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0])
    return norm


FLAT, IMAGES, SERIES = (6, 4), (6, 1, 4, 4), (6, 3, 4)
POOL = nn.MaxPool2d(2)

# name: (network, shape of the input, affine layers, layers that are truly curved)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], list[str]]] = {
    "relu": (lambda: mlp(nn.ReLU()), FLAT, ["0", "2", "4"], []),
    "leaky relu": (lambda: mlp(nn.LeakyReLU(0.1)), FLAT, ["0", "2", "4"], []),
    "prelu": (lambda: mlp(nn.PReLU()), FLAT, ["0", "2", "4"], ["1"]),
    "tanh": (lambda: mlp(nn.Tanh()), FLAT, ["4"], ["0", "2"]),
    "softplus": (lambda: mlp(nn.Softplus()), FLAT, ["4"], ["0", "2"]),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), FLAT, [], ["0"]),
    "max pool": (lambda: convolutional(nn.ReLU(), POOL), IMAGES, ["0", "4"], []),
    "avg pool": (lambda: convolutional(nn.ReLU(), nn.AvgPool2d(2)), IMAGES, ["0", "4"], []),
    "batch norm": (
        lambda: convolutional(trained_batch_norm(), nn.ReLU(), POOL).eval(),
        IMAGES,
        ["0", "1", "5"],
        [],
    ),
    "batch norm in training": (
        lambda: convolutional(nn.BatchNorm2d(2), nn.ReLU(), POOL),
        IMAGES,
        ["1", "5"],
        ["0"],
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 3)),
        FLAT,
        ["1", "3"],
        ["0"],
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2, stride=2, groups=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2, 2, 2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
        IMAGES,
        ["0", "2", "5"],
        [],
    ),
    "convolution in one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)),
        SERIES,
        ["0", "3"],
        [],
    ),
    "convolution in three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        (6, 1, 3, 3, 3),
        ["0", "3"],
        [],
    ),
    "residual": (Residual, FLAT, ["inner", "outer", "head"], []),
    "two layers": (lambda: TwoLayer(tied=False), (6, 3), ["first", "second"], []),
    "tied layers": (lambda: TwoLayer(tied=True), (6, 3), [], ["first"]),
    "layer used twice": (Recurrent, FLAT, ["head"], ["layer"]),
    "tied embedding": (TiedEmbedding, (6,), ["hidden"], ["embedding"]),
    "reused head": (ReusedHead, (6, 3), [], ["head"]),
    "attention": (Attention, SERIES, ["norm", "head"], ["attention"]),
    "lstm": (Sequence, (6, 3, 2), ["head"], ["lstm"]),
    "unknown function": (lambda: nn.Sequential(nn.Linear(4, 3), Opaque()), FLAT, [], []),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3, bias=False))),
        FLAT,
        [],
        ["0.parametrizations.weight"],
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3, bias=False))).eval(),
        FLAT,
        [],
        ["0.parametrizations.weight"],
    ),
    "top level": (TopLevel, (6, 3), [""], []),
}


def problem(name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 with fresh parameters, inputs, and class labels."""
    make, shape, _, _ = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        for p in model.parameters():  # off the symmetric points where initialisation likes to sit
            p.data += 0.3 * torch.randn_like(p)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "tied embedding":
        inputs = torch.randint(4, shape, generator=generator)
    return model, inputs, torch.randint(3, (len(inputs),), generator=generator)


def layer_parameters(model: nn.Module, layer: str) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] == layer}


def layer_spectrum(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """Eigenvalues of the dense Hessian of the loss in one layer's parameters."""
    parameters = layer_parameters(model, layer)
    sizes = [p.numel() for p in parameters.values()]

    def objective(vector: Tensor) -> Tensor:
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        # A running mean that moves would make the function depend on how often it is called.
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        values = {n: part.view_as(p) for (n, p), part in parts}
        return loss(functional_call(model, buffers | values, x), y)

    theta = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    return torch.linalg.eigvalsh(hessian(objective, theta))


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_found_affine(name: str) -> None:
    model, x, _ = problem(name, seed=0)
    assert names_of(model, x) == NETWORKS[name][2]


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_is_positive_semidefinite_on_affine_layers(name: str) -> None:
    for seed in range(3):
        model, x, y = problem(name, seed)
        one_hot = F.one_hot(y, 4 if name == "tied embedding" else 3).double()
        for layer in names_of(model, x):
            for loss, targets in ((nn.CrossEntropyLoss(), y), (nn.MSELoss(), one_hot)):
                spectrum = layer_spectrum(model, loss, x, targets, layer)
                assert spectrum[0] >= -1e-10 * spectrum.abs().max()


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, case in NETWORKS.items() for layer in case[3]]
)
def test_curved_layers_do_have_negative_eigenvalues(name: str, layer: str) -> None:
    def lowest(seed: int) -> float:
        model, x, y = problem(name, seed)
        spectrum = layer_spectrum(model, nn.CrossEntropyLoss(), x, y, layer)
        return float(spectrum[0] / spectrum.abs().max())

    assert any(lowest(seed) < -1e-6 for seed in range(20))


@pytest.mark.parametrize(
    ("model", "shape", "dim", "cross_entropy", "mse"),
    [
        (nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10)), (2, 784), 7960, 90, 100),
        (
            nn.Sequential(
                nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10)
            ),
            (2, 784),
            8070,
            190,
            200,
        ),
        (
            nn.Sequential(nn.Linear(784, 10), nn.Tanh(), nn.Linear(10, 10)),
            (2, 784),
            7960,
            7850,
            7850,
        ),
        (
            nn.Sequential(
                *(nn.Conv2d(1, 1, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(1, 1, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(49, 10)),
            ),
            (2, 1, 28, 28),
            552,
            52,
            52,
        ),
    ],
)
def test_bounds_for_the_networks_of_the_paper(
    model: nn.Module, shape: tuple[int, ...], dim: int, cross_entropy: int, mse: int
) -> None:
    assert sum(p.numel() for p in model.parameters()) == dim
    x = torch.randn(shape)
    labels, values = torch.tensor([3, 7]), torch.randn(2, 10)
    for loss, targets, bound in (
        (nn.CrossEntropyLoss(), labels, cross_entropy),
        (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), labels, cross_entropy),
        (nn.MSELoss(), values, mse),
    ):
        found = structural_upper_bound(model, loss, (x, targets))
        assert found is not None
        assert (found.upper, found.psd_dim) == (bound, dim - bound)


def flat_basis(model: nn.Module, found: FlatDirections) -> Tensor:
    """The directions as columns, shape (n, number of directions)."""
    columns = []
    for name, parameter in model.named_parameters():
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        if name in found.parameters:
            for i in range(parameter.numel()):
                zeros[name].view(-1)[i] = 1
                columns.append(torch.cat([p.flatten() for p in zeros.values()]))
                zeros[name].view(-1)[i] = 0
        elif name == found.shifted:
            for j in range(parameter.shape[1]):
                zeros[name][:, j] = 1
                columns.append(torch.cat([p.flatten() for p in zeros.values()]))
                zeros[name][:, j] = 0
    return torch.stack(columns, dim=1).detach()


# The operator refuses PyTorch's weight_norm, whose second derivative is wrong.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "weight norm"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_hessian_is_positive_semidefinite_on_all_flat_directions(
    name: str, loss: nn.Module
) -> None:
    for seed in range(2):
        model, x, y = problem(name, seed)
        outputs = model(x)
        parameters = dict(model.named_parameters())
        together = affine_together([outputs], parameters)
        shifted = last_weight(outputs, parameters) if ignores_shifts(loss) else None
        found = FlatDirections(together, None if shifted in together else shifted)
        classes = outputs.shape[-1]
        targets = y if ignores_shifts(loss) else F.one_hot(y, classes).double()
        H = HessianOperator(model.eval(), loss, (x, targets)).to_dense()
        bound = structural_upper_bound(model, loss, (x, targets))
        values = torch.linalg.eigvalsh(H)
        scale = float(values.abs().max())
        if not found.parameters:
            assert bound is None
            continue
        B = flat_basis(model, found)
        assert bound is not None
        assert bound.psd_dim == B.shape[1] == torch.linalg.matrix_rank(B)
        assert torch.linalg.eigvalsh(B.T @ H @ B)[0] >= -1e-10 * scale * float((B.T @ B).norm())
        assert int((values < -1e-10 * scale).sum()) <= bound.upper == len(H) - bound.psd_dim


def test_the_bound_is_attained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 5)).double()
    x, y = torch.randn(400, 20).double(), torch.randint(5, (400,))
    values = torch.linalg.eigvalsh(HessianOperator(model, nn.CrossEntropyLoss(), (x, y)).to_dense())
    bound = structural_upper_bound(model, nn.CrossEntropyLoss(), (x, y))
    assert bound is not None
    assert int((values < -1e-10 * values.abs().max()).sum()) == bound.upper == 16


# --- the interface ------------------------------------------------------------------------------


def test_layers_together_are_not_affine_though_each_is() -> None:
    model, x, _ = problem("relu", 0)
    outputs = [model(x)]
    assert all(affine_in(outputs, [p]) for p in model.parameters())
    assert affine_in(outputs, list(model[0].parameters()))
    assert not affine_in(outputs, [model[0].weight, model[2].weight])


def test_every_output_counts() -> None:
    W = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(3)
    assert affine_in([W @ x, x, W], [W])
    assert not affine_in([W @ x, torch.tanh(W @ x)], [W])


def test_outputs_that_do_not_depend_on_a_leaf_are_affine_in_it() -> None:
    W, unused = torch.randn(3, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    assert affine_in([torch.tanh(W)], [unused])
    assert affine_in([torch.zeros(3)], [W])


def test_shared_nodes_are_found_dependent_on_every_path() -> None:
    W = torch.randn(3, requires_grad=True)
    shared = torch.relu(W)
    assert affine_in([shared + shared], [W])
    assert not affine_in([shared * shared], [W])
    assert not affine_in([shared * W.sum()], [W])


def test_directions_must_be_flat_on_every_batch() -> None:
    class Odd(nn.Sequential):
        """Bends only where it is told to."""

        def forward(self, x: Tensor, bends: bool) -> Tensor:
            y = super().forward(x)
            return torch.tanh(y) if bends else y

    model = Odd(nn.Linear(3, 2))
    x, y = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]]), torch.tensor([0, 1])
    loss = nn.CrossEntropyLoss()
    batches = [
        {"x": x[:1], "bends": False, "labels": y[:1]},
        {"x": x[1:], "bends": True, "labels": y[1:]},
    ]
    assert structural_upper_bound(model, loss, batches[0]).upper == 0  # type: ignore[union-attr]
    assert structural_upper_bound(model, loss, batches[1]) is None
    assert structural_upper_bound(model, loss, batches) is None
    one, other = FlatDirections(("a", "b"), "w"), FlatDirections(("b", "c"), "w")
    assert one.common(other) == FlatDirections(("b",), "w")
    assert one.common(FlatDirections(("a",))) == FlatDirections(("a",))


def test_only_the_given_parameters_are_found() -> None:
    model, x, _ = problem("relu", 0)
    assert affine_together([model(x)], {"2.bias": model[2].bias}) == ("2.bias",)
    assert last_weight(model(x), {"2.bias": model[2].bias}) is None


def test_parameters_are_tried_from_the_largest_module() -> None:
    wide = nn.Sequential(nn.Linear(30, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    narrow = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 30)).double()
    found = [
        affine_together([model(torch.ones(1, size).double())], dict(model.named_parameters()))
        for model, size in ((wide, 30), (narrow, 2))
    ]
    assert found == [("0.weight", "0.bias", "2.bias"), ("2.weight", "2.bias")]
    W = torch.randn(3, requires_grad=True)
    assert affine_together([W * W], {"w": W}) == ()


def test_nothing_is_claimed_of_what_is_not_seen() -> None:
    x = torch.randn(12, 4)

    class Normal(nn.Sequential):
        """Returns its tensors in an object."""

        def forward(self, x: Tensor) -> torch.distributions.Normal:
            return torch.distributions.Normal(super().forward(x), 1.0)

    def likelihood(outputs: torch.distributions.Normal, targets: Tensor) -> Tensor:
        return -outputs.log_prob(targets).mean()

    model = Normal(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    loss = Loss(likelihood, convex=True)
    assert structural_upper_bound(model, loss, (x, torch.randn(12, 3))) is None

    class Hidden(nn.Module):
        """Computes a part anew in the backward pass, by a function that hides its parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            part = checkpoint(
                lambda z: torch.tanh(self.middle(z)), self.first(x), use_reentrant=True
            )
            return self.last(part)

    hidden = Hidden()
    found = affine_together([hidden(x)], dict(hidden.named_parameters()))
    assert found == ("last.weight", "last.bias")


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_losses_that_were_changed_are_not_known(how: str) -> None:
    loss, z, labels = nn.CrossEntropyLoss(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert is_convex(loss, z, labels)
    if how == "hook":
        loss.register_forward_hook(lambda module, inputs, value: -value)
    else:
        loss.forward = lambda outputs, targets: -outputs.sum()  # type: ignore[method-assign]
    assert not is_convex(loss, z, labels)
    assert not ignores_shifts(loss)


def test_a_last_weight_is_used_for_nothing_else() -> None:
    layer = nn.Linear(3, 3)
    own = dict(layer.named_parameters())
    x = torch.randn(4, 3)
    assert last_weight(layer(x), own) == "weight"
    assert last_weight(nn.functional.linear(x, layer.weight), own) == "weight"
    assert last_weight(layer(layer(x)), own) is None
    assert last_weight(layer(x) + layer.weight.sum(), own) is None
    assert last_weight(layer(x).relu(), own) is None
    assert last_weight(layer(x[None]), own) is None
    assert last_weight(x @ layer.weight, own) is None  # its columns belong to outputs
    assert last_weight((layer(x),), own) is None
    assert last_weight(x, own) is None


def test_inplace_changes_of_views_are_not_claimed() -> None:
    W = torch.randn(3, requires_grad=True)
    y = W.clone()
    y[:1].mul_(W[1:2])
    assert not affine_in([y], [W])


def test_deep_networks_need_no_recursion() -> None:
    W = torch.randn(2, requires_grad=True)
    y = W
    for _ in range(20_000):
        y = torch.relu(y + 1)
    assert affine_in([y], [W])
    assert not affine_in([y * W], [W])


def test_a_node_is_visited_once_however_many_paths_lead_to_it() -> None:
    W = torch.randn(2, requires_grad=True)
    y = W
    for _ in range(200):
        y = (y + y) / 2
    assert affine_in([y], [W])


def test_the_graph_stays_usable_and_is_let_go() -> None:
    class Probe:
        """Lives as long as the node that holds it."""

    model, x, _ = problem("relu", 0)
    outputs, probe = model(x), Probe()
    outputs.grad_fn.metadata["probe"] = probe
    alive = weakref.ref(probe)
    del probe
    assert affine_together([outputs], dict(model.named_parameters()))
    assert all(p.grad is None for p in model.parameters())
    outputs.sum().backward()
    assert alive() is not None
    del outputs
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("leaf", [torch.ones(2), torch.ones(2, requires_grad=True) * 2])
def test_only_leaves_that_require_gradients_can_be_asked_about(leaf: Tensor) -> None:
    with pytest.raises(InputError, match="is_leaf"):
        affine_in([leaf], [leaf])


def test_index_bound_says_where_it_comes_from() -> None:
    shapes = {"body.head.weight": (2, 2), "body.head.bias": (2,), "foot": (3,), "last.w": (5, 7)}
    names = ("body.head.weight", "body.head.bias", "foot")
    bound = index_bound(shapes, FlatDirections(names))
    assert (bound.upper, bound.psd_dim) == (35, 9)
    assert "in the 9 parameters of 'body.head', 'foot' together, so" in bound.reason
    part = index_bound(shapes, FlatDirections(names[:1], "last.w"))
    assert (part.upper, part.psd_dim) == (44 - 11, 11)
    assert "4 parameters of 'body.head.weight' together, and blind to equal" in part.reason
    assert "shifts of all rows of 'last.w' (7 directions), so" in part.reason
    many = {f"{i}.w": (1,) for i in range(7)}
    assert (
        "of '0', '1', '2', '3' and 2 more together"
        in index_bound(many, FlatDirections((*many,)[:6])).reason
    )
    nothing = index_bound(shapes, FlatDirections(()))
    assert (nothing.upper, nothing.psd_dim) == (44, 0)


# --- losses -------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 2, 1, 1])
PROBABILITIES = torch.tensor([[0.2, 0.8, 0.0]]).expand(4, 3).double()
SIGNS = torch.tensor([[1.0, -1.0, 1.0]]).expand(4, 3).double()
ANYTHING = torch.linspace(-2, 3, 12).double().reshape(4, 3)
POSITIVE, NEGATIVE = torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([1.0, -0.1, 2.0]).double()

CONVEX: list[tuple[nn.Module, Tensor]] = [
    (nn.CrossEntropyLoss(), LABELS),
    (nn.CrossEntropyLoss(reduction="sum", weight=POSITIVE, label_smoothing=0.1), LABELS),
    (nn.CrossEntropyLoss(ignore_index=1), LABELS),
    (nn.CrossEntropyLoss(weight=POSITIVE, label_smoothing=1.0), PROBABILITIES),
    (nn.MSELoss(), ANYTHING),
    (nn.BCEWithLogitsLoss(weight=POSITIVE, pos_weight=POSITIVE), PROBABILITIES),
    (nn.HuberLoss(delta=0.5), ANYTHING),
    (nn.SmoothL1Loss(beta=0.5), ANYTHING),
    (nn.L1Loss(), ANYTHING),
    (nn.SoftMarginLoss(), ANYTHING),
    (nn.MultiLabelSoftMarginLoss(weight=POSITIVE), PROBABILITIES),
    (nn.MultiLabelSoftMarginLoss(), ANYTHING),
    (nn.NLLLoss(weight=NEGATIVE), LABELS),
    (nn.PoissonNLLLoss(), ANYTHING),
    (nn.PoissonNLLLoss(full=True), ANYTHING),
    (nn.KLDivLoss(reduction="batchmean"), PROBABILITIES),
    (nn.KLDivLoss(reduction="sum", log_target=True), ANYTHING),
    (nn.HingeEmbeddingLoss(), SIGNS),
    (nn.HingeEmbeddingLoss(), ANYTHING),
]


@pytest.mark.parametrize(("loss", "targets"), CONVEX)
def test_convex_losses_are_known_and_convex(loss: nn.Module, targets: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 1.0, 5.0):
        outputs = scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)
        assert is_convex(loss, outputs, targets)
        H = hessian(lambda z: loss(z, targets), outputs).reshape(12, 12)
        spectrum = torch.linalg.eigvalsh(H)
        assert spectrum[0] >= -1e-12 * spectrum.abs().max()
        # The Hessian does not see a kink that bends down; chords do.
        other = scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)
        middle = loss((outputs + other) / 2, targets)
        assert middle <= (loss(outputs, targets) + loss(other, targets)) / 2 + 1e-12


class MyLoss(nn.MSELoss):
    """A subclass that may do anything."""


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(weight=NEGATIVE), LABELS),
        (nn.CrossEntropyLoss(), ANYTHING),
        (nn.CrossEntropyLoss(), PROBABILITIES * torch.nan),
        (nn.CrossEntropyLoss(label_smoothing=1.5), LABELS),
        (nn.BCEWithLogitsLoss(), ANYTHING),
        (nn.BCEWithLogitsLoss(weight=NEGATIVE), PROBABILITIES),
        (nn.BCEWithLogitsLoss(pos_weight=NEGATIVE), PROBABILITIES),
        (nn.MultiLabelSoftMarginLoss(weight=NEGATIVE), PROBABILITIES),
        (nn.PoissonNLLLoss(log_input=False), ANYTHING),
        (nn.GaussianNLLLoss(), ANYTHING),
        (nn.BCELoss(), PROBABILITIES),
        (nn.MSELoss(), ANYTHING.clone().requires_grad_()),
        (MyLoss(), ANYTHING),
        (F.mse_loss, ANYTHING),
    ],
)
def test_other_losses_are_not_claimed(loss: nn.Module, targets: Tensor) -> None:
    assert not is_convex(loss, torch.zeros(4, 3).double(), targets)


def test_only_a_single_tensor_is_known_to_be_convex_in() -> None:
    assert not is_convex(nn.MSELoss(), (torch.zeros(3), torch.zeros(3)), torch.zeros(3))
    assert not is_convex(nn.MSELoss(), torch.zeros(3), None)


def test_the_modulus_of_complex_numbers_is_curved() -> None:
    weight = torch.randn(4, 5, requires_grad=True)
    transformed = (torch.ones(3, 5) @ weight.T).to(torch.complex64) @ torch.eye(4).to(
        torch.complex64
    )
    assert not affine_in([(1j * transformed).abs()], [weight])
    assert affine_in([(torch.ones(3, 5) @ weight.T).abs()], [weight])
