"""HessianOperator against torch.func.hessian, closed forms and finite differences."""

from __future__ import annotations

import copy
import gc
import random

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvpspec
from hvpspec import HessianOperator, Loss
from tests.curvature.cases import CASES, Attention, Case, Frozen, Tied, Tokens, dense_hessian, mlp


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def random_block(H: HessianOperator) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(H.shape[0], 3, dtype=H.dtype, generator=generator)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryCase:
    def test_equals_the_dense_hessian(self, case: Case) -> None:
        model, inputs, targets = case.build()
        H = HessianOperator(model, case.loss, (*inputs, targets))
        expected = dense_hessian(case, model, inputs, targets, trainable(model))
        assert relative_error(H.to_dense(), expected) < 1e-10

    @pytest.mark.parametrize("chunk_size", [1, 7, 1000])
    def test_does_not_depend_on_chunks(self, case: Case, chunk_size: int) -> None:
        model, inputs, targets = case.build()
        H = HessianOperator(model, case.loss, (*inputs, targets), chunk_size=chunk_size)
        V = random_block(H)
        expected = dense_hessian(case, model, inputs, targets, trainable(model)) @ V
        assert relative_error(H @ V, expected) < 1e-10

    def test_ragged_batches_from_a_loader(self, case: Case) -> None:
        model, inputs, targets = case.build()
        loader = DataLoader(TensorDataset(*inputs, targets), batch_size=4)
        H = HessianOperator(model, case.loss, loader)
        V = random_block(H)
        expected = dense_hessian(case, model, inputs, targets, trainable(model)) @ V
        assert relative_error(H @ V, expected) < 1e-10

    def test_gradient_and_loss(self, case: Case) -> None:
        model, inputs, targets = case.build()
        names = trainable(model)
        H = HessianOperator(model, case.loss, (*inputs, targets), l2=0.3, chunk_size=4)
        parameters = [dict(model.named_parameters())[name] for name in names]
        risk = case.loss(model(*inputs), targets) + 0.3 * sum((p**2).sum() for p in parameters)
        parts = torch.autograd.grad(risk, parameters)
        expected = torch.cat([g.reshape(-1) for g in parts])
        assert H.loss() == pytest.approx(float(risk.detach()), rel=1e-12)
        assert relative_error(H.gradient(), expected) < 1e-12

    def test_products_agree_with_each_other(self, case: Case) -> None:
        model, inputs, targets = case.build()
        H = HessianOperator(model, case.loss, (*inputs, targets), l2=0.1)
        V = random_block(H)
        block = H @ V
        for column, v in zip(block.T, V.T, strict=True):
            torch.testing.assert_close(H @ v, column, rtol=1e-12, atol=1e-14)
        u, v, _ = V.T
        assert float(u @ (H @ v)) == pytest.approx(float(v @ (H @ u)), rel=1e-9, abs=1e-13)
        assert H.num_matvecs == 3 + 3 + 2

    def test_float32_and_its_float64_copy(self, case: Case) -> None:
        model, inputs, targets = case.build()
        expected = dense_hessian(case, model, inputs, targets, trainable(model))
        narrow = copy.deepcopy(model).float()
        H = HessianOperator(narrow, case.loss, (*inputs, targets))
        assert H.dtype == torch.float32
        # A few dozen float32 operations lie between the weights and an entry.
        assert relative_error(H.to_dense().double(), expected) < 1e-4
        H64 = H.in_float64()
        assert H64.dtype == torch.float64
        # The weights were rounded to float32; the products are not.
        rounded = HessianOperator(copy.deepcopy(narrow).double(), case.loss, (*inputs, targets))
        V = random_block(H64)
        assert relative_error(H64 @ V, rounded @ V) < 1e-10

    def test_finite_differences_of_the_gradient(self, case: Case) -> None:
        model, inputs, targets = case.build()
        H = HessianOperator(model, case.loss, (*inputs, targets))
        v = torch.randn(H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        product = H @ v
        # Central differences err by step^2 f'''' and u/step: best near u^(1/3).
        step = 6e-6
        gradients = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            parameters = dict(moved.named_parameters())
            with torch.no_grad():
                for name, part in H.space.unflatten(v).items():
                    parameters[name] += sign * step * part
            gradients.append(HessianOperator(moved, case.loss, (*inputs, targets)).gradient())
        difference = (gradients[0] - gradients[1]) / (2 * step)
        scale = float(product.abs().max() + gradients[0].abs().max())
        assert float((difference - product).abs().max()) < 1e-6 * scale

    def test_leaves_everything_as_found(self, case: Case) -> None:
        model, inputs, targets = case.build()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        modes = [m.training for m in model.modules()]
        flags = [p.requires_grad for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = copy.deepcopy(model.state_dict())
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        loader = DataLoader(TensorDataset(*inputs, targets), batch_size=4)
        H = HessianOperator(model, case.loss, loader)
        H.matvec(torch.ones(H.shape[0], dtype=torch.float64))
        H.facts()
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(bool((p.grad == 1).all()) for p in model.parameters())
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]
        assert random.getstate() == states[2]


def small(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (12,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(nn.Tanh)().double(), X, y


def test_linear_regression_has_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, 6, dtype=torch.float64, generator=generator)
    y = torch.randn(30, 1, dtype=torch.float64, generator=generator)
    model = nn.Linear(6, 1, bias=False).double()
    H = HessianOperator(model, nn.MSELoss(), (X, y))
    torch.testing.assert_close(H.to_dense(), 2 / 30 * X.T @ X, rtol=1e-13, atol=1e-14)
    H = HessianOperator(model, nn.MSELoss(), (X, y), l2=0.5)
    expected = 2 / 30 * X.T @ X + torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(H.to_dense(), expected, rtol=1e-13, atol=1e-14)


def test_separable_points_give_index_zero_from_any_start() -> None:
    """The paper's sanity check: 100 separable points in the plane, two classes, linear regression.

    Gradient descent ends in one and the same solution, whose index is 0, from every start.
    """
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(100, 2, dtype=torch.float64, generator=generator)
    targets = torch.sign(points.sum(1, keepdim=True))
    points += 0.5 * targets
    solutions = []
    for seed in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Linear(2, 1).double()
        H = HessianOperator(model, nn.MSELoss(), (points, targets))
        result = hvpspec.index(H)
        assert (result.index, result.nullity, result.positive) == (0, 0, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1 / result.norm)
        for _ in range(500):
            optimizer.zero_grad()
            F.mse_loss(model(points), targets).backward()
            optimizer.step()
        assert hvpspec.index(HessianOperator(model, nn.MSELoss(), (points, targets))).index == 0
        solutions.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    X = torch.cat([points, torch.ones(100, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(X, targets).solution[:, 0]
    for solution in solutions:
        torch.testing.assert_close(solution, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scales_exactly_with_the_loss(scale: float) -> None:
    model, X, y = small()
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
    scaled = HessianOperator(model, lambda o, t: scale * F.cross_entropy(o, t), (X, y)).to_dense()
    assert relative_error(scaled / scale, H) < 1e-13


class TestSelection:
    def test_blocks_are_blocks(self) -> None:
        model, X, y = small()
        H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
        whole = H.to_dense()
        last = slice(24, 39)
        for params in ("2", "2.*", ["2.bias", "2.weight"], model[2], list(model[2].parameters())):
            block = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), params=params)
            assert block.space.names == ("2.weight", "2.bias")
            torch.testing.assert_close(block.to_dense(), whole[last, last])
        torch.testing.assert_close(H.block("0.weight").to_dense(), whole[:20, :20])

    def test_frozen_parameters_are_left_out_unless_named(self) -> None:
        model = Frozen().double()
        _, X, y = small()
        H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
        assert H.space.names == ("unused", "second.weight", "second.bias")
        assert hvpspec.index(H).facts.notes == (
            "no path to the loss, hence exact zero rows: unused",
        )
        named = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), params="first")
        assert named.space.names == ("first.weight", "first.bias")
        assert not model.first.weight.requires_grad
        assert bool(named.to_dense().any())

    def test_tied_parameters_count_once_under_either_name(self) -> None:
        model = Tied().double()
        data = torch.randint(7, (5, 3)), torch.randint(7, (5,))
        H = HessianOperator(model, nn.CrossEntropyLoss(), data)
        assert H.space.names == ("embedding.weight", "mix.weight", "mix.bias")
        block = HessianOperator(model, nn.CrossEntropyLoss(), data, params="head")
        assert block.space.names == ("embedding.weight",)

    def test_a_module_at_two_places_counts_once_and_stays_as_it_is(self) -> None:
        torch.manual_seed(0)
        layer, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        model = nn.Sequential(layer, norm, nn.Tanh(), layer, norm, nn.Tanh(), layer)
        model = model.double()
        X, y = torch.randn(8, 3).double(), torch.randint(3, (8,))
        model(X)  # gives the norm statistics
        model.eval()
        before = [*model.named_parameters(), *model.named_buffers()]
        values = [tensor.clone() for _, tensor in before]
        H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), chunk_size=3)
        assert H.space.names == ("0.weight", "0.bias", "1.weight", "1.bias")

        def loss(vector: Tensor) -> Tensor:
            W, b, scale, shift = (p.view(-1, 3).squeeze(0) for p in vector.split([9, 3, 3, 3]))
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            z = X
            for _ in range(2):
                z = (z @ W.T + b - mean) / (variance + norm.eps).sqrt() * scale + shift
                z = torch.tanh(z)
            return nn.functional.cross_entropy(z @ W.T + b, y)

        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        expected = torch.autograd.functional.hessian(loss, theta)
        for engine in ("double-backward", "linearised"):
            again = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), engine=engine)
            torch.testing.assert_close(again.to_dense(), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-12)
        after = [*model.named_parameters(), *model.named_buffers()]
        for (name, tensor), (same, left), value in zip(before, after, values, strict=True):
            assert name == same
            assert tensor is left
            assert torch.equal(left, value)

    def test_parameters_without_a_dimension(self) -> None:
        class Scaled(nn.Linear):
            """A layer times a number that is learnt."""

            def __init__(self) -> None:
                super().__init__(4, 3)
                self.scale = nn.Parameter(torch.tensor(1.3))

            def forward(self, x: Tensor) -> Tensor:
                return self.scale * super().forward(x)

        model = Scaled().double()
        X, y = torch.randn(8, 4).double(), torch.randint(3, (8,))

        def loss(vector: Tensor) -> Tensor:
            W, b, scale = vector.split([12, 3, 1])
            return nn.functional.cross_entropy(scale * (X @ W.view(3, 4).T + b), y)

        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        expected = torch.autograd.functional.hessian(loss, theta)
        for engine in ("double-backward", "batched", "linearised"):
            H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), engine=engine)
            torch.testing.assert_close(H.to_dense(), expected, rtol=1e-10, atol=1e-12)

    def test_tensors_that_modules_name_in_ways_of_their_own(self) -> None:
        class Named(nn.Linear):
            """Keeps a weight as a buffer, too, counts its calls, and names other tensors."""

            calls: Tensor

            def __init__(self) -> None:
                super().__init__(3, 3)
                self.register_buffer("same", self.weight)
                self.register_buffer("calls", torch.zeros(()))

            def named_parameters(self, prefix="", recurse=True):  # type: ignore[no-untyped-def]
                yield from ()

            def named_buffers(self, prefix="", recurse=True):  # type: ignore[no-untyped-def]
                yield from ()

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return super().forward(x)

        model, plain = nn.Sequential(Named(), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 3)
        plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
        same = nn.Sequential(plain, nn.Tanh(), model[2])
        data = torch.randn(8, 3), torch.randint(3, (8,))
        found, expected = (
            HessianOperator(net, nn.CrossEntropyLoss(), data, dtype=torch.float64).to_dense()
            for net in (model, same)
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert model[0].calls == 0

    def test_vectors_split_into_parameters_and_back(self) -> None:
        model, X, y = small()
        space = HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).space
        theta = space.flatten(dict(model.named_parameters()))
        parts = space.unflatten(theta)
        assert all(torch.equal(parts[name], p) for name, p in model.named_parameters())
        rows = torch.stack([theta, 2 * theta])
        for name, part in space.unflatten(rows).items():
            assert torch.equal(part, torch.stack([parts[name], 2 * parts[name]]))


class TestFormsOfData:
    def test_mappings_with_keyword_arguments(self) -> None:
        class Keywords(Tokens):
            def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
                return super().forward(input_ids) * scale[:, None, None]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Keywords().double()
            ids, scale = torch.randint(6, (9, 4)), torch.rand(9)
            y = torch.randint(5, (9, 4))
        whole = {"input_ids": ids, "scale": scale, "labels": y}
        H = HessianOperator(model, nn.CrossEntropyLoss(), whole).to_dense()
        batches = [{k: v[a : a + 4] for k, v in whole.items()} for a in (0, 4, 8)]
        nested = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in batches]
        for data in (batches, nested):
            H2 = HessianOperator(model, nn.CrossEntropyLoss(), data).to_dense()
            torch.testing.assert_close(H2, H)

    def test_outputs_with_logits(self) -> None:
        class Output:
            def __init__(self, logits: Tensor) -> None:
                self.logits = logits

        class Wrapped(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> Output:
                return Output(self.net(x))

        model, X, y = small()
        expected = HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
        actual = HessianOperator(Wrapped(model), nn.CrossEntropyLoss(), (X, y)).to_dense()
        torch.testing.assert_close(actual, expected)

    def test_a_loss_states_its_weight(self) -> None:
        """Shifted next-token loss over ragged batches equals the loss on all tokens at once."""

        def next_token(logits: Tensor, ids: Tensor) -> Tensor:
            return F.cross_entropy(logits[..., :-1], ids[:, 1:])

        def num_tokens(logits: Tensor, ids: Tensor) -> Tensor:
            return (ids[:, 1:] != -100).sum()

        model, X, y = Tokens().double(), torch.randint(5, (10, 6)), torch.randint(5, (10, 6))
        y[torch.rand(10, 6, generator=torch.Generator().manual_seed(0)) < 0.5] = -100
        case = Case("", Tokens, next_token, tuple, tuple)
        expected = dense_hessian(case, model, (X,), y, trainable(model))
        loss = Loss(next_token, weight=num_tokens, convex=True)
        for chunk_size in (1, 3, 10):
            H = HessianOperator(model, loss, (X, y), chunk_size=chunk_size)
            assert relative_error(H.to_dense(), expected) < 1e-10

    def test_integers_of_any_kind_stay_integers(self) -> None:
        model, data = Tied(), (torch.randint(7, (5, 3), dtype=torch.int32), torch.randint(7, (5,)))
        H = HessianOperator(model, nn.CrossEntropyLoss(), data)
        assert bool(torch.isfinite(H.in_float64().to_dense()).all())


class TestErrors:
    def data(self) -> tuple[Tensor, Tensor]:
        _, X, y = small()
        return X, y

    def hessian(
        self, model: nn.Module, loss: object = None, data: object = None, **options: object
    ):
        return HessianOperator(model, loss or nn.CrossEntropyLoss(), data or self.data(), **options)

    def product(self, *args: object, **options: object) -> Tensor:
        H = self.hessian(*args, **options)
        return H.matvec(torch.ones(H.shape[0], dtype=H.dtype))

    def test_vectors_of_another_shape_or_dtype(self) -> None:
        H = self.hessian(small()[0])
        with pytest.raises(hvpspec.InputError, match=r"shape \(39,\), got \(3,\)"):
            H.matvec(torch.ones(3, dtype=torch.float64))
        with pytest.raises(hvpspec.InputError, match=r"expected dtype torch.float64, got"):
            H.matvec(torch.ones(39))
        with pytest.raises(hvpspec.InputError, match=r"shape \(39, k\), got \(4, 2\)"):
            H @ torch.ones(4, 2, dtype=torch.float64)
        with pytest.raises(hvpspec.NonFiniteError, match="vector to multiply contains NaN"):
            H.matvec(torch.full((39,), torch.nan, dtype=torch.float64))

    def test_a_loss_that_is_not_finite(self) -> None:
        X, y = self.data()
        X[7, 0] = torch.nan
        with pytest.raises(hvpspec.NonFiniteError, match="loss is nan on chunk 3"):
            self.product(small()[0], data=(X, y), chunk_size=2)

    def test_a_product_that_is_not_finite(self) -> None:
        model = nn.Linear(5, 3, bias=False).double()
        model.weight.data.zero_()
        with pytest.raises(hvpspec.NonFiniteError, match="look for sqrt, log, norm"):
            self.product(model, lambda o, t: (o**2).sum(1).sqrt().mean() + 0 * t.sum())

    def test_a_shuffling_loader(self) -> None:
        for generator in (None, torch.Generator().manual_seed(0)):
            loader = DataLoader(
                TensorDataset(*self.data()), batch_size=4, shuffle=True, generator=generator
            )
            with pytest.raises(hvpspec.DataChangedError, match="switch off shuffling"):
                self.product(small()[0], data=loader)

    def test_an_augmenting_loader(self) -> None:
        X, y = self.data()

        class Augmented:
            def __iter__(self):
                yield X + 0.1 * torch.from_numpy(np.random.standard_normal(X.shape)), y

        with pytest.raises(hvpspec.DataChangedError, match="two passes over the data differ"):
            self.product(small()[0], data=Augmented())

    def test_a_loader_that_shrinks_or_grows(self) -> None:
        X, y = self.data()
        for change in (list.pop, lambda batches: batches.append((X, y))):
            batches = [(X[:6], y[:6]), (X[6:], y[6:])]
            H = self.hessian(small()[0], data=batches)
            H.loss()
            change(batches)
            with pytest.raises(hvpspec.DataChangedError, match="chunks"):
                H.gradient()

    def test_a_model_that_draws_random_numbers(self) -> None:
        class Noisy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(F.dropout(x, 0.5, training=True))

        with pytest.raises(hvpspec.DataChangedError, match="randomness in the model"):
            self.product(Noisy(5, 3).double())

    def test_weights_that_change(self) -> None:
        model = small()[0]
        H = self.hessian(model)
        H.loss()
        with torch.no_grad():
            model[0].weight += 0.1
        with pytest.raises(hvpspec.DataChangedError, match="make a new one"):
            H.gradient()

    def test_an_error_leaves_the_model_as_found(self) -> None:
        model = nn.Sequential(nn.Linear(5, 3).double(), nn.Dropout(0.5))
        state = torch.get_rng_state()
        X, y = self.data()
        with pytest.raises(hvpspec.NonFiniteError):
            self.product(model, data=(X * torch.inf, y))
        assert model.training
        assert model[1].training
        assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("data", [[], [(torch.empty(0, 5), torch.empty(0))]])
    def test_an_empty_loader(self, data: list[object]) -> None:
        with pytest.raises(hvpspec.InputError, match="data are empty"):
            HessianOperator(small()[0], nn.CrossEntropyLoss(), data).loss()

    def test_data_that_can_be_read_once(self) -> None:
        with pytest.raises(hvpspec.InputError, match="can be read only once"):
            self.hessian(small()[0], data=iter([self.data()]))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (torch.ones(3), "data must be .* got a tensor of shape"),
            ([torch.ones(3, 5)], "a batch must be"),
            ([{"x": torch.ones(3, 5)}], "none of which is the targets"),
            ((torch.ones(3, 5), torch.ones(4)), r"different lengths: \[3, 4\]"),
        ],
    )
    def test_data_of_another_form(self, data: object, message: str) -> None:
        with pytest.raises(hvpspec.InputError, match=message):
            HessianOperator(small()[0], nn.CrossEntropyLoss(), data).loss()

    def test_a_loss_of_another_kind(self) -> None:
        for loss, message in (
            (nn.CrossEntropyLoss(reduction="none"), "reduction 'mean' or 'sum', got 'none'"),
            ("cross_entropy", "must be callable"),
            (lambda o, t: F.cross_entropy(o, t, reduction="none"), "must return one number"),
            (lambda o, t: F.cross_entropy(o, t) ** 2, "is not a mean over the examples"),
        ):
            X, y = self.data()
            with pytest.raises(hvpspec.InputError, match=message):
                self.product(small()[0], loss, [(X[:5], y[:5]), (X[5:], y[5:])])

    def test_a_penalty_inside_the_loss(self) -> None:
        model = small()[0]

        def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets) + 0.05 * sum(
                p.pow(2).sum() for p in model.parameters()
            )

        with pytest.raises(hvpspec.InputError, match=r"'.*' by itself.*use l2="):
            self.product(model, penalised)

    def test_a_loss_that_is_a_mean_on_the_first_batch_only(self) -> None:
        X, y = torch.randint(6, (9, 4)), torch.randint(5, (9, 4))
        y[7, 1:] = -100
        batches = [(X[:4], y[:4]), (X[4:], y[4:])]
        with pytest.raises(hvpspec.InputError, match="is not a mean over the examples"):
            self.product(Tokens().double(), lambda o, t: F.cross_entropy(o, t), batches)

    def test_examples_that_depend_on_their_batch(self) -> None:
        class Standardised(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                h = super().forward(x)
                return (h - h.mean(0)) / h.std(0)

        with pytest.raises(hvpspec.InputError, match="depends on its batch"):
            self.product(Standardised(5, 3).double(), chunk_size=5)
        self.product(Standardised(5, 3).double())  # all in one chunk is what was meant

    def test_losses_and_layers_whose_second_derivative_is_wrong(self) -> None:
        with pytest.raises(hvpspec.InputError, match="use BCEWithLogitsLoss"):
            self.hessian(small()[0], nn.BCELoss())
        model = small()[0]
        nn.utils.parametrizations.weight_norm(model[0])
        with pytest.raises(hvpspec.NotDifferentiableError, match="weight_norm is wrong"):
            self.product(model)

    def test_weights_that_change_where_the_loss_does_not(self) -> None:
        model = small()[0]
        nn.init.zeros_(model[2].weight)
        H = self.hessian(model)
        H.gradient()
        model[0].weight.data += 1.0
        for ask in (H.loss, H.gradient):
            with pytest.raises(hvpspec.DataChangedError, match="the parameters are others"):
                ask()

    def test_targets_that_would_be_broadcast(self) -> None:
        X, _ = self.data()
        with pytest.raises(hvpspec.InputError, match=r"shape \(12, 1\), targets \(12,\); MSELoss"):
            self.product(nn.Linear(5, 1).double(), nn.MSELoss(), (X, X[:, 0]))

    def test_batchnorm_in_train_mode(self) -> None:
        model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
        with pytest.raises(hvpspec.InputError, match=r"'1' is in train mode.*model.eval\(\)"):
            self.hessian(model)
        model.eval()
        assert self.hessian(model).notes == (
            "normalisation layers use their running statistics (evaluation mode)",
        )
        model[1] = nn.BatchNorm1d(3, track_running_stats=False).double().eval()
        with pytest.raises(hvpspec.InputError, match="has no running statistics"):
            self.hessian(model)

    def test_parameters_without_a_path_to_the_loss(self) -> None:
        for params in ("unused", ["second", "unused"]):
            with pytest.raises(hvpspec.InputError, match="'unused' has no path to the loss"):
                self.product(Frozen().double(), params=params)
        H = self.hessian(Frozen().double())
        assert "unused" in H.space.names
        assert bool((H.to_dense()[:2] == 0).all())

        class Detached(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).detach()

        with pytest.raises(hvpspec.InputError, match="the model has no path to the loss"):
            self.product(Detached(5, 3).double())

    def test_parameters_that_do_not_exist(self) -> None:
        for params in ("head", nn.Linear(5, 3), torch.ones(2), ["0", "9.*"]):
            with pytest.raises(hvpspec.InputError, match=r"matches no parameter.*0.weight"):
                self.hessian(small()[0], params=params)
        with pytest.raises(hvpspec.InputError, match="params is empty"):
            self.hessian(small()[0], params=[])
        with pytest.raises(hvpspec.InputError, match="no parameter with requires_grad=True"):
            self.hessian(small()[0].requires_grad_(False))

    def test_what_cannot_be_differentiated_twice(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, g):
                return g

        class Model(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return Once.apply(super().forward(x))

        with pytest.raises(hvpspec.NotDifferentiableError, match="marked once_differentiable"):
            self.product(Model(5, 3).double())
        with pytest.raises(hvpspec.NotDifferentiableError, match="multi_margin_loss_backward"):
            self.product(small()[0], nn.MultiMarginLoss())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"l2": -1.0}, "l2 must be .* got -1.0"),
            ({"l2": float("nan")}, "l2 must be"),
            ({"chunk_size": 0}, "chunk_size must be .* got 0"),
            ({"dtype": torch.bfloat16}, "need float32 or float64"),
        ],
    )
    def test_options_out_of_range(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(hvpspec.InputError, match=message):
            self.hessian(small()[0], **options)

    def test_parameters_of_mixed_dtype(self) -> None:
        model = small()[0]
        model[2].float()
        with pytest.raises(hvpspec.InputError, match="different dtypes"):
            self.hessian(model)


def test_works_under_no_grad_inference_mode_and_autocast() -> None:
    model, X, y = small()
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    v = torch.ones(39, dtype=torch.float64)
    expected = H @ v
    with torch.no_grad():
        torch.testing.assert_close(H @ v, expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(H @ v, expected, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(H @ v, expected, rtol=0, atol=0)


def test_what_a_module_writes_in_place_does_not_reach_the_caller() -> None:
    class Writes(nn.Linear):
        halves = False

        def forward(self, x: Tensor) -> Tensor:
            if self.halves:
                with torch.no_grad():
                    self.weight.mul_(0.5)
            return super().forward(x.relu_())

    _, X, y = small()
    model, before = Writes(5, 3).double(), X.clone()
    weight = model.weight.detach().clone()
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    plain = nn.Linear(5, 3).double()
    plain.load_state_dict(model.state_dict())
    expected = HessianOperator(plain, nn.CrossEntropyLoss(), (before.relu(), y))
    v = torch.ones(H.shape[0], dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(H @ v, expected @ v)
    model.halves = True  # which autograd does not see: its gradient is twice the loss's
    with pytest.raises(hvpspec.NotDifferentiableError, match="gradient is not that of the loss"):
        HessianOperator(model, nn.CrossEntropyLoss(), (X, y)) @ v
    assert torch.equal(X, before)
    assert torch.equal(model.weight, weight)


def test_nested_targets_are_cut_with_their_examples() -> None:
    model, X, y = small()

    def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["class"])

    expected = HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
    for chunk_size in (1, 7):
        H = HessianOperator(model, loss, [(X, {"class": y})], chunk_size=chunk_size)
        torch.testing.assert_close(H.to_dense(), expected)


def test_a_data_set_that_transforms_is_not_bypassed() -> None:
    class Transforms(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(i)
            return 2 * x, y

    model, X, y = small()
    with pytest.raises(hvpspec.InputError, match="re-iterable of batches"):
        HessianOperator(model, nn.CrossEntropyLoss(), Transforms(X, y))


def test_buffers_that_a_module_writes_are_left_as_found() -> None:
    class Counter(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    _, X, y = small()
    model = Counter().double()
    HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
    assert float(model.calls) == 0


def test_the_fused_attention_kernel_is_avoided_in_float32() -> None:
    model = Attention()
    data = torch.randn(6, 3, 4), torch.randint(3, (6,))
    H = HessianOperator(model, nn.CrossEntropyLoss(), data)
    error = relative_error(H.to_dense().double(), H.in_float64().to_dense())
    assert error < 1e-4


@pytest.mark.parametrize(
    ("change", "engine"),
    [
        *((c, "double-backward") for c in ("signs", "places", "one place", "data", "buffer")),
        ("signs", "linearised"),
    ],
)
def test_changes_that_keep_the_norm_are_noticed(change: str, engine: str) -> None:
    """When all that is kept from product to product would be as before."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    nn.init.normal_(model[2].running_mean)
    data = torch.randn(9, 3), torch.randint(2, (9,))
    H = HessianOperator(model, nn.CrossEntropyLoss(), data, engine=engine)
    v = torch.randn(H.shape[0])
    for _ in range(3):
        H @ v
    (plan,) = H.plan
    assert plan.kept
    weight = model[3].weight
    with torch.no_grad():
        if change == "signs":
            weight.neg_()
        elif change == "places":
            weight.copy_(weight.flip(0))
        elif change == "one place":
            weight[0, :2] = weight[0, :2].flip(0)
        elif change == "data":
            weight.data = -weight.data
        else:
            model[2].running_mean.neg_()
    with pytest.raises(hvpspec.DataChangedError, match="the parameters are others"):
        H @ v


@pytest.mark.parametrize("recurrent", [False, True])
def test_kernels_of_recurrent_layers_that_cannot_be_differentiated_twice(recurrent: bool) -> None:
    """cuDNN's are switched off, and for other models, whose convolutions it is for, left on."""
    seen: set[bool] = set()

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.GRU(2, 3, batch_first=True) if recurrent else nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.backends.cudnn.enabled)
            return self.first(x)[0].sum((1, 2)) if recurrent else self.first(x).sum((1, 2))

    before = torch.backends.cudnn.enabled
    H = HessianOperator(Reader().double(), nn.MSELoss(), (torch.rand(4, 5, 2), torch.rand(4)))
    assert torch.isfinite(H.to_dense()).all()
    assert seen == {before and not recurrent}
    assert torch.backends.cudnn.enabled == before


def test_to_scipy_works_in_eigsh() -> None:
    model, X, y = small()
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    operator = H.to_scipy()
    assert operator.dtype == np.float64
    expected = torch.linalg.eigvalsh(H.to_dense())
    largest = eigsh(operator, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(largest), expected[-3:].numpy(), rtol=1e-10)
    block = np.eye(39)[:, :4]
    np.testing.assert_allclose(operator @ block, H.to_dense()[:, :4].numpy(), atol=1e-14)


def test_memory_does_not_grow_over_a_thousand_products() -> None:
    model, X, y = small()
    X, y = X.repeat(20, 1), y.repeat(20)
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    v = torch.ones(39, dtype=torch.float64)
    process = psutil.Process()
    for _ in range(200):
        H @ v
    gc.collect()
    gc.disable()  # a cycle through a graph would be kept from here on
    try:
        before = process.memory_info().rss
        for _ in range(1000):
            H @ v
        grown = process.memory_info().rss - before
    finally:
        gc.enable()
    # One graph of this network holds over 100 kB; a leak of it would show as 100 MB.
    assert grown < 10e6


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_on_every_device(device: str) -> None:
    model, X, y = small()
    expected = HessianOperator(model, nn.CrossEntropyLoss(), (X, y)).to_dense()
    H = HessianOperator(model.to(device), nn.CrossEntropyLoss(), (X, y))
    assert H.device.type == device
    torch.testing.assert_close(H.to_dense().cpu(), expected, rtol=1e-10, atol=1e-12)
