"""GGNOperator against J^T H J by torch.func, and against the Hessian where the two are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpspec
from hvpspec import GGNOperator, HessianOperator, Loss
from hvpspec.curvature.kronecker import NUM_CHECKS
from tests.curvature.cases import (
    CASES,
    Attention,
    Case,
    Frozen,
    N,
    as_function,
    dense_gauss_newton,
    dense_hessian,
    floats,
    labels,
    mlp,
)
from tests.curvature.test_hessian import random_block, relative_error, trainable
from tests.curvature.test_products import ENGINES

CASES = [
    *CASES,
    Case(
        "squares-sum",
        mlp(nn.Tanh),
        nn.MSELoss(reduction="sum"),
        floats(5),
        lambda: torch.randn(N, 3, dtype=torch.float64),
    ),
    Case("linear-entropy", lambda: nn.Linear(5, 3), nn.CrossEntropyLoss(), floats(5), labels(3)),
]
BY_NAME = {case.name: case for case in CASES}
NOT_CONVEX = {"own-loss"}
TRACED = (
    "tanh-mlp", "label-smoothing", "squares-sum", "convolution", "tied", "frozen-unused",
    "attention", "ignored-tokens", "two-inputs",
)  # fmt: skip
AFFINE = {"regression", "linear-entropy", "frozen-unused"}  # in the selected parameters
# An entry is a sum over some hundred paths, examples and outputs; each number in it has gone
# through a few dozen roundings of 1e-16.
ROUND_OFF = 1e-12

_KNOWN: dict[str, Tensor] = {}


def expected(case: Case) -> Tensor:
    """The Gauss-Newton matrix of a case, computed once."""
    if case.name not in _KNOWN:
        model, inputs, targets = case.build()
        network, theta = as_function(model, inputs, trainable(model))
        _KNOWN[case.name] = dense_gauss_newton(network, lambda z: case.loss(z, targets), theta)
    return _KNOWN[case.name]


def gauss_newton(name: str, **options: Any) -> GGNOperator:
    case = BY_NAME[name]
    model, inputs, targets = case.build()
    return GGNOperator(model, case.loss, (*inputs, targets), **options)


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryCase:
    def test_equals_the_dense_matrix_from_ragged_batches(self, case: Case) -> None:
        model, inputs, targets = case.build()
        loader = DataLoader(TensorDataset(*inputs, targets), batch_size=4)
        G = GGNOperator(model, case.loss, loader)
        A = G.to_dense()
        assert relative_error(A, expected(case)) < ROUND_OFF
        # The test would not see the difference otherwise.
        H = dense_hessian(case, *case.build(), trainable(model))
        assert (relative_error(A, H) < ROUND_OFF) == (case.name in AFFINE)

    def test_value_and_gradient_are_those_of_the_function(self, case: Case) -> None:
        model, inputs, targets = case.build()
        G, H = (
            operator(model, case.loss, (*inputs, targets), l2=0.3, chunk_size=4)
            for operator in (GGNOperator, HessianOperator)
        )
        assert G.loss() == H.loss()
        assert torch.equal(G.gradient(), H.gradient())
        assert G.facts().gradient_norm == H.facts().gradient_norm

    def test_semi_definite_where_the_loss_is_convex(self, case: Case) -> None:
        G = gauss_newton(case.name)
        bound = G.facts().index_bound
        if case.name in NOT_CONVEX:
            assert bound is None
            return
        values = torch.linalg.eigvalsh(G.to_dense())
        assert values[0] >= -len(values) * torch.finfo(torch.float64).eps * values[-1]
        assert bound is not None
        assert (bound.upper, bound.psd_dim) == (0, len(values))
        assert "convex in the outputs" in bound.reason

    def test_float32_and_its_float64_copy(self, case: Case) -> None:
        model, inputs, targets = case.build()
        narrow = copy.deepcopy(model).float()
        G = GGNOperator(narrow, case.loss, (*inputs, targets))
        assert G.dtype == torch.float32
        # A few dozen float32 operations lie between the weights and an entry.
        assert relative_error(G.to_dense().double(), expected(case)) < 1e-4
        G64 = G.in_float64()
        assert type(G64) is GGNOperator
        rounded = GGNOperator(copy.deepcopy(narrow).double(), case.loss, (*inputs, targets))
        V = random_block(G64)
        assert relative_error(G64 @ V, rounded @ V) < ROUND_OFF


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "width"), [("tanh-mlp", 1), *((name, 3) for name in TRACED)])
def test_all_ways_agree(name: str, width: int, engine: str) -> None:
    """With a ragged last chunk, made anew and from what was kept."""
    G = gauss_newton(name, l2=0.3, chunk_size=4, engine=engine)
    V = random_block(G)
    V = V[:, :width]
    product = expected(BY_NAME[name]) @ V + 0.6 * V
    for _ in range(3):
        assert relative_error(G @ V, product) < ROUND_OFF
    (plan,) = G.plan
    if width == 1 and engine == "batched":  # of one vector there is no block
        engine = "double-backward"
    assert (plan.num_vectors, plan.engine, plan.kept, plan.notes) == (width, engine, True, ())


def test_the_choice_changes_to_linearised_products() -> None:
    G = gauss_newton("tanh-mlp")
    V = random_block(G)
    product = expected(BY_NAME["tanh-mlp"]) @ V
    engines = []
    for announced in (0, 10**9):
        G.expect(announced, V.shape[1])
        assert relative_error(G @ V, product) < ROUND_OFF
        engines += [plan.engine for plan in G.plan]
    assert engines == ["batched", "linearised"]


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the last step, C++, which the Hessian's test takes and takes longest."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    G = gauss_newton("tanh-mlp", engine="compiled")
    V = random_block(G)
    for _ in range(2):
        assert relative_error(G @ V, expected(BY_NAME["tanh-mlp"]) @ V) < ROUND_OFF
    (plan,) = G.plan
    assert plan.engine == "compiled"


@pytest.mark.usefixtures("wrong_operation")
def test_an_engine_that_differs_is_dropped_with_a_warning() -> None:
    data = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    model, loss = nn.Linear(3, 2).double(), nn.MSELoss()
    G = GGNOperator(model, loss, data, engine="linearised")
    v = torch.randn(8, dtype=torch.float64)
    product = GGNOperator(model, loss, data, engine="double-backward") @ v
    with pytest.warns(UserWarning, match="linearised products differ from those of"):
        assert torch.equal(G @ v, product)
    assert G.plan[0].engine == "double-backward"


@pytest.mark.parametrize("name", ["tanh-mlp", "convolution", "recurrent", "ignored-tokens"])
def test_the_block_of_the_last_linear_layer_is_the_hessians(name: str) -> None:
    G, case = gauss_newton(name), BY_NAME[name]
    head = next(n for n in reversed(G.space.names)).rpartition(".")[0]
    model, inputs, targets = case.build()
    H = HessianOperator(model, case.loss, (*inputs, targets), params=head)
    block = G.block(head)
    assert type(block) is GGNOperator
    assert relative_error(block.to_dense(), H.to_dense()) < ROUND_OFF
    last = slice(G.shape[0] - H.shape[0], None)
    assert relative_error(G.to_dense()[last, last], H.to_dense()) < ROUND_OFF


def test_equals_the_hessian_where_the_loss_is_stationary_in_the_outputs() -> None:
    model, inputs, _ = BY_NAME["squares-sum"].build()
    data = (*inputs, model(*inputs).detach())
    G = GGNOperator(model, nn.MSELoss(), data).to_dense()
    assert relative_error(G, HessianOperator(model, nn.MSELoss(), data).to_dense()) < ROUND_OFF
    assert float(G.abs().max()) > 0.01


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scales_with_the_loss_and_with_the_square_of_the_outputs(scale: float) -> None:
    case = BY_NAME["squares-sum"]
    model, inputs, targets = case.build()
    G = expected(case)

    def scaled_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * ((outputs - targets) ** 2).sum()

    scaled = GGNOperator(model, Loss(scaled_loss, "sum"), (*inputs, targets)).to_dense()
    assert relative_error(scaled / scale, G) < ROUND_OFF
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter *= scale
    scaled = GGNOperator(model, case.loss, (*inputs, scale * targets), params="0").to_dense()
    assert relative_error(scaled / scale**2, G[:24, :24]) < ROUND_OFF


def test_the_index_of_a_convex_loss_is_0_without_a_search() -> None:
    G = gauss_newton("tanh-mlp")
    result = hvpspec.index(G, tau=1e-9, method="certified")
    assert (result.index, result.confidence) == (0, 0.99)
    assert result.bound == G.structural_upper_bound()
    # Only what measures the noise floor and the norm.
    assert result.num_matvecs < 20
    assert hvpspec.index(G).index == 0


def test_a_concave_loss_goes_down_wherever_the_outputs_move() -> None:
    case = BY_NAME["squares-sum"]
    model, inputs, targets = case.build()
    loss = Loss(lambda outputs, targets: -F.mse_loss(outputs, targets, reduction="sum"), "sum")
    G = GGNOperator(model, loss, (*inputs, targets))
    assert relative_error(G.to_dense(), -expected(case)) < ROUND_OFF
    assert G.structural_upper_bound() is None
    # The rank of J: 33 outputs, 39 parameters.
    assert hvpspec.index(G, method="certified").index == hvpspec.index(G).index == 33


class TestAssembly:
    """The largest linear layer's block takes no products, for this matrix as for the Hessian."""

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(4)
        X = torch.randn(23, 13, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (23,), generator=generator)
        y[::3] = -100
        y[4:8] = -100
        return X, y

    def model(self, *parts: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            net = nn.Sequential(nn.Linear(13, 6), *parts, nn.Tanh(), nn.Linear(6, 5))
        return net.double()

    @pytest.mark.parametrize("chunk_size", [4, 23])
    def test_of_a_first_layer_under_a_curved_network(self, chunk_size: int) -> None:
        model, (X, y) = self.model(), self.data()
        G = GGNOperator(model, nn.CrossEntropyLoss(), (X, y), l2=0.1, chunk_size=chunk_size)
        A = G.to_dense()
        assert G.num_matvecs == 35 + NUM_CHECKS
        network, theta = as_function(model, (X,), list(G.space.names))
        dense = dense_gauss_newton(network, lambda z: F.cross_entropy(z, y), theta)
        dense.diagonal().add_(0.2)
        assert relative_error(A, dense) < ROUND_OFF
        H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), l2=0.1).to_dense()
        assert relative_error(A[:84, :84], H[:84, :84]) > 0.01  # nor is it the Hessian's block

    def test_of_examples_that_depend_on_each_other(self) -> None:
        class Centred(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x - 0.01 * x.mean(0)

        G = GGNOperator(self.model(Centred()), nn.CrossEntropyLoss(), self.data())
        A = G.to_dense()
        assert G.num_matvecs == len(A)
        assert relative_error(A, G @ torch.eye(len(A), dtype=torch.float64)) < ROUND_OFF

    def test_of_a_loss_that_is_linear_in_the_outputs(self) -> None:
        X, y = self.data()
        targets = F.one_hot(y.clamp(min=0), 5).double()
        G = GGNOperator(self.model(), lambda o, t: (o * t).sum(1).mean(), (X, targets))
        assert not G.to_dense().any()
        assert G.notes == ()  # there is a path to the loss


class Pair(NamedTuple):
    """Outputs with names."""

    hidden: Tensor
    logits_: Tensor


class Several(nn.Module):
    """Hidden values and what is made from them, one output a function of the other."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.pack = nn.Linear(5, 4), nn.Linear(4, 3), pack

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.pack(hidden, self.second(hidden))


class Box:
    """Outputs that cannot be looked into."""

    def __init__(self, hidden: Tensor, scores: Tensor) -> None:
        self.parts = hidden, scores


def penalised(hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """A loss in which the outputs meet each other, and the hidden ones curve by themselves."""
    coupling = (hidden[:, :3] * logits).sum(1) ** 2
    return F.cross_entropy(logits, targets) + (coupling + (hidden**4).sum(1)).mean()


class TestOutputsOfEveryKind:
    def problem(
        self, pack: Callable[[Tensor, Tensor], Any], seed: int = 0
    ) -> tuple[nn.Module, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Several(pack).double()
            return model, torch.randn(7, 5).double(), torch.randint(3, (7,))

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize(
        ("pack", "unpack"),
        [
            (lambda h, z: (h, z), tuple),
            (Pair, tuple),
            (lambda h, z: {"z": [z], "h": h}, lambda o: (o["h"], o["z"][0])),
        ],
        ids=["tuple", "namedtuple", "nested"],
    )
    def test_nested(self, pack: Any, unpack: Any, engine: str) -> None:
        model, X, y = self.problem(pack)
        network, theta = as_function(model, (X,), trainable(model))

        def loss(outputs: Any, targets: Tensor) -> Tensor:
            return penalised(*unpack(outputs), targets)

        dense = dense_gauss_newton(
            lambda t: torch.cat(unpack(network(t)), 1),
            lambda z: penalised(z[:, :4], z[:, 4:], y),
            theta,
        )
        G = GGNOperator(model, Loss(loss), [(X[:4], y[:4]), (X[4:], y[4:])], engine=engine)
        V = random_block(G)
        for _ in range(2):
            assert relative_error(G @ V, dense @ V) < ROUND_OFF
        assert [(p.engine, p.notes) for p in G.plan] == [(engine, ())]

    def test_integers_and_others_among_them(self) -> None:
        model, X, y = self.problem(lambda h, z: {"z": z, "class": z.argmax(1), "none": None})

        def loss(outputs: dict[str, Any], targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs["z"], targets) + 0 * outputs["class"].sum()

        G = GGNOperator(model, Loss(loss), (X, y), engine="linearised")
        model.pack = lambda hidden, z: z
        plain = GGNOperator(model, nn.CrossEntropyLoss(), (X, y))
        V = random_block(plain)
        product = plain @ V
        model.pack = lambda h, z: {"z": z, "class": z.argmax(1), "none": None}
        for _ in range(2):
            assert relative_error(G @ V, product) < ROUND_OFF
        assert G.plan[0].notes[0].startswith("linearised, 3 at once: not possible here (")

    def test_an_output_that_the_loss_does_not_take(self) -> None:
        model, X, y = self.problem(lambda h, z: (h, z))
        G = GGNOperator(model, Loss(lambda o, t: (o[0] ** 4).mean()), (X, y))
        assert G.to_dense().any()
        assert G.notes == (
            "no path to the loss, hence exact zero rows: second.weight, second.bias",
        )

    def test_logits(self) -> None:
        class Output(Box):
            @property
            def logits(self) -> Tensor:
                return self.parts[1]

        model, X, y = self.problem(Output)
        G = GGNOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
        model.pack = lambda hidden, z: z
        assert torch.equal(G, GGNOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense())

    def test_an_object_that_cannot_be_looked_into(self) -> None:
        model, X, y = self.problem(Box)
        loss = Loss(lambda outputs, targets: penalised(*outputs.parts, targets))
        HessianOperator(model, loss, (X, y)).to_dense()
        with pytest.raises(hvpspec.InputError, match="not found in its outputs, of type Box"):
            GGNOperator(model, loss, (X, y)).to_dense()


class TestErrors:
    def product(self, model: nn.Module, loss: Any, **options: Any) -> Tensor:
        _, (X,), y = BY_NAME["tanh-mlp"].build()
        G = GGNOperator(model, loss, (X, y), **options)
        return G.matvec(torch.ones(G.shape[0], dtype=torch.float64))

    def test_a_product_that_is_not_finite(self) -> None:
        model = nn.Linear(5, 3, bias=False).double()
        model.weight.data.zero_()
        with pytest.raises(hvpspec.NonFiniteError, match="look for sqrt, log, norm"):
            self.product(model, lambda o, t: (o**2).sum(1).sqrt().mean() + 0 * t.sum())

    def test_no_path_to_the_loss(self) -> None:
        with pytest.raises(hvpspec.InputError, match="'unused' has no path to the loss"):
            self.product(Frozen().double(), nn.CrossEntropyLoss(), params=["second", "unused"])

        class Detached(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).detach()

        with pytest.raises(hvpspec.InputError, match="the model has no path to the loss"):
            self.product(Detached(5, 3).double(), nn.CrossEntropyLoss())

    def test_no_second_derivative(self) -> None:
        model = BY_NAME["tanh-mlp"].build()[0]
        with pytest.raises(hvpspec.NotDifferentiableError, match="multi_margin_loss_backward"):
            self.product(model, nn.MultiMarginLoss())
        nn.utils.parametrizations.weight_norm(model[0])
        with pytest.raises(hvpspec.NotDifferentiableError, match="weight_norm is wrong"):
            self.product(model, nn.CrossEntropyLoss())

    def test_a_loss_that_writes_into_the_outputs(self) -> None:
        def masked(outputs: Tensor, targets: Tensor) -> Tensor:
            outputs[:, 0] *= 0.5
            return F.cross_entropy(outputs, targets)

        model = nn.Linear(5, 3).double()
        with pytest.raises(hvpspec.InputError, match=r"writes into the outputs.*clone\(\)"):
            self.product(model, Loss(masked))
        self.product(model, Loss(lambda outputs, targets: masked(outputs.clone(), targets)))

    @pytest.mark.parametrize("engine", ENGINES)
    def test_a_change_of_what_was_kept(self, engine: str) -> None:
        for what in ("data", "weights"):
            model, (X,), y = BY_NAME["tanh-mlp"].build()
            G = GGNOperator(model, nn.CrossEntropyLoss(), (X, y), engine=engine)
            V = random_block(G)
            for _ in range(3):
                G @ V
            assert G.plan[0].kept
            with torch.no_grad():
                (X if what == "data" else model[0].weight).mul_(2)
            with pytest.raises(hvpspec.DataChangedError):
                G @ V


def test_leaves_the_network_as_found() -> None:
    model, data = Attention().train(), (torch.randn(6, 3, 4), torch.randint(3, (6,)))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    G = GGNOperator(model, nn.CrossEntropyLoss(), data)
    with torch.no_grad():
        error = relative_error(G.to_dense().double(), G.in_float64().to_dense())
    assert error < 1e-4
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
