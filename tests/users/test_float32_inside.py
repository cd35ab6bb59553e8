"""float64 inside a float32 network: constants that the forward pass makes, and casts in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpspec
from hvpspec import HessianOperator
from tests.users.truth import Function, check_message

#: A constant that is rounded to float32 is off by 6e-8 of its size, and moves the eigenvalues by
#: some of that; angles of up to 40 make it some 40 times as much. What is computed in float32
#: throughout is off by that in each of some hundred steps.
CONSTANTS, SINGLE = 1e-5, 2e-4


class Written:
    """The type that is written out in casts, which the float64 copies replace."""

    dtype = torch.float32


def single(tensor: Tensor) -> Tensor:
    """``tensor.float()``, as written."""
    return tensor.float() if Written.dtype == torch.float32 else tensor.double()


class Recurrent(nn.Module):
    """The most copied tutorial: the states start as ``torch.zeros(...)``."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.kind, self.l = kind, getattr(nn, kind)(3, 3, batch_first=True)
        self.o = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.size(0), 3).to(x.device)
        c0 = torch.zeros(1, x.size(0), 3).to(x.device)
        return self.o(self.l(x, (h0, c0) if self.kind == "LSTM" else h0)[0][:, -1])


class Plain(nn.Module):
    """A perceptron, for losses that cast."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.n(x)


class Positions(nn.Module):
    """Positions by ``torch.linspace`` next to the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.linspace(0, 1, x.shape[1])[None, :, None].expand(len(x), -1, 1)
        return self.o(torch.tanh(self.a(torch.cat([x, t], 2))).mean(1))


class Times(nn.Module):
    """An embedding of ``torch.arange().float()``."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.o, self.a = nn.Linear(1, 4), nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = single(torch.arange(x.shape[1]))[:, None]
        return self.o(torch.tanh(self.a(x) + self.t(steps)).mean(1))


class Fourier(nn.Module):
    """Random features in a plain attribute, or somewhere in one."""

    def __init__(self, where: str = "attribute") -> None:
        super().__init__()
        B = torch.randn(3, 4)
        self.B: Any = {"attribute": B, "list": [B], "dict": {"B": B}, "tuple": (B, 1.0)}[where]
        self.o = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        B = self.B
        if not isinstance(B, Tensor):
            B = B["B"] if isinstance(B, dict) else B[0]
        p = 2 * math.pi * x @ B
        return self.o(torch.cat([p.sin(), p.cos()], 1))


class Imaging(nn.Module):
    """Complex inputs, of which an image is made."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 1))

    def forward(self, k: Tensor) -> Tensor:
        return self.c(torch.fft.ifft2(k).abs()[:, None])


class Diffusion(nn.Module):
    """A time embedding in float32 by design."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3 + 8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f = torch.exp(-math.log(1e4) * single(torch.arange(4)) / 4)
        angles = single(t[:, None]) * f[None]
        return self.b(torch.tanh(self.a(torch.cat([x, angles.cos(), angles.sin()], 1))))


class Scattered(nn.Module):
    """Rows written into ``torch.zeros(...)``, which takes no other type."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.o, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def forward(self, x: Tensor) -> Tensor:
        h, rows = torch.tanh(self.a(x)), torch.arange(len(x)).flip(0)
        out = torch.zeros(len(x), 4)
        if self.how == "index_put":
            out[rows] = h
        elif self.how == "index_add":
            out = out.index_add(0, rows, h)
        else:
            out = out.scatter_add(0, rows[:, None].expand_as(h), h)
        return self.o(out)


class Made(nn.Module):
    """Constants made in many ways, and multiplied with matrices, which takes no other type."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.o, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how

    def constant(self) -> Tensor:
        return {
            "tensor": lambda: torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(4, 4),
            "eye": lambda: torch.eye(4) * 0.7,
            "full": lambda: torch.full((4, 4), 0.3).triu(),
            "ones": lambda: torch.ones(4, 4).tril(),
            "numpy": lambda: single(torch.from_numpy(ROW)).view(4, 4),
            "one_hot": lambda: single(F.one_hot(torch.tensor([1, 0, 3, 2]), 4)),
            "hann": lambda: torch.hann_window(16).view(4, 4),
            "Tensor": lambda: torch.Tensor([0.5] * 16).view(4, 4),
            "float32": lambda: torch.full((4, 4), 0.25, dtype=Written.dtype),
        }[self.how]()

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.a(x)) @ self.constant())


class RootMeanSquare(nn.Module):
    """A norm that is written out in float32, as large language models have it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.o, self.how = nn.Linear(3, 4), nn.Linear(4, 2), how
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        kind = h.dtype
        wide = single(h) if self.how == "float" else h.to(Written.dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return self.o(self.weight * wide.to(kind) if self.how != "stays" else self.weight * wide)


class Masked(nn.Module):
    """Attention with a mask of minus infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
        scores = self.q(x) @ self.k(x).mT / math.sqrt(3) + mask
        return self.o(scores.softmax(-1) @ self.v(x)).mean(1)


def bce(o: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(o.squeeze(1), single(t))


def mse(o: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(o.squeeze(1), single(t))


def one_hot(o: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(o, single(F.one_hot(t, 2)))


def weighted(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, t, weight=torch.tensor([0.3, 0.7]), reduction="sum") / len(t)


#: Made by another library, once.
ROW = np.linspace(0, 1, 16, dtype=np.float32)

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


@dataclass(frozen=True)
class Case:
    """A float32 network, its loss, and what data it takes."""

    name: str
    model: Callable[[], nn.Module]
    loss: Any
    data: str = "features"
    cast: bool = False  # float32 is written out, or comes from elsewhere

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        x, seq, y = torch.randn(20, 3), torch.randn(20, 5, 3), torch.randint(2, (20,))
        data = {
            "features": (x, y),
            "sequences": (seq, y),
            "images": (torch.randn(4, 6, 6, dtype=torch.cfloat), torch.randn(4, 1, 6, 6)),
            "times": (x, torch.randint(40, (20,)), torch.randn(20, 3)),
        }[self.data]
        torch.manual_seed(1)
        return self.model(), data


MADE = ("tensor", "eye", "full", "ones", "numpy", "one_hot", "hann", "Tensor", "float32")
CAST = ("numpy", "one_hot", "float32")
CASES = [
    *(Case(f"{k} from zeros", lambda k=k: Recurrent(k), CE, "sequences") for k in ("LSTM", "GRU")),
    Case("binary labels.float()", Plain, bce, cast=True),
    Case("squares of labels.float()", Plain, mse, cast=True),
    Case("one_hot().float()", lambda: Plain(2), one_hot, cast=True),
    Case("class weights made in the loss", lambda: Plain(2), weighted),
    Case("positions by linspace", Positions, CE, "sequences"),
    Case("times by arange().float()", Times, CE, "sequences", cast=True),
    *(
        Case(f"Fourier features in a {w}", lambda w=w: Fourier(w), CE)
        for w in ("attribute", "list", "dict", "tuple")
    ),
    Case("complex inputs", Imaging, MSE, "images"),
    Case("diffusion times", Diffusion, MSE, "times", cast=True),
    *(
        Case(f"rows by {h}", lambda h=h: Scattered(h), CE)
        for h in ("index_put", "index_add", "scatter_add")
    ),
    *(Case(f"a matrix by {h}", lambda h=h: Made(h), CE, cast=h in CAST) for h in MADE),
    *(
        Case(f"norm in float32: {h}", lambda h=h: RootMeanSquare(h), CE, cast=True)
        for h in ("float", "to", "stays")
    ),
    Case("a mask of infinities", Masked, CE, "sequences"),
]  # fmt: skip


def widened(value: Any) -> Any:
    """The same with its floating-point tensors in double precision."""
    if isinstance(value, Tensor):
        if value.is_complex():
            return value.to(torch.complex128)
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(widened(v) for v in value)
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    return value


_KNOWN: dict[str, Tensor] = {}


def truth_of(case: Case) -> Tensor:
    """The Hessian of a copy of a case in which everything is float64, casts included."""
    if case.name not in _KNOWN:
        model, data = case.build()
        model = copy.deepcopy(model).double().eval()
        for module in model.modules():
            for key, value in vars(module).items():
                if not key.startswith("_"):
                    setattr(module, key, widened(value))
        *inputs, targets = widened(data)
        torch.set_default_dtype(torch.float64)
        Written.dtype = torch.float64
        try:
            f = Function(model, lambda call: case.loss(call(*inputs), targets))
            _KNOWN[case.name] = f.hessian()
        finally:
            torch.set_default_dtype(torch.float32)
            Written.dtype = torch.float32
    return _KNOWN[case.name]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryNetwork:
    """Each question is answered, and rightly within what the result says of itself."""

    def operator(self, case: Case) -> HessianOperator:
        model, data = case.build()
        return HessianOperator(model.eval(), case.loss, data)

    def test_the_index(self, case: Case) -> None:
        values = torch.linalg.eigvalsh(truth_of(case))
        norm = float(values.abs().max())
        result = hvpspec.index(self.operator(case))
        assert result.eigenvalues is not None
        error = float((result.eigenvalues - values).abs().max())
        assert error <= max(result.noise_floor, CONSTANTS * norm)
        # At its own resolution: no eigenvalue is counted that may as well be positive.
        low, high = (int((values < -tau).sum()) for tau in (result.tau + error, 0.0))
        assert result.index is not None
        assert low <= result.index <= high
        # Where no cast is written out, the copy computes in float64 throughout.
        assert case.cast or result.noise_floor < 1e-9 * norm

    def test_the_index_at_a_resolution(self, case: Case) -> None:
        values = torch.linalg.eigvalsh(truth_of(case))
        norm = float(values.abs().max())
        taus = torch.logspace(-2, 0, 400, dtype=torch.float64) * norm
        # So far from every eigenvalue that float32 can tell.
        far = (values[None] + taus[:, None]).abs().amin(1) > 4 * SINGLE * norm
        tau = float(taus[far][0])
        for method in (hvpspec.Exact(), hvpspec.Certified(max_matvecs=1000)):
            H = self.operator(case)
            result = hvpspec.index(H, tau, method=method)
            assert result.index == int((values < -tau).sum()), method
            assert result.certified, method

    def test_other_questions_in_float32(self, case: Case) -> None:
        truth = truth_of(case)
        values = torch.linalg.eigvalsh(truth)
        norm, H = float(values.abs().max()), self.operator(case)
        assert H.dtype == torch.float32
        generator = torch.Generator().manual_seed(0)
        top = float(hvpspec.eigsh(H, 1, "LA", generator=generator).values[0])
        assert abs(top - float(values[-1])) < SINGLE * norm
        total = hvpspec.trace(H, len(values), generator=generator).value
        assert abs(total - float(truth.trace())) < SINGLE * norm * len(values) ** 0.5
        assert float((H.to_dense().double() - truth).abs().max()) < SINGLE * norm

    def test_nothing_is_left_changed(self, case: Case) -> None:
        model, data = case.build()
        plain = {
            (name, key): id(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        }
        hvpspec.index(HessianOperator(model.eval(), case.loss, data))
        assert torch.get_default_dtype() == torch.float32
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if key != "training":
                    assert plain[name, key] == id(value), (name, key)
        for p in model.parameters():
            assert p.dtype == torch.float32
        with torch.no_grad():
            model(*data[:-1])  # and it runs as before


def test_a_cast_is_said() -> None:
    """Where a cast is written out, the count goes on in float32 and says so."""
    case = next(c for c in CASES if "norm" in c.name)
    model, data = case.build()
    result = hvpspec.index(HessianOperator(model.eval(), case.loss, data))
    assert result.noise_floor > 1e-9 * result.norm
    assert any("float32" in note for note in result.facts.notes), result.facts.notes


def test_float32_that_cannot_be_widened() -> None:
    """A function of one's own that takes float32 alone: an index with its floor, or one line."""

    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("the kernel takes float32")
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * x.cos()

    class Kernel(nn.Module):
        def __init__(self, wide: bool = False) -> None:
            super().__init__()
            self.a, self.o, self.wide = nn.Linear(3, 4), nn.Linear(4, 2), wide

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.o(h.sin() if self.wide else Narrow.apply(h))

    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    torch.manual_seed(1)
    net = Kernel().eval()
    torch.manual_seed(1)
    wide = Kernel(True).eval().double()
    truth = Function(wide, lambda call: F.cross_entropy(call(x.double()), y)).hessian()
    values = torch.linalg.eigvalsh(truth)
    norm = float(values.abs().max())
    tau = 0.03 * norm
    assert float((values + tau).abs().min()) > SINGLE * norm
    try:
        result = hvpspec.index(HessianOperator(net, CE, (x, y)), tau)
    except hvpspec.HvpspecError as error:
        check_message(error)
    else:
        assert result.lower <= int((values < -tau).sum()) <= result.upper
        assert result.noise_floor > 1e-9 * norm
