"""Functions that exist in training mode only, and modules that keep something between calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import hvpspec
from hvpspec import HessianOperator, Loss
from tests.users.truth import (
    AsFound,
    Function,
    hessian,
    refused,
    relative_error,
    right,
    right_or_all_refused,
    right_or_refused,
)

N = 16


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (N,), generator=generator)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return build().double()


def classify(call: Any) -> Tensor:
    """The loss over all the data."""
    x, y = data()
    return F.cross_entropy(call(x), y)


class Auxiliary(nn.Module):
    """Two outputs in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return (self.b(h), self.c(h)) if self.training else self.b(h)


def auxiliary_loss(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, tuple):
        return F.cross_entropy(outputs[0], targets) + 0.4 * F.cross_entropy(outputs[1], targets)
    return F.cross_entropy(outputs, targets)


class TestAuxiliaryHeads:
    def test_as_given(self) -> None:
        net, (x, y) = seeded(Auxiliary).train(), data()
        truth = hessian(net, lambda call: auxiliary_loss(call(x), y))
        found = AsFound(net)
        H = HessianOperator(net, auxiliary_loss, (x, y), mode="as given")
        right(H, truth)
        assert H.loss() == pytest.approx(float(auxiliary_loss(net(x), y).detach()), rel=1e-12)
        right(HessianOperator(net, auxiliary_loss, (x, y), mode="as given", chunk_size=5), truth)
        values = torch.linalg.eigvalsh(truth)
        assert hvpspec.index(H, 1e-6).index == int((values < -1e-6).sum())
        found.check()

    def test_by_default_it_says_what_it_leaves_out(self) -> None:
        net, (x, y) = seeded(Auxiliary).train(), data()
        truth = hessian(net.eval(), lambda call: auxiliary_loss(call(x), y))
        net.train()
        found = AsFound(net)
        H = HessianOperator(net, auxiliary_loss, (x, y))
        right(H, truth)
        assert any("mode" in note and "as given" in note for note in H.notes), H.notes
        found.check()

    def test_a_network_in_evaluation_mode_as_given(self) -> None:
        net, (x, y) = seeded(Auxiliary).eval(), data()
        truth = hessian(net, lambda call: auxiliary_loss(call(x), y))
        right(HessianOperator(net, auxiliary_loss, (x, y), mode="as given"), truth)

    def test_a_loss_that_only_training_allows(self) -> None:
        """Evaluated in evaluation mode the loss fails; the message names the mode."""
        net, (x, y) = seeded(Auxiliary).train(), data()

        def both(o: Any, t: Tensor) -> Tensor:
            first, second = o
            return F.cross_entropy(first, t) + F.cross_entropy(second, t)

        truth = hessian(net, lambda call: both(call(x), y))
        right(HessianOperator(net, both, (x, y), mode="as given"), truth)
        assert "as given" in refused(lambda: HessianOperator(net, both, (x, y)))

    def test_losses_from_the_network(self) -> None:
        """As detectors do: in training the network takes targets and returns its losses."""

        class Detector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 1)

            def forward(self, x: Tensor, targets: Any = None) -> Any:
                h = torch.tanh(self.a(x))
                if not self.training:
                    return [{"class": o} for o in self.b(h)]
                return {
                    "class": F.cross_entropy(self.b(h), targets["class"]),
                    "box": F.mse_loss(self.c(h), targets["box"]),
                }

        net, (x, y) = seeded(Detector).train(), data()
        targets = {"class": y, "box": x[:, :1] ** 2}
        total: Any = lambda o, _: sum(o.values())  # noqa: E731
        truth = hessian(net, lambda call: total(call(x, targets), None))
        batch = ((x, targets), targets)
        right_or_refused(lambda: HessianOperator(net, total, [batch], mode="as given"), truth)
        whole = Loss(total, whole=True)
        right(HessianOperator(net, whole, [batch], mode="as given"), truth)
        refused(lambda: HessianOperator(net, total, [batch]))

    def test_another_mode(self) -> None:
        net, (x, y) = seeded(Auxiliary), data()
        message = refused(lambda: HessianOperator(net, auxiliary_loss, (x, y), mode="train"))
        assert "as given" in message


class HandWritten(nn.Module):
    """Batch statistics in a module of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def normalised(norm: Callable[[], nn.Module]) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), norm(), nn.Tanh(), nn.Linear(5, 3)))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(5),
    "no momentum": lambda: nn.BatchNorm1d(5, momentum=None),
    "no running statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm1d(5, affine=False),
    "hand-written": HandWritten,
}


@pytest.mark.parametrize("norm", NORMS)
class TestBatchStatistics:
    """The edge of stability, say: the function that training sees, on one batch."""

    def test_one_batch(self, norm: str) -> None:
        net, (x, y) = normalised(NORMS[norm]).train(), data()
        truth = hessian(normalised(NORMS[norm]).train(), classify)
        found = AsFound(net)
        for source, chunk_size in (((x, y), None), ([(x, y)], None), ((x, y), N)):
            H = HessianOperator(
                net, nn.CrossEntropyLoss(), source, mode="as given", chunk_size=chunk_size
            )
            right(H, truth)
        found.check()

    def test_the_index_and_its_float64_copy(self, norm: str) -> None:
        net, (x, y) = normalised(NORMS[norm]).float().train(), data()
        truth = hessian(normalised(NORMS[norm]).train(), classify)
        values = torch.linalg.eigvalsh(truth)
        H = HessianOperator(net, nn.CrossEntropyLoss(), (x.float(), y), mode="as given")
        assert hvpspec.index(H, 1e-3).index == int((values < -1e-3).sum())

    def test_several_batches_are_refused(self, norm: str) -> None:
        net, (x, y) = normalised(NORMS[norm]).train(), data()
        loss = nn.CrossEntropyLoss()
        loader: Any = DataLoader(TensorDataset(x, y), batch_size=8)
        refused(lambda: HessianOperator(net, loss, loader, mode="as given"))
        refused(lambda: HessianOperator(net, loss, (x, y), mode="as given", chunk_size=5))
        refused(lambda: HessianOperator(net, loss, (x, y), mode="as given", chunk_size=N - 1))

    def test_by_default(self, norm: str) -> None:
        """In evaluation mode, where there are running statistics; otherwise with the remedy."""
        net, (x, y) = normalised(NORMS[norm]).train(), data()
        truth = hessian(normalised(NORMS[norm]).eval(), classify)
        found = AsFound(net)
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        # Freshly made, a network's running statistics say little, which may be a reason to refuse.
        if right_or_refused(make, truth) and norm not in ("no running statistics", "hand-written"):
            assert any("as given" in note for note in make().notes)
        found.check()

    def test_frozen_in_a_network_that_trains(self, norm: str) -> None:
        """Mode as given: each module's own flag counts."""

        class Partly(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.extra = normalised(NORMS[norm]), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                out = self.net(x)
                return out + self.extra(x) if self.training else out

        def build() -> nn.Module:
            net = seeded(Partly)
            net.net(data()[0])
            net.net.get_submodule("1").eval()
            return net

        net, (x, y) = build(), data()
        truth = hessian(build(), classify)
        found = AsFound(net)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y), mode="as given"), truth)
        found.check()


class TestRandomInTraining:
    @pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.RReLU()])
    def test_is_no_function(self, dropout: nn.Module) -> None:
        net = seeded(lambda: nn.Sequential(nn.Linear(4, 8), dropout, nn.Linear(8, 3))).train()
        x, y = data()
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        refused(lambda: make(mode="as given"))
        right(make(), hessian(net.eval(), classify))

    def test_spectral_norm_iterates_in_training(self) -> None:
        """Each pass in training mode moves its vectors; they are left as found."""

        def build() -> nn.Module:
            spectral = nn.utils.parametrizations.spectral_norm
            return seeded(lambda: nn.Sequential(spectral(nn.Linear(4, 4)), nn.Linear(4, 3)))

        net, (x, y) = build().train(), data()
        found = AsFound(net)
        truth = hessian(build().train(), classify)
        right_or_refused(
            lambda: HessianOperator(net, nn.CrossEntropyLoss(), (x, y), mode="as given"), truth
        )
        found.check()
        truth = hessian(build().eval(), classify)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)
        found.check()


class Cached(nn.Module):
    """A product of parameters that is kept in evaluation mode."""

    def __init__(self, keep: str = "attribute") -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.o, self.keep = nn.Linear(4, 3), keep
        self.W: Any = {"attribute": None, "dict": {}, "list": [], "object": Holder()}[keep]

    def held(self) -> Tensor | None:
        if isinstance(self.W, dict):
            return self.W.get("W")
        if isinstance(self.W, list):
            return self.W[0] if self.W else None
        return self.W.value if isinstance(self.W, Holder) else self.W

    def hold(self, W: Tensor) -> None:
        if isinstance(self.W, dict):
            self.W["W"] = W
        elif isinstance(self.W, list):
            self.W[:] = [W]
        elif isinstance(self.W, Holder):
            self.W.value = W
        else:
            self.W = W

    def forward(self, x: Tensor) -> Tensor:
        W = None if self.training else self.held()
        if W is None:
            W = self.A @ self.B
            if not self.training:
                self.hold(W)
        return self.o(torch.tanh(x @ W))


class Holder:
    """An object that is no container."""

    value: Tensor | None = None


class Symmetric(nn.Module):
    """A symmetric matrix of its upper half."""

    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT


@pytest.mark.parametrize("keep", ["attribute", "dict", "list", "object"])
class TestCaches:
    """A module that keeps what it computed from its parameters."""

    def truth(self, keep: str) -> Tensor:
        return hessian(seeded(lambda: Cached(keep)).train(), classify)

    def test_empty(self, keep: str) -> None:
        net, (x, y) = seeded(lambda: Cached(keep)).eval(), data()
        found = AsFound(net)
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        right_or_all_refused(make, self.truth(keep))
        found.check()
        assert net.held() is None

    def test_in_training_mode(self, keep: str) -> None:
        """The mode hvpspec sets is the one in which it is kept."""
        net, (x, y) = seeded(lambda: Cached(keep)).train(), data()
        found = AsFound(net)
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        right_or_all_refused(make, self.truth(keep))
        right(make(mode="as given"), self.truth(keep))
        found.check()
        assert net.held() is None

    @pytest.mark.parametrize("graph", [False, True])
    def test_filled_before(self, keep: str, graph: bool) -> None:
        """As after an evaluation: as it stands, the network does not depend on the factors."""
        net, (x, y) = seeded(lambda: Cached(keep)).eval(), data()
        with torch.set_grad_enabled(graph):
            net(x)
        kept = net.held()
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        try:
            H = make()
            if relative_error(H.to_dense(), self.truth(keep)) > 1e-9:
                assert any("A" in note and "B" in note for note in H.notes), H.notes
        except hvpspec.HvpspecError:
            pass
        assert net.held() is kept

    def test_two_operators_in_a_row(self, keep: str) -> None:
        """What one leaves behind must not reach the next, at other weights."""
        net, (x, y) = seeded(lambda: Cached(keep)).eval(), data()
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        right_or_refused(make, self.truth(keep))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5)
        moved = seeded(lambda: Cached(keep)).train()
        moved.load_state_dict(net.state_dict())
        right_or_refused(make, hessian(moved, classify))


class TestOtherStates:
    def test_parametrisations(self) -> None:
        def build() -> nn.Module:
            net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
            parametrize.register_parametrization(net[0], "weight", Symmetric())
            return net

        net, (x, y) = seeded(build).eval(), data()
        truth = hessian(net, classify)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)
        with parametrize.cached():
            make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
            right_or_all_refused(make, truth)
        found = AsFound(net)
        with parametrize.cached():
            with torch.no_grad():
                net(x)  # fills the cache
            right_or_refused(make, truth)
        found.check()

    def test_made_under_a_cache_and_asked_outside(self) -> None:
        def build() -> nn.Module:
            net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
            parametrize.register_parametrization(net[0], "weight", Symmetric())
            return net

        net, (x, y) = seeded(build).eval(), data()
        truth = hessian(net, classify)
        try:
            with parametrize.cached():
                H = HessianOperator(net, nn.CrossEntropyLoss(), (x, y))
                H.loss()
        except hvpspec.HvpspecError:
            return
        right_or_refused(lambda: H, truth)

    @pytest.mark.parametrize("detach", [False, True])
    def test_hidden_state_between_calls(self, detach: bool) -> None:
        class Stateful(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.r, self.o = nn.RNNCell(4, 3), nn.Linear(3, 3)
                self.h: Tensor | None = None

            def forward(self, x: Tensor) -> Tensor:
                before = self.h.detach() if detach and self.h is not None else self.h
                self.h = self.r(x, before)
                return self.o(self.h)

        net, (x, y) = seeded(Stateful).eval(), data()
        # The function at the state that is found: none.
        truth = hessian_of_first_call(lambda: seeded(Stateful).eval())
        make = partial(HessianOperator, net, nn.CrossEntropyLoss(), (x, y))
        right_or_all_refused(make, truth)
        assert net.h is None

    def test_a_counter_and_an_average_in_buffers(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 3)
                self.register_buffer("calls", torch.zeros((), dtype=torch.long))
                self.register_buffer("mean", torch.zeros(4))
                self.seen = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                self.seen += 1
                if self.training:
                    self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
                return self.a(x - self.mean)

        net, (x, y) = seeded(Counting).eval(), data()
        found = AsFound(net)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), hessian(net, classify))
        net.calls.zero_()
        found.check()
        # In training mode each call changes the function.
        net.train()
        truth = hessian_of_first_call(lambda: seeded(Counting).train())
        right_or_refused(
            lambda: HessianOperator(net, nn.CrossEntropyLoss(), (x, y), mode="as given"), truth
        )
        net.calls.zero_()
        found = AsFound(net)
        found.check()

    def test_outputs_that_are_kept(self) -> None:
        """Attention maps and features kept for plots: no tensor of ours stays."""

        class Keeping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
                self.features: Any = None
                self.history: list[Tensor] = []

            def forward(self, x: Tensor) -> Tensor:
                self.features = torch.tanh(self.a(x))
                self.history.append(self.features)
                return self.b(self.features)

        net, (x, y) = seeded(Keeping).eval(), data()
        found = AsFound(net)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), hessian_of(Keeping))
        found.check()

    def test_a_regulariser_kept_for_the_loss(self) -> None:
        """The network keeps a penalty of its parameters, which the loss reads."""

        class Penal(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 3)
                self.penalty: Any = torch.zeros(())

            def forward(self, x: Tensor) -> Tensor:
                self.penalty = self.a.weight.square().sum()
                return self.a(x)

        net, (x, y) = seeded(Penal).eval(), data()
        loss: Any = lambda o, t: F.cross_entropy(o, t) + net.penalty  # noqa: E731
        truth = hessian(net, lambda call: loss(call(x), y))
        net.penalty = torch.zeros(())
        found = AsFound(net)
        right_or_refused(lambda: HessianOperator(net, loss, (x, y)), truth)
        found.check()

    def test_a_penalty_that_reads_the_model(self) -> None:
        """``loss + decay * sum(p**2 for p in model.parameters())`` in a closure."""
        net, (x, y) = seeded(lambda: nn.Sequential(nn.Linear(4, 3))).eval(), data()

        def loss(o: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(o, t) + 0.1 * sum(p.square().sum() for p in net.parameters())

        truth = hessian(net, classify)
        truth += 0.2 * torch.eye(len(truth), dtype=truth.dtype)
        right_or_all_refused(partial(HessianOperator, net, loss, (x, y)), truth)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, y), l2=0.1), truth)


def hessian_of(build: Callable[[], nn.Module]) -> Tensor:
    """The Hessian of another copy of a network."""
    return hessian(seeded(build).eval(), classify)


def hessian_of_first_call(build: Callable[[], nn.Module]) -> Tensor:
    """The Hessian of a network's first call, a new copy for each value."""
    f = Function(build(), classify)
    copies = [Function(build(), classify) for _ in range(2 * len(f.theta))]
    columns = []
    for i in range(len(f.theta)):
        e = torch.zeros_like(f.theta)
        e[i] = 1e-5
        above, below = copies[2 * i].gradient(f.theta + e), copies[2 * i + 1].gradient(f.theta - e)
        columns.append((above - below) / 2e-5)
    exact = Function(build(), classify).hessian()
    H = torch.stack(columns, 1)
    # Double backward through the first call is exact, and differences say that it is right.
    assert relative_error(exact, (H + H.T) / 2) < 1e-6
    return exact


@pytest.mark.oracle
# GPyTorch builds sparse tensors, whose checks PyTorch asks to be set.
@pytest.mark.filterwarnings("ignore")
class TestExactGaussianProcess:
    """The marginal likelihood, which exists in training mode; evaluation means the posterior."""

    POINTS = 12

    def points(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        X = torch.rand(self.POINTS, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.POINTS, generator=generator, dtype=torch.float64)
        return X, (6 * X[:, 0]).sin() + 0.1 * noise

    def process(self) -> Any:
        import gpytorch

        class Process(gpytorch.models.ExactGP):
            def __init__(self, X: Tensor, Y: Tensor, likelihood: Any) -> None:
                super().__init__(X, Y, likelihood)
                self.m = gpytorch.means.ConstantMean()
                self.k = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

            def forward(self, x: Tensor) -> Any:
                return gpytorch.distributions.MultivariateNormal(self.m(x), self.k(x))

        X, Y = self.points()
        return Process(X, Y, gpytorch.likelihoods.GaussianLikelihood()).double().train()

    def likelihood(self, process: Any, parameters: dict[str, Tensor]) -> Tensor:
        """The negative log marginal likelihood, a point, written out."""
        X, Y = self.points()
        get = parameters.__getitem__
        length = F.softplus(get("k.base_kernel.raw_lengthscale"))
        scale = F.softplus(get("k.raw_outputscale"))
        noise = F.softplus(get("likelihood.noise_covar.raw_noise")) + 1e-4
        mean = next(p for name, p in parameters.items() if name.startswith("m."))
        K = scale * torch.exp(-((X - X.T) / length).square() / 2)
        K = K + noise * torch.eye(len(X), dtype=X.dtype)
        normal = torch.distributions.MultivariateNormal(mean.expand(len(X)), K)
        return -normal.log_prob(Y) / len(X)

    def truth(self, process: Any) -> Tensor:
        named = dict(process.named_parameters())
        sizes = [p.numel() for p in named.values()]
        theta = torch.cat([p.detach().reshape(-1) for p in named.values()]).requires_grad_()

        def value(theta: Tensor) -> Tensor:
            parts = theta.split(sizes)
            shaped = {
                name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)
            }
            return self.likelihood(process, shaped)

        (g,) = torch.autograd.grad(value(theta), theta, create_graph=True)
        rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in g]
        return torch.stack(rows)

    def test_in_the_forward_pass(self) -> None:
        """The loss and its gradient are right; PyTorch's second derivative of it is not."""
        import gpytorch

        class Marginal(nn.Module):
            def __init__(self, process: Any) -> None:
                super().__init__()
                self.process = process
                self.mll = gpytorch.mlls.ExactMarginalLogLikelihood(process.likelihood, process)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return -self.mll(self.process(x), y)

        net = Marginal(self.process()).train()
        truth = self.truth(net.process)
        X, Y = self.points()
        take: Any = lambda o, _: o  # noqa: E731
        whole = Loss(take, whole=True)
        f = Function(net, lambda call: call(X, Y))
        point = hvpspec.Objective(net, whole, (X, Y, Y), mode="as given")
        expected = self.likelihood(net.process, dict(net.process.named_parameters()))
        assert point.value() == pytest.approx(float(expected.detach()), rel=1e-9)
        assert relative_error(point.gradient(), f.gradient()) < 1e-9
        for loss in (take, whole):
            right_or_all_refused(
                partial(HessianOperator, net, loss, (X, Y, Y), mode="as given"), truth, 1e-8
            )

    def test_by_a_closure(self) -> None:
        """The likelihood's noise is a parameter of the network that only the loss uses."""
        import gpytorch

        process = self.process()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(process.likelihood, process)
        loss: Any = lambda o, y: -mll(o, y)  # noqa: E731
        truth = self.truth(process)
        X, Y = self.points()
        for given in (loss, Loss(loss, whole=True)):
            right_or_all_refused(
                partial(HessianOperator, process, given, (X, Y), mode="as given"), truth, 1e-8
            )

    def test_written_out(self) -> None:
        """The same process in PyTorch alone: the prior in training, the posterior otherwise."""

        class Written(nn.Module):
            def __init__(self, X: Tensor, Y: Tensor) -> None:
                super().__init__()
                self.X, self.Y = X, Y
                self.raw = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

            def forward(self, x: Tensor) -> Any:
                length, scale, noise = F.softplus(self.raw)

                def k(a: Tensor, b: Tensor) -> Tensor:
                    return scale * torch.exp(-((a - b.T) / length).square() / 2)

                eye = torch.eye(len(self.X), dtype=x.dtype)
                K = k(self.X, self.X) + (noise + 1e-4) * eye
                if self.training:
                    return torch.distributions.MultivariateNormal(torch.zeros_like(self.Y), K)
                weights = torch.linalg.solve(K, k(self.X, x))
                cover = k(x, x) - k(x, self.X) @ weights + 1e-3 * torch.eye(len(x), dtype=x.dtype)
                return torch.distributions.MultivariateNormal(weights.T @ self.Y, cover)

        X, Y = self.points()
        loss: Any = lambda o, y: -o.log_prob(y) / len(y)  # noqa: E731
        net = seeded(lambda: Written(X, Y)).train()
        truth = hessian(net, lambda call: loss(call(X), Y))
        whole = Loss(loss, whole=True)
        right(HessianOperator(net, whole, (X, Y), mode="as given"), truth)
        right_or_refused(lambda: HessianOperator(net, loss, (X, Y), mode="as given"), truth)
        H = HessianOperator(net, whole, (X, Y))
        assert H.loss() == pytest.approx(float(loss(net.eval()(X), Y).detach()), rel=1e-9)
        net.train()
        assert any("as given" in note for note in H.notes), H.notes
        posterior = hessian(net.eval(), lambda call: loss(call(X), Y))
        net.train()
        right_or_refused(lambda: HessianOperator(net, whole, (X, Y)), posterior, 1e-8)

    def test_by_default(self) -> None:
        """In evaluation mode it is the posterior, which is said."""
        import gpytorch

        process = self.process()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(process.likelihood, process)
        X, Y = self.points()
        loss: Any = lambda o, y: -mll(o, y)  # noqa: E731
        try:
            H = HessianOperator(process, loss, (X, Y))
            H.to_dense()
        except hvpspec.HvpspecError:
            return
        assert any("as given" in note for note in H.notes), H.notes
