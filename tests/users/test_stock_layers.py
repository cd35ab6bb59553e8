"""Every module of torch.nn with its options: the matrix is right, or refused with a reason.

The tables below name the modules; one that the installed PyTorch has and they do not is a failure.
The truth is by central differences of the gradient, and by double backward where the two agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpspec
from hvpspec import HessianOperator, HvpspecError, Loss
from tests.users.truth import ROUNDOFF, Function, check_message, relative_error

#: Examples in a batch.
N = 5

#: Central differences with a step of 1e-5 err by its square, and by u / step: 1e-10 times the
#: higher derivatives of a few layers. A wrong second derivative is off by a hundredth or more.
DIFFERENCES = 1e-5

#: Products in float32 through a handful of layers.
FLOAT32_ROUNDOFF = 2e-4

#: No layers, or none that one network holds.
NOT_LAYERS = {
    "Module": "the base class",
    "Container": "the base class of old",
    "Sequential": "holds layers",
    "ModuleList": "holds layers",
    "ModuleDict": "holds layers",
    "ParameterList": "holds parameters",
    "ParameterDict": "holds parameters",
    "RNNBase": "the base class of recurrent layers",
    "RNNCellBase": "the base class of recurrent cells",
    "DataParallel": "wraps networks",
    "NLLLoss2d": "an older name of NLLLoss",
}

#: What hvpspec refuses although PyTorch's second derivative is right there, and why.
REFUSED = {"BCELoss": "its second derivative is wrong where probabilities are 0 or 1"}


Call = Callable[[Any, Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Layer:
    """A layer and the shape of one example that it takes.

    Attributes:
        build: makes it.
        shape: of its input, without the examples.
        call: how it is called with the input h, the same input changed, k, and the data x; None
            for layer(h).
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Call | None = None


def each(
    kind: Any,
    shape: tuple[int, ...],
    *options: Any,
    call: Call | None = None,
) -> list[Layer]:
    """A layer with several sets of arguments: tuples, dictionaries or both in a pair."""
    layers = []
    for option in options or ((),):
        args, kwargs = option if isinstance(option, list) else (option, {})
        if isinstance(args, dict):
            args, kwargs = (), args
        layers.append(Layer(partial(kind, *args, **kwargs), shape, call))
    return layers


def second(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """With two inputs."""
    return layer(h, k)


def sequences(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """A recurrent layer: the outputs and the last state, the examples first."""
    if layer.batch_first:
        return layer(h)[0]
    return layer(h.transpose(0, 1))[0].transpose(0, 1)


def cell_twice(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """A recurrent cell, whose state of the first step enters the second."""
    return layer(k, layer(h))


def attention(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """Queries of one, keys and values of another."""
    if not layer.batch_first:
        h, k = h.transpose(0, 1), k.transpose(0, 1)
    out, weights = layer(h, k, k)
    return (out if layer.batch_first else out.transpose(0, 1)), weights


def encoder(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """A stack of attention over the examples' own positions."""
    inner = layer.layers[0] if hasattr(layer, "layers") else layer
    if inner.self_attn.batch_first:
        return layer(h)
    return layer(h.transpose(0, 1)).transpose(0, 1)


def decoder(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """The same with a memory."""
    inner = layer.layers[0] if hasattr(layer, "layers") else layer
    if inner.self_attn.batch_first:
        return layer(h, k)
    return layer(h.transpose(0, 1), k.transpose(0, 1)).transpose(0, 1)


def transformer(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """Both."""
    if layer.batch_first:
        return layer(h, k)
    return layer(h.transpose(0, 1), k.transpose(0, 1)).transpose(0, 1)


def unpool(dims: int) -> Call:
    """Put the maxima back where they were."""
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]

    def call(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
        values, where = pool(h, 2, return_indices=True)
        return layer(values * (0.2 + values), where, output_size=h.shape)

    return call


def entries(layer: Any, x: Tensor) -> Tensor:
    """Entries of a table for each example, all but the last, from the digits of the data."""
    digits = (x.double()[:, :1] * torch.tensor([1e2, 1e3, 1e4])).long()
    return digits % (layer.num_embeddings - 1)


def tokens(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    """Entries of a table, multiplied with what is learned before."""
    return layer(entries(layer, x)) * h[:, None]


def bags(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    return layer(entries(layer, x)) * h


def adaptive(layer: Any, h: Tensor, k: Tensor, x: Tensor) -> Any:
    return layer.log_prob(h)


def dims(n: int, size: int = 4, channels: int = 2) -> tuple[int, ...]:
    """The shape of an image of n dimensions."""
    return (channels, *(size,) * n)


def of_dims(
    name: str, *options: Any, size: int = 4, channels: int = 2, which: tuple[int, ...] = (1, 2, 3)
) -> dict[str, list[Layer]]:
    """The same layer in one, two and three dimensions."""
    return {
        f"{name}{n}d": each(getattr(nn, f"{name}{n}d"), dims(n, size, channels), *options)
        for n in which
    }


def activations() -> dict[str, list[Layer]]:
    plain = (
        "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Tanh", "Tanhshrink", "Softsign", "LogSigmoid",
        "Hardsigmoid", "Hardswish", "Mish", "Identity",
    )  # fmt: skip
    table = {name: each(getattr(nn, name), (4,)) for name in plain}
    for name, options in {
        "ELU": ((), (0.5,)), "CELU": ((), (0.5,)), "LeakyReLU": ((), (0.3,)),
        "GELU": ((), ("tanh",)), "Hardtanh": ((), (-0.5, 0.3)), "Hardshrink": ((), (0.1,)),
        "Softshrink": ((), (0.1,)), "Softplus": ((), (2.0, 1.0)), "Threshold": ((0.1, 0.2),),
        "PReLU": ((), (4,)), "RReLU": ((), (0.2, 0.4)), "GLU": ((),), "Softmax": ((1,),),
        "Softmin": ((1,),), "LogSoftmax": ((1,),),
    }.items():  # fmt: skip
        table[name] = each(getattr(nn, name), (4,), *options)
    table["Softmax2d"] = each(nn.Softmax2d, dims(2))
    return table


def padding() -> dict[str, list[Layer]]:
    table: dict[str, list[Layer]] = {}
    for name in ("CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad"):
        table |= of_dims(name, (1,), size=3)
    return table | of_dims("ConstantPad", (1, 0.5), size=3)


def convolutions() -> dict[str, list[Layer]]:
    table: dict[str, list[Layer]] = {}
    options = (
        (2, 2, 2), [(2, 2, 3), {"padding": 1, "stride": 2}], [(2, 4, 2), {"groups": 2}],
        [(2, 2, 2), {"dilation": 2, "bias": False}],
        [(2, 1, 3), {"padding": "same", "padding_mode": "circular"}],
        [(2, 1, 3), {"padding": 1, "padding_mode": "reflect"}],
    )  # fmt: skip
    table |= of_dims("Conv", *options[:5], size=3, which=(1, 2))
    table |= of_dims("Conv", options[0], [(2, 2, 2), {"groups": 2}], size=3, which=(3,))
    table["Conv2d"] += each(nn.Conv2d, dims(2, 3), options[5])
    transposed = (
        (2, 2, 2), [(2, 2, 3), {"padding": 1, "stride": 2, "output_padding": 1}],
        [(2, 2, 2), {"groups": 2, "bias": False}],
    )  # fmt: skip
    table |= of_dims("ConvTranspose", *transposed, size=3, which=(1, 2))
    table |= of_dims("ConvTranspose", transposed[2], size=2, which=(3,))
    return table


def pools() -> dict[str, list[Layer]]:
    table: dict[str, list[Layer]] = {}
    table |= of_dims("AvgPool", (2,), {"kernel_size": 2, "stride": 1, "padding": 1}, size=4)
    table |= of_dims("MaxPool", (2,), {"kernel_size": 3, "stride": 1, "padding": 1}, size=4)
    table |= of_dims("AdaptiveAvgPool", (1,), (3,), size=4)
    table |= of_dims("AdaptiveMaxPool", (1,), (3,), size=4)
    table |= of_dims("LPPool", (2, 2), (4, 2), size=4)
    table["AvgPool2d"] += each(
        nn.AvgPool2d, dims(2), {"kernel_size": 3, "ceil_mode": True, "count_include_pad": False}
    )
    for n in (2, 3):
        where = torch.tensor([0.2, 0.7, 0.4][:n]).expand(N, 2, n)
        table[f"FractionalMaxPool{n}d"] = each(
            getattr(nn, f"FractionalMaxPool{n}d"), dims(n),
            {"kernel_size": 2, "output_size": 2, "_random_samples": where},
            call=lambda layer, h, k, x: drawn(layer)(h),
        )  # fmt: skip
    for n in (1, 2, 3):
        table[f"MaxUnpool{n}d"] = each(getattr(nn, f"MaxUnpool{n}d"), dims(n), (2,), call=unpool(n))
    return table


def drawn(layer: Any) -> Any:
    """A pool whose regions are given, in the precision of its inputs."""
    return lambda h: type(layer).forward(
        _with(layer, _random_samples=layer._random_samples[: len(h)].to(h.dtype)), h
    )


def _with(layer: Any, **attributes: Any) -> Any:
    other = copy.copy(layer)
    other.__dict__ = {**layer.__dict__, **attributes}
    return other


def norms() -> dict[str, list[Layer]]:
    table: dict[str, list[Layer]] = {}
    table |= of_dims("BatchNorm", (2,), [(2,), {"affine": False, "eps": 0.1}], size=2)
    table |= of_dims(
        "InstanceNorm", (2,), [(2,), {"affine": True}],
        [(2,), {"affine": True, "track_running_stats": True}], size=2,
    )  # fmt: skip
    table["SyncBatchNorm"] = each(nn.SyncBatchNorm, dims(1, 3), (2,))
    table["GroupNorm"] = each(
        nn.GroupNorm, dims(1, 3, 4), (2, 4), (1, 4), [(4, 4), {"affine": False}]
    )
    table["LayerNorm"] = each(
        nn.LayerNorm, (2, 4), (4,), ((2, 4),), [(4,), {"elementwise_affine": False}],
        [(4,), {"bias": False}],
    )  # fmt: skip
    table["RMSNorm"] = each(nn.RMSNorm, (2, 4), (4,), [(4,), {"elementwise_affine": False}])
    table["LocalResponseNorm"] = each(
        nn.LocalResponseNorm, dims(1, 3, 4), (2,), (3, 0.5, 0.75, 2.0)
    )
    table["CrossMapLRN2d"] = each(nn.CrossMapLRN2d, dims(2, 2, 4), (3,))
    return table


def recurrent() -> dict[str, list[Layer]]:
    table: dict[str, list[Layer]] = {}
    plain: list[Any] = [
        [(2, 2), {"batch_first": True}], (2, 2),
        [(2, 2), {"batch_first": True, "bidirectional": True}],
        [(2, 2), {"batch_first": True, "num_layers": 2, "dropout": 0.5, "bias": False}],
    ]  # fmt: skip
    relu: Any = [(2, 2), {"batch_first": True, "nonlinearity": "relu"}]
    projected: Any = [(2, 3), {"batch_first": True, "proj_size": 2}]
    table["RNN"] = each(nn.RNN, (3, 2), *plain, relu, call=sequences)
    table["GRU"] = each(nn.GRU, (3, 2), *plain, call=sequences)
    table["LSTM"] = each(nn.LSTM, (3, 2), *plain, projected, call=sequences)
    table["RNNCell"] = each(
        nn.RNNCell, (2,), (2, 2), [(2, 2), {"nonlinearity": "relu"}], call=cell_twice
    )
    table["GRUCell"] = each(nn.GRUCell, (2,), (2, 2), [(2, 2), {"bias": False}], call=cell_twice)
    table["LSTMCell"] = each(nn.LSTMCell, (2,), (2, 2), call=cell_twice)
    return table


def transformers() -> dict[str, list[Layer]]:
    first: dict[str, Any] = {"batch_first": True}
    small = (2, 2, 1)  # width, heads, hidden width

    def stack(kind: Any, layer: Any, **options: Any) -> nn.Module:
        return kind(layer(*small, **first), 1, **options)

    encoders = nn.TransformerEncoder, nn.TransformerEncoderLayer
    return {
        "MultiheadAttention": each(
            nn.MultiheadAttention, (3, 4), [(4, 2), first], (4, 2),
            [(4, 2), {**first, "bias": False, "add_zero_attn": True}],
            [(4, 1), {**first, "add_bias_kv": True}], call=attention,
        ),
        "TransformerEncoderLayer": each(
            nn.TransformerEncoderLayer, (3, 2), [small, first], small,
            [small, {**first, "norm_first": True, "activation": "gelu"}], call=encoder,
        ),
        "TransformerDecoderLayer": each(
            nn.TransformerDecoderLayer, (3, 2), [small, first], call=decoder
        ),
        "TransformerEncoder": [
            Layer(partial(stack, *encoders), (3, 2), encoder),
            Layer(partial(stack, *encoders, enable_nested_tensor=False), (3, 2), encoder),
        ],
        "TransformerDecoder": [
            Layer(
                partial(stack, nn.TransformerDecoder, nn.TransformerDecoderLayer), (3, 2), decoder
            )
        ],
        "Transformer": each(
            nn.Transformer, (3, 2), [(2, 2, 1, 1, 1), first], call=transformer
        ),
    }  # fmt: skip


def others() -> dict[str, list[Layer]]:
    table = {
        "Linear": each(nn.Linear, (4,), (4, 3), [(4, 3), {"bias": False}]),
        "Bilinear": each(nn.Bilinear, (2,), (2, 2, 2), call=second),
        "Embedding": each(
            nn.Embedding, (2,), (4, 2), [(4, 2), {"max_norm": 0.5}],
            [(4, 2), {"scale_grad_by_freq": True}], [(4, 2), {"sparse": True}],
            [(16, 2), {"padding_idx": 15}], call=tokens,
        ),
        "EmbeddingBag": each(
            nn.EmbeddingBag, (2,), [(4, 2), {"mode": "sum"}], [(4, 2), {"mode": "mean"}],
            [(4, 2), {"mode": "max"}], [(4, 2), {"mode": "sum", "scale_grad_by_freq": True}],
            [(4, 2), {"mode": "sum", "sparse": True}], call=bags,
        ),
        "AdaptiveLogSoftmaxWithLoss": each(
            nn.AdaptiveLogSoftmaxWithLoss, (4,), (4, 5, [2]), [(4, 5, [2, 3]), {"div_value": 2.0}],
            call=adaptive,
        ),
        "Flatten": each(nn.Flatten, dims(1)),
        "Unflatten": each(nn.Unflatten, (4,), (1, (2, 2))),
        "Fold": each(nn.Fold, (4, 4), (3, 2)),
        "Unfold": each(nn.Unfold, dims(2, 3), (2,), [(2,), {"stride": 2, "padding": 1}]),
        "PixelShuffle": each(nn.PixelShuffle, (4, 2, 2), (2,)),
        "PixelUnshuffle": each(nn.PixelUnshuffle, (1, 4, 4), (2,)),
        "ChannelShuffle": each(nn.ChannelShuffle, dims(2, 2, 4), (2,)),
        "CosineSimilarity": each(nn.CosineSimilarity, (4,), (), call=second),
        "PairwiseDistance": each(
            nn.PairwiseDistance, (4,), (), (1.0,), (3.0,), [(2.0,), {"keepdim": True}], call=second
        ),
        "Upsample": [
            *each(nn.Upsample, dims(1, 3), {"scale_factor": 2},
                  {"scale_factor": 2, "mode": "linear"}),
            *each(nn.Upsample, dims(2, 3), {"size": 5, "mode": "bilinear", "align_corners": True},
                  {"scale_factor": 2, "mode": "bicubic"}, {"scale_factor": 2, "mode": "area"},
                  {"scale_factor": 2, "mode": "nearest-exact"}),
            *each(nn.Upsample, dims(3, 2), {"scale_factor": 2, "mode": "trilinear"}),
        ],
        "UpsamplingBilinear2d": each(nn.UpsamplingBilinear2d, dims(2, 3), {"scale_factor": 2}),
        "UpsamplingNearest2d": each(nn.UpsamplingNearest2d, dims(2, 3), {"scale_factor": 2}),
        "AlphaDropout": each(nn.AlphaDropout, (4,), (0.5,)),
        "FeatureAlphaDropout": each(nn.FeatureAlphaDropout, dims(1), (0.5,)),
        "Dropout": each(nn.Dropout, (4,), (0.5,)),
    }  # fmt: skip
    return table | of_dims("Dropout", (0.5,), size=2)


def lazy() -> dict[str, list[Layer]]:
    """Lazy modules, which know their shapes after the first call."""
    table: dict[str, list[Layer]] = {"LazyLinear": each(nn.LazyLinear, (4,), (2,))}
    for n in (1, 2, 3):
        for name, args in (
            ("LazyConv", (2, 2)), ("LazyConvTranspose", (2, 2)), ("LazyBatchNorm", ()),
            ("LazyInstanceNorm", ()),
        ):  # fmt: skip
            table[f"{name}{n}d"] = each(getattr(nn, f"{name}{n}d"), dims(n, 2), args)
    return table


LAYERS: dict[str, list[Layer]] = {
    **activations(), **padding(), **convolutions(), **pools(), **norms(), **recurrent(),
    **transformers(), **others(), **lazy(),
}  # fmt: skip


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for v in value for t in floats(v)] if isinstance(value, tuple | list) else []


class Around(nn.Module):
    """A layer between two others that are learned: its Hessian mixes with theirs."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.case = layer
        size = int(torch.Size(layer.shape).numel())
        self.before = nn.Linear(2, 2)
        self.register_buffer("spread", torch.randn(2, size))
        self.register_buffer("offset", torch.randn(size))
        self.layer = layer.build()
        self.after: Any = None
        self.eval()
        with torch.no_grad():
            width = self.features(torch.randn(N, 2)).shape[1]
        self.register_buffer("mix", torch.randn(width, 3) / width**0.5)
        self.after = nn.Linear(3, 2)
        if getattr(self.layer, "max_norm", None):  # not on the edge, where there is a kink
            with torch.no_grad():
                self.layer.weight.mul_(0.9)
        with torch.no_grad():  # running statistics and affine parameters that are not 0 and 1
            for _, tensor in (*self.layer.named_buffers(), *self.layer.named_parameters()):
                if tensor.is_floating_point() and "norm" in type(self.layer).__name__.lower():
                    tensor.add_(0.3 * torch.rand_like(tensor))

    def features(self, x: Tensor) -> Tensor:
        h = self.before(x) @ self.spread + self.offset
        h = h.reshape(len(x), *self.case.shape)
        if self.case.call is None:
            out = self.layer(h)
        else:
            out = self.case.call(self.layer, h, 0.7 * h.flip(1) + 0.2, x)
        return torch.cat([t.reshape(len(x), -1) for t in floats(out)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.features(x) @ self.mix))


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network whose weights are exact in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return build().to(dtype).eval()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that are exact in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Truth:
    """What PyTorch makes of a loss, and whether its derivatives are right.

    Attributes:
        why: what is wrong with them; empty if they are right.
        directions: unit vectors, shape (n, k).
        products: the Hessian times them by double backward, if that is right, shape (n, k).
        matrix: the Hessian, if it is right and asked for, shape (n, n).
    """

    def __init__(self, f: Function, *, dense: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        V = torch.randn(len(f.theta), 2, generator=generator, dtype=f.theta.dtype)
        self.directions = V / V.norm(dim=0)
        self.why, step = "", 1e-5
        self.function = f
        try:
            g = f.gradient()
            with torch.no_grad():
                sides = [(f(f.theta + step * v), f(f.theta - step * v)) for v in self.directions.T]
            slopes = torch.stack([(a - b) / (2 * step) for a, b in sides])
            if float((slopes - self.directions.T @ g).abs().max()) > DIFFERENCES * float(g.norm()):
                self.why = "the gradient is not the loss's"
            self.products = f.products(self.directions)
            # A hundred products of a recurrent network take a second.
            self.matrix = f.hessian() if dense and len(f.theta) <= 40 else None
        except RuntimeError as error:
            self.why = str(error).splitlines()[0]
            return
        ends = [
            (f.gradient(f.theta + step * v) - f.gradient(f.theta - step * v)) / (2 * step)
            for v in self.directions.T
        ]
        error_ = relative_error(self.products, torch.stack(ends, 1))
        if error_ > DIFFERENCES:
            self.why = f"double backward is off by {error_:.0e}"

    def agrees(self, H: HessianOperator, tolerance: float = ROUNDOFF) -> None:
        """Require the right products."""
        found = H @ self.directions.to(H.dtype)
        assert relative_error(found, self.products) < tolerance


def curvature(f: Function, v: Tensor, step: float = 1e-3) -> float:
    """The second derivative along v by central differences, good to about 1e-6."""
    with torch.no_grad():
        ends = float(f(f.theta + step * v)) + float(f(f.theta - step * v))
        return (ends - 2 * float(f(f.theta))) / step**2


def check(make: Callable[..., HessianOperator], truth: Truth, name: str) -> None:
    """Require the right matrix, or a refusal where PyTorch is wrong or has no derivative."""
    try:
        if truth.why:
            found = make() @ truth.directions
            found = (truth.directions * found).sum(0)
            # By values alone, which nothing can make wrong.
            right_ones = [curvature(truth.function, v) for v in truth.directions.T]
            assert relative_error(found, torch.tensor(right_ones).double()) < 1e-4, truth.why
            hvpspec.index(make(), 1e-3)
        else:
            H = make()
            truth.agrees(H)
            if truth.matrix is not None:
                assert relative_error(H.to_dense(), truth.matrix) < ROUNDOFF
    except HvpspecError as error:
        message = check_message(error)
        assert truth.why or name in REFUSED, message
    else:
        assert name not in REFUSED


def test_every_module_is_in_a_table() -> None:
    """A module that a new version of PyTorch brings is added to a table, or said to be no layer."""
    public = {
        name
        for name in dir(nn)
        if isinstance(getattr(nn, name), type) and issubclass(getattr(nn, name), nn.Module)
    }
    known = {*LAYERS, *LOSSES, *NOT_LAYERS}
    assert public - known == set()
    assert not (LAYERS.keys() & LOSSES.keys())


def cases_of(kinds: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The name and number of each case."""
    return [
        pytest.param(name, k, id=f"{name}-{k}")
        for name, cases in kinds.items()
        for k in range(len(cases))
    ]


# One library or another has no projections.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")
@pytest.mark.parametrize(("name", "k"), cases_of(LAYERS))
def test_layers(name: str, k: int) -> None:
    build = partial(Around, LAYERS[name][k])
    x, y = numbers(N, 2), numbers(N, 2, seed=1)
    net = seeded(build)
    f = Function(net, lambda call: F.mse_loss(call(x), y))
    truth = Truth(f, dense=k == 0)
    check(lambda: HessianOperator(net, nn.MSELoss(), (x, y)), truth, name)
    if not truth.why and name not in REFUSED and k == 0:
        narrow = seeded(build, torch.float32)
        H = HessianOperator(narrow, nn.MSELoss(), (x.float(), y.float()))
        truth.agrees(H, FLOAT32_ROUNDOFF)
        truth.agrees(HessianOperator(net, nn.MSELoss(), (x, y), chunk_size=2))


@dataclass(frozen=True)
class Case:
    """A loss with targets.

    Attributes:
        loss: called as loss(outputs, targets).
        targets: makes them.
        outputs: how many the network has.
        link: what is done to the outputs first, as log_softmax for log-probabilities.
    """

    loss: Any
    targets: Callable[[], Any]
    outputs: int = 3
    link: Callable[[Tensor], Tensor] | None = None


def with_reductions(
    kind: Any, targets: Callable[[], Any], *options: dict[str, Any], **case: Any
) -> list[Case]:
    """A loss with mean and sum, and with further options."""
    return [
        Case(kind(**option), targets, **case) for option in ({}, {"reduction": "sum"}, *options)
    ]


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 1, 0])


def some_ignored() -> Tensor:
    return torch.tensor([0, -100, 1, 1, -100])


def signs() -> Tensor:
    return torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]).double()


def probabilities() -> Tensor:
    return numbers(N, 3, seed=4).softmax(1)


def values() -> Tensor:
    return numbers(N, 3, seed=4)


def binary() -> Tensor:
    return (numbers(N, 3, seed=4) > 0).double()


def counts() -> Tensor:
    return numbers(N, 3, seed=4).abs().mul(2).round()


def several_labels() -> Tensor:
    return torch.tensor([[0, 2, -1], [1, -1, 0], [2, 1, 0], [-1, 0, 1], [0, -1, 2]])


def paired(loss: nn.Module, width: int = 2) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of two inputs, which are columns of the outputs."""
    return lambda o, t: loss(o[:, :width], o[:, width : 2 * width], t)


def triple(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, _: loss(o[:, :2], o[:, 2:4], o[:, 4:])


def ranked(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, t: loss(o[:, 0], o[:, 1], t)


def gaussian(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, t: loss(o[:, :3], t, F.softplus(o[:, 3:]) + 0.1)


def connectionist(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def value(o: Tensor, t: Tensor) -> Tensor:
        steps = o.reshape(len(o), 4, 3).log_softmax(2).transpose(0, 1)
        return loss(steps, t, torch.full((len(o),), 4), torch.full((len(o),), 2))

    return value


def two_labels() -> Tensor:
    return torch.tensor([[1, 2], [2, 1], [1, 1], [2, 2], [1, 2]])


WEIGHT = torch.tensor([0.5, 1.0, 2.0]).double()
log_softmax: Any = partial(F.log_softmax, dim=1)

LOSSES: dict[str, list[Case]] = {
    "CrossEntropyLoss": [
        *with_reductions(
            nn.CrossEntropyLoss, classes, {"weight": WEIGHT}, {"label_smoothing": 0.1}
        ),
        *with_reductions(nn.CrossEntropyLoss, some_ignored, {"weight": WEIGHT}),
        *with_reductions(nn.CrossEntropyLoss, probabilities, {"weight": WEIGHT}),
    ],
    "NLLLoss": [
        *with_reductions(nn.NLLLoss, classes, {"weight": WEIGHT}, link=log_softmax),
        *with_reductions(nn.NLLLoss, some_ignored, {"ignore_index": 1}, link=log_softmax)[:2],
    ],
    "MSELoss": with_reductions(nn.MSELoss, values),
    "L1Loss": with_reductions(nn.L1Loss, values),
    "SmoothL1Loss": with_reductions(nn.SmoothL1Loss, values, {"beta": 0.3}),
    "HuberLoss": with_reductions(nn.HuberLoss, values, {"delta": 0.3}),
    "BCELoss": with_reductions(nn.BCELoss, binary, link=torch.sigmoid),
    "BCEWithLogitsLoss": with_reductions(
        nn.BCEWithLogitsLoss, binary, {"pos_weight": WEIGHT}, {"weight": WEIGHT}
    ),
    "SoftMarginLoss": with_reductions(nn.SoftMarginLoss, lambda: values().sign()),
    "KLDivLoss": with_reductions(
        nn.KLDivLoss, probabilities, {"reduction": "batchmean"},
        {"reduction": "batchmean", "log_target": True}, link=log_softmax,
    ),
    "PoissonNLLLoss": with_reductions(
        nn.PoissonNLLLoss, counts, {"full": True}, {"log_input": False}, link=F.softplus
    ),
    "MultiLabelSoftMarginLoss": with_reductions(
        nn.MultiLabelSoftMarginLoss, binary, {"weight": WEIGHT}
    ),
    "MultiLabelMarginLoss": with_reductions(nn.MultiLabelMarginLoss, several_labels),
    "MultiMarginLoss": with_reductions(
        nn.MultiMarginLoss, classes, {"p": 2}, {"margin": 0.3, "weight": WEIGHT}
    ),
    "HingeEmbeddingLoss": with_reductions(
        nn.HingeEmbeddingLoss, lambda: values().sign(), {"margin": 0.3}
    ),
    "GaussianNLLLoss": [
        Case(gaussian(nn.GaussianNLLLoss(reduction=r, full=f)), values, 6)
        for r in ("mean", "sum") for f in (False, True)
    ],
    "CosineEmbeddingLoss": [
        Case(paired(nn.CosineEmbeddingLoss(reduction=r, margin=m)), signs, 4)
        for r, m in (("mean", 0.0), ("sum", 0.0), ("mean", 0.3))
    ],
    "MarginRankingLoss": [
        Case(ranked(nn.MarginRankingLoss(reduction=r, margin=m)), signs, 2)
        for r, m in (("mean", 0.5), ("sum", 0.0))
    ],
    "TripletMarginLoss": [
        Case(triple(nn.TripletMarginLoss(**o)), signs, 6)
        for o in ({}, {"reduction": "sum"}, {"swap": True}, {"p": 3.0})
    ],
    "TripletMarginWithDistanceLoss": [
        Case(triple(nn.TripletMarginWithDistanceLoss(reduction=r)), signs, 6)
        for r in ("mean", "sum")
    ],
    "CTCLoss": [
        Case(connectionist(nn.CTCLoss(reduction=r)), two_labels, 12) for r in ("mean", "sum")
    ],
    "LinearCrossEntropyLoss": [],
}  # fmt: skip
if hasattr(nn, "LinearCrossEntropyLoss"):  # since PyTorch 2.13
    LOSSES["LinearCrossEntropyLoss"] = [
        Case(_options, classes)  # built in the test: its weight is a parameter
        for _options in (
            {"options": None},
            {"options": None, "bias": True, "reduction": "sum"},
            {},
        )
    ]


class Outputs(nn.Module):
    """A small network with a link at its end."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, case.outputs))
        self.link = case.link

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out if self.link is None else self.link(out)


# PyTorch recommends "batchmean".
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize(("name", "k"), cases_of(LOSSES))
def test_losses(name: str, k: int) -> None:
    case = LOSSES[name][k]
    net, x, t = seeded(partial(Outputs, case)), 1.5 * numbers(N, 2), case.targets()
    loss = case.loss
    names = None
    if isinstance(loss, dict):
        loss = seeded(lambda: nn.LinearCrossEntropyLoss(3, 3, **case.loss))
        net = WithLoss(net, loss)
        names = [n for n, _ in net.named_parameters()]

        def value(call: Any) -> Tensor:
            return call(x, t)

        operator = partial(HessianOperator, net.net, loss)
    else:

        def value(call: Any) -> Tensor:
            return case.loss(call(x), t)

        operator = partial(HessianOperator, net, loss)
    truth = Truth(Function(net, value, names), dense=k == 0)
    batches = [(x[:3], t[:3]), (x[3:], t[3:])]
    for make in (lambda: operator((x, t), chunk_size=2), lambda: operator(batches)):
        if truth.why or name in REFUSED:
            check(make, truth, name)
            continue
        try:
            truth.agrees(make())
        except HvpspecError as error:
            message = check_message(error)
            # The mean of a function of one's own may be over something else than examples; whole
            # batches are always answered.
            assert not isinstance(loss, nn.Module), message
    check(lambda: operator((x, t)), truth, name)
    if not (truth.why or name in REFUSED or isinstance(loss, nn.Module)):
        truth.agrees(HessianOperator(net, Loss(loss, whole=True), (x, t)))


class WithLoss(nn.Module):
    """A network and a loss that has parameters."""

    def __init__(self, net: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.loss(self.net(x), t)
