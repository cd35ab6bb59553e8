"""Compiled, scripted, wrapped, lazy, quantised and pruned modules: right, or one line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import hvpspec
from hvpspec import HessianOperator
from tests.users.truth import (
    AsFound,
    Function,
    hessian,
    refused,
    right,
    right_or_all_refused,
    right_or_refused,
)

N = 20
CE = nn.CrossEntropyLoss()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (N,), generator=generator)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def truth(net: nn.Module | None = None) -> Tensor:
    x, y = data()
    return hessian(mlp() if net is None else net, lambda call: F.cross_entropy(call(x), y))


class TestCompiled:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
    def test_a_compiled_network(self, backend: str) -> None:
        """It is unwrapped: what is compiled cannot be differentiated twice."""
        net = mlp()
        compiled = torch.compile(net, backend=backend)
        found = AsFound(net)
        H = HessianOperator(compiled, CE, data())
        right(H, truth())
        assert list(H.space.names) == [name for name, _ in net.named_parameters()]
        found.check()
        right(HessianOperator(compiled, CE, data(), params="2.*"), truth()[25:, 25:])
        right(HessianOperator(compiled, CE, data(), params=net[2]), truth()[25:, 25:])

    def test_compiled_in_place(self) -> None:
        net = mlp()
        net.compile(backend="eager")
        right(HessianOperator(net, CE, data()), truth())
        assert net._compiled_call_impl is not None  # it stays compiled

    def test_parts_that_are_compiled(self) -> None:
        net = mlp()
        net[0] = torch.compile(net[0], backend="aot_eager")
        net[2].compile(backend="aot_eager")
        right(HessianOperator(net, CE, data()), truth())

    def test_a_compiled_forward(self) -> None:
        net = mlp()
        net.forward = torch.compile(net.forward, backend="aot_eager")
        x, y = data()
        right_or_all_refused(lambda: HessianOperator(net, CE, (x, y)), truth())

    # The compiler looks at the field of every tensor that it meets.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_a_compiled_loss(self) -> None:
        loss: Any = torch.compile(lambda o, t: F.cross_entropy(o, t), backend="aot_eager")
        right_or_all_refused(lambda: HessianOperator(mlp(), loss, data()), truth())

    def test_the_index(self) -> None:
        compiled = torch.compile(mlp().float(), backend="inductor")
        x, y = data()
        values = torch.linalg.eigvalsh(truth())
        result = hvpspec.index(HessianOperator(compiled, CE, (x.float(), y)), 1e-4)
        assert result.index == int((values < -1e-4).sum())


# PyTorch warns that TorchScript is going to be removed.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
class TestScripted:
    @pytest.mark.parametrize("how", ["script", "trace", "frozen"])
    def test_one_line(self, how: str) -> None:
        net, (x, y) = mlp(), data()
        scripted: Any = {
            "script": lambda: torch.jit.script(net),
            "trace": lambda: torch.jit.trace(net, x),
            "frozen": lambda: torch.jit.freeze(torch.jit.script(net)),
        }[how]()
        right_or_refused(lambda: HessianOperator(scripted, CE, (x, y)), truth())

    def test_a_scripted_part(self) -> None:
        net = mlp()
        net[0] = torch.jit.script(net[0])
        right_or_refused(lambda: HessianOperator(net, CE, data()), truth())

    def test_graphs_in_python(self) -> None:
        """A traced module of torch.fx is an ordinary one."""
        net = torch.fx.symbolic_trace(mlp())
        right(HessianOperator(net, CE, data()), truth())

    def test_exported(self) -> None:
        x, y = data()
        program = torch.export.export(mlp(), (x,))
        right_or_refused(lambda: HessianOperator(program.module(), CE, (x, y)), truth())
        refused(lambda: HessianOperator(program, CE, (x, y)))


class TestWrapped:
    @pytest.fixture
    def process_group(self) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.usefixtures("process_group")
    # PyTorch's reducer warns of its own buffers.
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_distributed_data_parallel(self) -> None:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        found = AsFound(wrapped.module)
        right_or_refused(lambda: HessianOperator(wrapped, CE, data()), truth())
        found.check()
        torch.manual_seed(0)
        wrapped(data()[0]).sum().backward()  # and it goes on
        assert all(p.grad is not None for p in wrapped.parameters())

    @pytest.mark.usefixtures("process_group")
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
    def test_fully_sharded_of_the_first_kind(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"))
        right_or_refused(lambda: HessianOperator(wrapped, CE, data()), truth())

    def test_data_parallel(self) -> None:
        wrapped = nn.DataParallel(mlp())
        right_or_refused(lambda: HessianOperator(wrapped, CE, data()), truth())

    def test_averaged(self) -> None:
        """The average of weights over time counts its updates in a buffer."""
        wrapped = torch.optim.swa_utils.AveragedModel(mlp()).eval()
        right(HessianOperator(wrapped, CE, data()), truth())


class TestUnfinished:
    def test_lazy_modules(self) -> None:
        torch.manual_seed(1)
        net = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)).double()
        message = refused(lambda: HessianOperator(net, CE, data()))
        assert "0.weight" in message or "lazy" in message.lower() or "LazyLinear" in message
        net(data()[0])
        right(HessianOperator(net, CE, data()), truth(net))

    @pytest.mark.parametrize("part", [False, True])
    def test_meta_modules(self, part: bool) -> None:
        net = mlp()
        if part:
            net[2] = nn.Linear(5, 3, device="meta", dtype=torch.float64)
        else:
            net = net.to("meta")
        assert "meta" in refused(lambda: HessianOperator(net, CE, data()))

    def test_parameters_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            net = mlp()
        right_or_refused(lambda: HessianOperator(net, CE, data()), truth())

    def test_asked_in_inference_mode_and_without_gradients(self) -> None:
        net, source, expected = mlp(), data(), truth()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                right(HessianOperator(net, CE, source), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        net, (x, y) = mlp().to(dtype), data()
        assert "dtype" in refused(lambda: HessianOperator(net, CE, (x.to(dtype), y)))
        wide = copy.deepcopy(net).double()
        x = x.to(dtype).double()
        expected = hessian(wide, lambda call: F.cross_entropy(call(x), y))
        right(HessianOperator(net, CE, (x.to(dtype), y), dtype=torch.float64), expected)

    def test_nothing_to_differentiate(self) -> None:
        net = mlp().requires_grad_(False)
        refused(lambda: HessianOperator(net, CE, data()))
        refused(lambda: HessianOperator(nn.Tanh(), CE, data()))
        refused(lambda: HessianOperator(lambda x: x, CE, data()))


class TestQuantised:
    # PyTorch announces that its quantisation moves to another package.
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("whole", [False, True])
    def test_quantised_modules(self, whole: bool) -> None:
        """Integers cannot be differentiated: one line, also where other layers are left."""
        engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
        assert engines
        torch.backends.quantized.engine = engines[-1]
        which = {nn.Linear} if whole else {"0": torch.ao.quantization.default_dynamic_qconfig}
        net = torch.ao.quantization.quantize_dynamic(mlp().float(), which, dtype=torch.qint8)
        x, y = data()
        # The last layer's parameters are left; its Hessian is right for what it is given.
        if whole:
            refused(lambda: HessianOperator(net, CE, (x.float(), y)))
        else:
            with torch.no_grad():
                hidden = torch.tanh(net[0](x.float())).double()
            last = copy.deepcopy(net[2]).double()
            expected = hessian(last, lambda call: F.cross_entropy(call(hidden), y))
            right_or_refused(lambda: HessianOperator(net, CE, (x.float(), y)), expected, 1e-4)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_fake_quantised_for_training(self) -> None:
        """Straight-through gradients: refused unless that is said."""
        net = mlp().float()
        net[0].qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        prepared = torch.ao.quantization.prepare_qat(net.train())
        x, y = data()
        prepared(x.float())  # sets the observers
        prepared.eval()
        prepared.apply(torch.ao.quantization.disable_observer)
        refused(lambda: HessianOperator(prepared, CE, (x.float(), y)))


class TestEmbeddings:
    class Tokens(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(7, 3, **options), nn.Linear(3, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.o(torch.tanh(self.e(tokens)).mean(1))

    def case(self, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(1)
        tokens = torch.randint(7, (N, 4), generator=torch.Generator().manual_seed(3))
        return self.Tokens(**options).double().eval(), tokens, data()[1]

    def test_sparse_gradients(self) -> None:
        net, tokens, y = self.case(sparse=True)
        dense, *_ = self.case()
        expected = hessian(dense, lambda call: F.cross_entropy(call(tokens), y))
        right_or_all_refused(lambda: HessianOperator(net, CE, (tokens, y)), expected)

    def test_padding(self) -> None:
        """The row of the padding gets no gradient: a constant, or a reason to refuse."""
        net, tokens, y = self.case(padding_idx=0)
        expected = hessian(net, lambda call: F.cross_entropy(call(tokens), y))
        right_or_all_refused(lambda: HessianOperator(net, CE, (tokens, y)), expected)
        # As it starts out, and with a padding that has been moved.
        with torch.no_grad():
            net.e.weight[0] = 1.0
        expected = hessian(net, lambda call: F.cross_entropy(call(tokens), y))
        right_or_all_refused(lambda: HessianOperator(net, CE, (tokens, y)), expected)

    def test_rows_whose_norm_is_cut(self) -> None:
        """``max_norm`` changes the weight in each pass, in place."""
        net, tokens, y = self.case(max_norm=1.0)
        before = net.e.weight.detach().clone()
        # By values alone, since the gradient does not know of the cut.
        f = Function(net, lambda call: F.cross_entropy(call(tokens), y))
        expected = f.second_differences()
        right_or_refused(lambda: HessianOperator(net, CE, (tokens, y)), expected, 1e-4)
        assert torch.equal(net.e.weight.detach(), before)


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "older spectral_norm": nn.utils.spectral_norm,
    "pruned": partial(prune.random_unstructured, name="weight", amount=0.3),
    "pruned twice": lambda m: prune.l1_unstructured(
        prune.random_unstructured(m, "weight", 0.2), "weight", 0.3
    ),
}


@pytest.mark.parametrize("name", NORMS)
class TestReparametrised:
    """Weights that are computed from other parameters in each pass."""

    def test_right_and_as_found(self, name: str) -> None:
        torch.manual_seed(1)
        layer = NORMS[name](nn.Linear(4, 4))
        net = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)).double().eval()
        expected = truth(net)
        net(data()[0].detach())
        held = {key: id(value) for key, value in vars(layer).items()}
        before = {k: v.clone() for k, v in net.state_dict().items()}
        answered = right_or_all_refused(lambda: HessianOperator(net, CE, data()), expected)
        assert answered or name == "weight_norm"
        # An older hook keeps the weight of the last pass: that of the user's, not of ours.
        assert {key: id(value) for key, value in vars(layer).items()} == held
        after = net.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        net(data()[0]).sum().backward()
        assert any(p.grad is not None for p in layer.parameters())


# PyTorch asks for its parametrisation instead.
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
def test_older_weight_norm() -> None:
    torch.manual_seed(1)
    layer = nn.utils.weight_norm(nn.Linear(4, 4))
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)).double().eval()
    right_or_all_refused(lambda: HessianOperator(net, CE, data()), truth(net))


class TestShared:
    def test_one_module_twice(self) -> None:
        torch.manual_seed(1)
        layer = nn.Linear(4, 4)
        net = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)).double().eval()
        right(HessianOperator(net, CE, data()), truth(net))

    def test_tied_under_a_wrapper(self) -> None:
        """Two names of one parameter, in a compiled network."""

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
                self.b.weight = self.a.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.o(torch.tanh(self.b(torch.tanh(self.a(x)))))

        torch.manual_seed(1)
        net = Tied().double().eval()
        right(HessianOperator(torch.compile(net, backend="eager"), CE, data()), truth(net))
