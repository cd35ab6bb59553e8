"""Data, outputs and losses as they come."""

from __future__ import annotations

import math
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

import hvpspec
from hvpspec import GGNOperator, HessianOperator, Loss
from tests.users.truth import (
    AsFound,
    Whole,
    check_message,
    hessian,
    refused,
    relative_error,
    right,
    right_or_all_refused,
    right_or_refused,
)

N = 18


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(classes: int = 3, n: int = N) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(5))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return build().double().eval()


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, outputs)))


class Two(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 3) for _ in range(4))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x1)) * torch.sigmoid(self.b(x2))
        return self.c(F.pad(h, (0, 1))), self.d(F.pad(h, (1, 0)))


def two_losses(o: Any, t: Any) -> Tensor:
    first, second = t.values() if isinstance(t, dict) else t
    return F.cross_entropy(o[0], first) + F.mse_loss(o[1], second)


CE = nn.CrossEntropyLoss()


class Batch(NamedTuple):
    """A batch as a named tuple."""

    inputs: Tensor
    targets: Tensor


@dataclass
class Record:
    """A batch as a dataclass."""

    inputs: Tensor
    targets: Tensor


class Examples(Dataset):
    """Pairs, one by one, from a function of the data."""

    def __init__(self, item: Callable[[int], Any], n: int = N) -> None:
        self.item, self.n = item, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if i >= self.n:
            raise IndexError(i)
        return self.item(i)


class TestPairs:
    """Two inputs with two targets, and what else a pair of pairs may mean."""

    def problem(self) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A network, its two inputs and two targets, and the Hessian."""
        net, y, r = seeded(Two), labels(), draw(N, 3, seed=2)
        x1, x2 = draw(N, 4), draw(N, 4, seed=1)
        return net, x1, x2, y, r, hessian(net, lambda call: two_losses(call(x1, x2), (y, r)))

    def test_two_inputs_and_two_targets(self) -> None:
        net, x1, x2, y, r, truth = self.problem()
        right(HessianOperator(net, two_losses, ((x1, x2), (y, r))), truth)
        right(HessianOperator(net, two_losses, ((x1, x2), (y, r)), chunk_size=5), truth)
        right(HessianOperator(net, two_losses, [((x1, x2), (y, r))]), truth)
        right(HessianOperator(net, two_losses, (x1, x2, (y, r))), truth)
        right(HessianOperator(net, two_losses, ((x1, x2), {"class": y, "value": r})), truth)
        right(HessianOperator(net, two_losses, ({"x1": x1, "x2": x2}, (y, r))), truth)
        H = HessianOperator(net, two_losses, ((x1, x2), (y, r)))
        assert H.loss() == pytest.approx(float(two_losses(net(x1, x2), (y, r)).detach()), rel=1e-12)

    def test_lists_may_mean_batches(self) -> None:
        """A list of two pairs is two batches, or two inputs and two targets: never both."""
        net, x1, x2, y, r, truth = self.problem()
        for data in ([(x1, x2), (y, r)], [[x1, x2], [y, r]]):
            right_or_refused(partial(HessianOperator, net, two_losses, data), truth)

    def test_two_batches(self) -> None:
        net, x, y = mlp(), draw(N, 4), labels()
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        pairs = list(zip(x.split((12, 6)), y.split((12, 6)), strict=True))
        right(HessianOperator(net, CE, pairs), truth)
        right(HessianOperator(net, CE, [list(pair) for pair in pairs]), truth)
        # In tuples it may be two inputs and two targets; the network takes one input.
        right_or_refused(lambda: HessianOperator(net, CE, tuple(pairs)), truth)

    @pytest.mark.parametrize("container", [tuple, list])
    def test_pairs_that_fit_both_ways(self, container: Any) -> None:
        """A network with an optional second input takes both readings: told apart, or refused."""

        class Optional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
                return self.a(x) * (1 if context is None else torch.tanh(self.b(context)))

        def loss(o: Tensor, t: Any) -> Tensor:
            both = t if isinstance(t, tuple | list) else (t,)
            return sum((o.tanh() - b).square().mean() for b in both)

        net = seeded(Optional)
        a, b, c, d = (draw(N, 4, seed=s) for s in range(4))
        batches = hessian(net, lambda call: loss(call(torch.cat([a, c])), torch.cat([b, d])))
        inputs = hessian(net, lambda call: loss(call(a, b), (c, d)))
        data = container([(a, b), (c, d)])
        try:
            found = HessianOperator(net, loss, data).to_dense()
        except hvpspec.HvpspecError as error:
            message = check_message(error)
            assert "batch" in message
            assert "input" in message
            return
        # As the documentation says: a tuple is inputs and targets, a list is batches.
        truth = inputs if container is tuple else batches
        assert relative_error(found, truth) < 1e-9

    def test_targets_as_a_pair(self) -> None:
        net, x, y, r = seeded(lambda: TwoHeads()), draw(N, 4), labels(), draw(N, 3, seed=2)
        truth = hessian(net, lambda call: two_losses(call(x), (y, r)))
        for targets in ((y, r), [y, r], {"class": y, "value": r}):
            right(HessianOperator(net, two_losses, (x, targets)), truth)
            right(HessianOperator(net, two_losses, (x, targets), chunk_size=7), truth)
            right(HessianOperator(net, two_losses, [(x, targets)]), truth)
        examples = Examples(lambda i: (x[i], (y[i], r[i])))
        right(HessianOperator(net, two_losses, DataLoader(examples, batch_size=7)), truth)

    def test_one_target_in_a_mapping(self) -> None:
        net, x, y = mlp(), draw(N, 4), labels()
        loss: Any = lambda o, t: F.cross_entropy(o, t["a"])  # noqa: E731
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        right(HessianOperator(net, loss, (x, {"a": y})), truth)
        right(HessianOperator(net, loss, (x, {"a": y}), chunk_size=7), truth)
        examples = Examples(lambda i: (x[i], {"a": y[i]}))
        right(HessianOperator(net, loss, DataLoader(examples, batch_size=7)), truth)


class TwoHeads(nn.Module):
    """One input, two outputs in a container."""

    def __init__(self, kind: str = "tuple") -> None:
        super().__init__()
        self.body, self.a, self.b, self.kind = (
            nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3), kind
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return OUTPUTS[self.kind](self.a(h), self.b(h))


class Named(NamedTuple):
    """Outputs as a named tuple."""

    first: Tensor
    second: Tensor


@dataclass
class Structured:
    """Outputs as a dataclass."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Frozen:
    """Outputs as a frozen dataclass."""

    first: Tensor
    second: Tensor


class WithLogits(OrderedDict):
    """A mapping with attributes, as libraries of large models return it."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]

    @property
    def second(self) -> Tensor:
        return self["second"]


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"first": a, "second": b},
    "nested": lambda a, b: {"heads": [a, {"second": b}], "name": "two", "number": 2},
    "namedtuple": Named,
    "dataclass": Structured,
    "frozen dataclass": Frozen,
    "namespace": lambda a, b: SimpleNamespace(first=a, second=b),
    "with logits": lambda a, b: WithLogits(logits=a, second=b),
}


def heads(o: Any) -> tuple[Tensor, Tensor]:
    if isinstance(o, WithLogits):
        return o.logits, o.second
    if isinstance(o, dict):
        return (o["heads"][0], o["heads"][1]["second"]) if "heads" in o else tuple(o.values())
    if isinstance(o, tuple | list):
        return o[0], o[1]
    return o.first, o.second


class TestOutputs:
    """Outputs are handed to the loss as the network returns them."""

    @pytest.mark.parametrize("kind", OUTPUTS)
    def test_containers(self, kind: str) -> None:
        net, x, y, r = seeded(lambda: TwoHeads(kind)), draw(N, 4), labels(), draw(N, 3, seed=2)
        kinds = set()

        def loss(o: Any, t: Any) -> Tensor:
            kinds.add(type(o))
            return two_losses(heads(o), t)

        truth = hessian(net, lambda call: loss(call(x), (y, r)))
        expected = set(kinds)
        right(HessianOperator(net, loss, (x, (y, r))), truth)
        batches = [(x[:12], (y[:12], r[:12])), (x[12:], (y[12:], r[12:]))]
        assert right_or_refused(lambda: HessianOperator(net, loss, batches), truth) or (
            kind == "namespace"
        )
        declared = Loss(loss, weight=lambda o, t: len(t[0]))
        right(HessianOperator(net, declared, batches), truth)
        assert kinds == expected, "the loss was shown something else"

    def test_logits_for_losses_of_torch(self) -> None:
        net, x, y = seeded(lambda: TwoHeads("with logits")), draw(N, 4), labels()
        truth = hessian(net, lambda call: F.cross_entropy(call(x).logits, y))
        for loss in (CE, F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.0)):
            right(HessianOperator(net, loss, (x, y)), truth)
            right(HessianOperator(net, loss, (x, y), chunk_size=5), truth)
        G = GGNOperator(net, CE, (x, y)).to_dense()
        # Without the curvature of the network itself, which the last layer has none of.
        last = slice(len(truth) - 24, len(truth) - 12)
        assert relative_error(G[last, last], truth[last, last]) < 1e-9

    def test_a_loss_that_the_model_computes(self) -> None:
        """``lambda out, labels: out.loss`` sees the model's own output."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 3)

            def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
                logits = self.a(x)
                loss = None if labels is None else F.cross_entropy(logits, labels)
                return SimpleNamespace(loss=loss, logits=logits)

        net, x, y = seeded(Model), draw(N, 4), labels()
        truth = hessian(net, lambda call: F.cross_entropy(call(x).logits, y))
        loss: Any = lambda out, _: out.loss  # noqa: E731
        for data in (
            [({"x": x, "labels": y}, y)],
            ({"x": x, "labels": y}, y),
            {"x": x, "labels": y},
            [(x[:12], y[:12], y[:12]), (x[12:], y[12:], y[12:])],
        ):
            right_or_refused(partial(HessianOperator, net, loss, data), truth)
        whole = Loss(loss, whole=True)
        right(HessianOperator(net, whole, [({"x": x, "labels": y}, y)]), truth)
        mean = Loss(loss, weight=lambda out, labels: len(labels))
        right(
            HessianOperator(net, mean, [(x[:12], y[:12], y[:12]), (x[12:], y[12:], y[12:])]), truth
        )

    @pytest.mark.parametrize("chunk_size", [None, 5])
    def test_distributions(self, chunk_size: int | None) -> None:
        """A policy and a critic: what has logits or a mean is still a distribution."""

        class Policy(nn.Module):
            def __init__(self, kind: str) -> None:
                super().__init__()
                self.a, self.b, self.kind = nn.Linear(4, 3), nn.Linear(4, 3), kind

            def forward(self, x: Tensor) -> Any:
                if self.kind == "categorical":
                    return Categorical(logits=self.a(x))
                if self.kind == "probabilities":
                    return Categorical(probs=self.a(x).softmax(1))
                normal = Normal(self.a(x), F.softplus(self.b(x)) + 0.1)
                return Independent(normal, 1) if self.kind == "independent" else normal

        x, advantage = draw(N, 4), draw(N, seed=3)
        for kind in ("categorical", "probabilities", "normal", "independent"):
            net = seeded(partial(Policy, kind))
            action = labels() if kind in ("categorical", "probabilities") else draw(N, 3, seed=4)

            def loss(o: Any, t: Any) -> Tensor:
                log = o.log_prob(t[0])
                return -(log.reshape(len(log), -1).sum(1) * t[1]).mean()

            truth = hessian(net, lambda call, a=action: loss(call(x), (a, advantage)))
            data = (x, (action, advantage))
            make = partial(HessianOperator, net, loss, data, chunk_size=chunk_size)
            assert right_or_refused(make, truth) or chunk_size is not None
            right_or_refused(partial(HessianOperator, net, loss, [data], chunk_size=3), truth)

    def test_a_categorical_alone(self) -> None:
        class Policy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Categorical:
                return Categorical(logits=self.a(x))

        net, x, y = seeded(Policy), draw(N, 4), labels()
        loss: Any = lambda o, t: -o.log_prob(t).mean()  # noqa: E731
        truth = hessian(net, lambda call: loss(call(x), y))
        right(HessianOperator(net, loss, (x, y)), truth)
        entropy: Any = lambda o, t: -(o.log_prob(t) + 0.1 * o.entropy()).mean()  # noqa: E731
        truth = hessian(net, lambda call: entropy(call(x), y))
        right(HessianOperator(net, entropy, (x, y)), truth)
        # A loss of PyTorch takes the logits.
        truth = hessian(net, lambda call: F.cross_entropy(call(x).logits, y))
        right(HessianOperator(net, CE, (x, y)), truth)


class TestForms:
    """Batches in all forms."""

    def truth(self, net: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        x, y = draw(N, 4), labels()
        return x, y, hessian(net, lambda call: F.cross_entropy(call(x), y))

    @pytest.mark.parametrize("form", [
        "pair", "list pair", "dataset", "loader", "batches", "tuples", "namedtuples", "dataclasses",
        "mapping", "mappings", "user mapping", "loader of mappings", "loader of namedtuples",
        "keywords", "concatenated",
    ])  # fmt: skip
    def test_form(self, form: str) -> None:
        net = mlp()
        x, y, truth = self.truth(net)
        parts = list(zip(x.split(7), y.split(7), strict=True))
        named = "input"  # the name of nn.Sequential's argument
        data: Any = {
            "pair": lambda: (x, y),
            "list pair": lambda: [x, y],
            "dataset": lambda: TensorDataset(x, y),
            "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=7),
            "batches": lambda: [list(p) for p in parts],
            "tuples": lambda: parts,
            "namedtuples": lambda: [Batch(*p) for p in parts],
            "dataclasses": lambda: [Record(*p) for p in parts],
            "mapping": lambda: {named: x, "labels": y},
            "mappings": lambda: [{named: a, "target": b} for a, b in parts],
            "user mapping": lambda: [UserDict({named: a, "labels": b}) for a, b in parts],
            "loader of mappings": lambda: DataLoader(
                Examples(lambda i: {named: x[i], "label": y[i]}), batch_size=7
            ),
            "loader of namedtuples": lambda: DataLoader(
                Examples(lambda i: Batch(x[i], y[i])), batch_size=7
            ),
            "keywords": lambda: [({named: a}, b) for a, b in parts],
            "concatenated": lambda: DataLoader(
                ConcatDataset([TensorDataset(x[:5], y[:5]), TensorDataset(x[5:], y[5:])]),
                batch_size=7,
            ),
        }[form]()
        right(HessianOperator(net, CE, data), truth)
        right(HessianOperator(net, CE, data, chunk_size=4), truth)
        loss: Any = lambda o, t: F.cross_entropy(o, t)  # noqa: E731
        right(HessianOperator(net, loss, data), truth)

    @pytest.mark.parametrize("form", ["subset", "own", "concatenated", "list of examples"])
    def test_data_sets_of_single_examples(self, form: str) -> None:
        """A data set where a loader is meant: right, or refused with the remedy."""
        net = mlp()
        x, y, truth = self.truth(net)
        data: Any = {
            "subset": lambda: Subset(TensorDataset(x, y), range(N)),
            "own": lambda: Examples(lambda i: (x[i], y[i])),
            "concatenated": lambda: ConcatDataset([TensorDataset(x, y)]),
            "list of examples": lambda: [(x[i], int(y[i])) for i in range(N)],
        }[form]()
        losses = [CE] if form == "list of examples" else [CE, lambda o, t: F.cross_entropy(o, t)]
        for loss in losses:
            right_or_refused(partial(HessianOperator, net, loss, data), truth)

    def test_one_example_at_a_time(self) -> None:
        """Convolutions take an unbatched image, too, and read its channels as examples."""
        net = seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(-3)
            )
        )
        x, y = draw(6, 3, 4, 4), labels(n=6)
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        right(HessianOperator(net, CE, (x, y)), truth)
        data = Examples(lambda i: (x[i], y[i]), 6)
        right_or_refused(lambda: HessianOperator(net, CE, data), truth)

    def test_numpy(self) -> None:
        net = mlp()
        x, y, truth = self.truth(net)
        right_or_refused(lambda: HessianOperator(net, CE, (x.numpy(), y.numpy())), truth)
        loader = DataLoader(Examples(lambda i: (x[i].numpy(), np.int64(y[i]))), batch_size=7)
        right(HessianOperator(net, CE, loader), truth)

    def test_other_entries_in_a_batch(self) -> None:
        """Names, indices and weights in the batch: arguments of the model, or refused."""
        net = mlp()
        x, y, truth = self.truth(net)
        for data in (
            [(x, y, torch.arange(N))],
            [{"input": x, "labels": y, "index": torch.arange(N)}],
            [{"input": x, "labels": y, "name": ["a"] * N}],
            (x, y, torch.ones(N)),
        ):
            right_or_refused(partial(HessianOperator, net, CE, data), truth)

    def test_two_entries_that_may_be_the_targets(self) -> None:
        net = mlp()
        x, y, truth = self.truth(net)
        data = {"input": x, "labels": y, "target": y.flip(0)}
        right_or_refused(lambda: HessianOperator(net, CE, data), truth)

    def test_no_data(self) -> None:
        net = mlp()
        x, y = draw(N, 4), labels()

        class Stream(IterableDataset):
            def __iter__(self) -> Iterator[Any]:
                yield from zip(x, y, strict=True)

        for data in (
            [], (), iter([(x, y)]), (x[:0], y[:0]), None, 3, "data.npz", (x, None), (x, y[:5]),
            [(x, y[:5])], {"input": x}, [{"input": x}],
        ):  # fmt: skip
            refused(partial(HessianOperator, net, CE, data))
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        right(HessianOperator(net, CE, DataLoader(Stream(), batch_size=7)), truth)

    def test_a_loader_that_shuffles_and_augments(self) -> None:
        net = mlp()
        x, y, truth = self.truth(net)
        loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
        right_or_refused(lambda: HessianOperator(net, CE, loader), truth)
        noisy = Examples(lambda i: (x[i] + torch.randn(4).double(), y[i]))
        # Each pass another function, if nothing is done about it.
        H: Any = partial(HessianOperator, net, CE, DataLoader(noisy, batch_size=5))
        try:
            first, second = H().to_dense(), H()
            assert relative_error(second.to_dense(), first) < 1e-9 or "random" in str(second.notes)
        except hvpspec.HvpspecError:
            pass


class TestAutoencoders:
    """Batches without targets."""

    def net(self) -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)))

    @pytest.mark.parametrize("loss", [nn.MSELoss(), lambda o, x: F.mse_loss(o, x)])
    def test_loaders_of_singles(self, loss: Any) -> None:
        net, x = self.net(), draw(N, 4)
        truth = hessian(net, lambda call: F.mse_loss(call(x), x))
        for data in (
            DataLoader(TensorDataset(x), batch_size=7), TensorDataset(x), [(x,)],
            [(part,) for part in x.split(7)], [[x]],
        ):  # fmt: skip
            H = HessianOperator(net, loss, data)
            right(H, truth)
            assert any("target" in note for note in H.notes), H.notes

    @pytest.mark.parametrize("form", ["tensor", "loader", "list", "tuple"])
    def test_inputs_alone(self, form: str) -> None:
        net, x = self.net(), draw(N, 4)
        truth = hessian(net, lambda call: F.mse_loss(call(x), x))
        data: Any = {
            "tensor": x,
            "loader": DataLoader(x, batch_size=7),
            "list": list(x.split(6)),  # which may be two inputs and targets, too
            "tuple": (x,),
        }[form]
        right_or_refused(lambda: HessianOperator(net, nn.MSELoss(), data), truth)

    def test_two_tensors_are_inputs_and_targets(self) -> None:
        net, x, z = self.net(), draw(N, 4), draw(N, 4, seed=3)
        truth = hessian(net, lambda call: F.mse_loss(call(x), z))
        for data in ((x, z), [x, z], TensorDataset(x, z)):
            right(HessianOperator(net, nn.MSELoss(), data), truth)


class TestOpaqueInputs:
    """Lists of images, and objects that only the network understands."""

    class Images(nn.Module):
        """Classify a list of images of any sizes."""

        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 3, 1)

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.stack([torch.tanh(self.c(i[None])).mean((0, 2, 3)) for i in images])

    @pytest.mark.parametrize("sizes", [(4, 5, 6, 4, 5), (4, 4, 4), (4,)])
    @pytest.mark.parametrize("form", ["bare", "inputs"])
    @pytest.mark.parametrize("loss", [CE, lambda o, t: F.cross_entropy(o, t)])
    def test_lists_of_images(self, sizes: tuple[int, ...], form: str, loss: Any) -> None:
        net = seeded(self.Images)
        images, y = [draw(3, n, n, seed=n + k) for k, n in enumerate(sizes)], labels(n=len(sizes))
        truth = hessian(net, lambda call: F.cross_entropy(call(images), y))
        inputs: Any = images if form == "bare" else (images,)
        right(HessianOperator(net, loss, [(inputs, y)]), truth)
        if len(sizes) > 1:
            parts = [(images[:2], y[:2]), (images[2:], y[2:])]
            if form == "inputs":
                parts = [((i,), t) for i, t in parts]
            right(HessianOperator(net, loss, parts), truth)
        right_or_refused(lambda: HessianOperator(net, loss, [(inputs, y)], chunk_size=1), truth)

    def test_as_many_images_as_channels(self) -> None:
        """Three images of three channels: no dimension that could be cut by mistake."""
        net = seeded(self.Images)
        images, y = [draw(3, 3, 3, seed=k) for k in range(3)], labels(n=3)
        truth = hessian(net, lambda call: F.cross_entropy(call(images), y))
        for chunk_size in (None, 1, 2):
            make = partial(HessianOperator, net, CE, [(images, y)], chunk_size=chunk_size)
            assert right_or_refused(make, truth) or chunk_size is not None

    def test_targets_in_a_list(self) -> None:
        """Detection: boxes of each image, of which there are more or fewer."""
        net = seeded(self.Images)
        images = [draw(3, n, n, seed=n) for n in (4, 5, 6)]
        targets = [{"boxes": draw(k, 3, seed=k)} for k in (2, 1, 3)]

        def loss(o: Tensor, t: list[dict[str, Tensor]]) -> Tensor:
            each = [(o[i] - t[i]["boxes"]).square().mean() for i in range(len(t))]
            return torch.stack(each).mean()

        truth = hessian(net, lambda call: loss(call(images), targets))
        right(HessianOperator(net, loss, [((images,), targets)]), truth)
        parts = [((images[:1],), targets[:1]), ((images[1:],), targets[1:])]
        right_or_refused(lambda: HessianOperator(net, loss, parts), truth)
        declared = Loss(loss, weight=lambda o, t: len(t))
        right(HessianOperator(net, declared, parts), truth)

    def test_texts(self) -> None:
        """Texts that the network turns into numbers."""

        class Texts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.e = nn.Embedding(26, 3)

            def forward(self, texts: list[str]) -> Tensor:
                codes = [torch.tensor([ord(c) - 97 for c in text]) for text in texts]
                return torch.stack([torch.tanh(self.e(code)).mean(0) for code in codes])

        net, texts, y = seeded(Texts), ["as", "they", "come", "in"], labels(n=4)
        truth = hessian(net, lambda call: F.cross_entropy(call(texts), y))
        right(HessianOperator(net, CE, [((texts,), y)]), truth)
        right(HessianOperator(net, CE, [((texts[:3],), y[:3]), ((texts[3:],), y[3:])]), truth)
        right_or_refused(lambda: HessianOperator(net, CE, [(texts, y)]), truth)


class Uncertainty(nn.Module):
    """Two losses, weighed by parameters that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        each = (o - t).square().mean(0)
        return (torch.exp(-self.log_variances) * each + self.log_variances).sum()


class Angular(nn.Module):
    """A head in the loss: cosines with centres that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 2))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(8 * F.normalize(z) @ F.normalize(self.centres).T, t)


class TestLossesWithParameters:
    """The parameters of a loss belong to the function."""

    def case(self, kind: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Tensor]:
        torch.manual_seed(2)
        loss: nn.Module = (Uncertainty() if kind == "uncertainty" else Angular()).double()
        net, x = seeded(lambda: nn.Linear(4, 2)), draw(N, 4)
        y = draw(N, 2, seed=3) if kind == "uncertainty" else labels()
        both = Whole(net, loss)
        return net, loss, x, y, hessian(both, lambda call: call((x,), y))

    @pytest.mark.parametrize("kind", ["uncertainty", "angular"])
    def test_they_count(self, kind: str) -> None:
        net, loss, x, y, truth = self.case(kind)
        found = AsFound(Whole(net, loss))
        H = HessianOperator(net, loss, (x, y))
        own = [f"loss.{name}" for name, _ in loss.named_parameters()]
        assert [*H.space.names] == [*dict(net.named_parameters()), *own]
        right(H, truth)
        right(HessianOperator(net, loss, (x, y), chunk_size=5), truth)
        right(HessianOperator(net, loss, [(x[:12], y[:12]), (x[12:], y[12:])]), truth)
        values = torch.linalg.eigvalsh(truth)
        assert hvpspec.index(H, 1e-6).index == int((values < -1e-6).sum())
        found.check()

    @pytest.mark.parametrize("kind", ["uncertainty", "angular"])
    def test_they_can_be_selected(self, kind: str) -> None:
        net, loss, x, y, truth = self.case(kind)
        n = sum(p.numel() for p in net.parameters())
        right(HessianOperator(net, loss, (x, y), params="loss.*"), truth[n:, n:])
        right(HessianOperator(net, loss, (x, y), params=list(net.parameters())), truth[:n, :n])
        right(HessianOperator(net, loss, (x, y), params=list(loss.parameters())), truth[n:, n:])
        first = net.get_parameter("weight").numel()
        right(HessianOperator(net, loss, (x, y), params="weight"), truth[:first, :first])
        loss.requires_grad_(False)
        right(HessianOperator(net, loss, (x, y)), truth[:n, :n])

    @pytest.mark.parametrize("how", ["Loss", "lambda", "method"])
    def test_wrapped_in_a_function(self, how: str) -> None:
        """There they cannot be seen from outside: counted, or said, or refused."""
        net, loss, x, y, truth = self.case("uncertainty")
        n = sum(p.numel() for p in net.parameters())
        given: Any = {
            "Loss": Loss(loss), "lambda": lambda o, t: loss(o, t), "method": loss.forward
        }[how]  # fmt: skip
        try:
            H = HessianOperator(net, given, (x, y))
            if H.shape[0] == n:
                right(H, truth[:n, :n])
                assert any("parameter" in note for note in H.notes), H.notes
            else:
                right(H, truth)
        except hvpspec.HvpspecError as error:
            check_message(error)

    def test_the_networks_own_head_in_the_loss(self) -> None:
        """A loss module that holds the network's weight: tied, and counted once."""

        class Tied(nn.Module):
            def __init__(self, weight: nn.Parameter) -> None:
                super().__init__()
                self.weight = weight

            def forward(self, o: Tensor, t: Tensor) -> Tensor:
                return F.mse_loss(o, t) + 0.1 * self.weight.square().sum() / 2

        net, x, y = seeded(lambda: nn.Linear(4, 2)), draw(N, 4), draw(N, 2, seed=3)
        loss = Tied(net.weight)
        truth = hessian(net, lambda call: F.mse_loss(call(x), y))
        truth[:8, :8] += 0.1 * torch.eye(8, dtype=truth.dtype)
        right_or_all_refused(partial(HessianOperator, net, loss, (x, y)), truth)


class SpectralConvolution(nn.Module):
    """Complex weights on the lowest frequencies, as in Fourier neural operators."""

    def __init__(self, dtype: torch.dtype = torch.complex128) -> None:
        super().__init__()
        self.w = nn.Parameter(0.5 * torch.randn(2, 2, 3, dtype=dtype))
        self.lift, self.down = nn.Linear(1, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, length)
        h = self.lift(x.mT).mT
        low = torch.einsum("bik,iok->bok", torch.fft.rfft(h)[..., :3], self.w)
        h = torch.tanh(torch.fft.irfft(low, n=h.shape[-1]))
        return self.down(h.mT).mT


class ComplexLayer(nn.Module):
    """A complex layer and a real one; the output is a modulus."""

    def __init__(self, dtype: torch.dtype = torch.complex128) -> None:
        super().__init__()
        self.c, self.o = nn.Linear(3, 2, dtype=dtype), nn.Linear(2, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.c(z)
        return self.o(torch.tanh(h.real * h.imag + h.abs()))


class TestComplexParameters:
    """They count as pairs of reals."""

    def case(self, kind: str) -> tuple[nn.Module, Tensor, Tensor]:
        if kind == "spectral":
            return seeded(SpectralConvolution), draw(N, 1, 8), draw(N, 1, 8, seed=1)
        net = seeded(ComplexLayer)
        return net, torch.complex(draw(N, 3), draw(N, 3, seed=2)), draw(N, 1, seed=1)

    @pytest.mark.parametrize("kind", ["spectral", "layer"])
    def test_the_matrix(self, kind: str) -> None:
        net, x, y = self.case(kind)
        truth = hessian(net, lambda call: F.mse_loss(call(x), y))
        found = AsFound(net)
        H = HessianOperator(net, nn.MSELoss(), (x, y))
        n = sum(p.numel() * (2 if p.is_complex() else 1) for p in net.parameters())
        assert H.shape == (n, n)
        assert H.dtype == torch.float64
        right(H, truth)
        right(HessianOperator(net, nn.MSELoss(), (x, y), chunk_size=5), truth)
        for tau in (1e-6, 1e-3):
            values = torch.linalg.eigvalsh(truth)
            for method in ("exact", "certified"):
                result = hvpspec.index(H, tau, method=method)
                expected = int((values < -tau).sum())
                assert result.lower <= expected <= result.upper
        right(
            HessianOperator(net, nn.MSELoss(), (x, y), l2=0.3),
            truth + 0.6 * torch.eye(n, dtype=truth.dtype),
        )
        found.check()

    def test_some_of_them(self) -> None:
        net, x, y = self.case("layer")
        truth = hessian(net, lambda call: F.mse_loss(call(x), y), ["c.weight"])
        right(HessianOperator(net, nn.MSELoss(), (x, y), params="c.weight"), truth)

    def test_the_gradient(self) -> None:
        net, x, y = self.case("layer")
        g = HessianOperator(net, nn.MSELoss(), (x, y)).gradient()
        net.zero_grad()
        F.mse_loss(net(x), y).backward()
        grads = [p.grad for p in net.parameters()]
        parts = [
            (torch.view_as_real(p) if p.is_complex() else p).reshape(-1)
            for p in grads
            if p is not None
        ]
        assert relative_error(g, torch.cat(parts)) < 1e-9

    def test_in_single_precision(self) -> None:
        net, x, y = self.case("layer")
        truth = hessian(net, lambda call: F.mse_loss(call(x), y))
        narrow = seeded(partial(ComplexLayer, torch.complex64)).float()
        with torch.no_grad():
            for p, q in zip(narrow.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        H = HessianOperator(narrow, nn.MSELoss(), (x.to(torch.complex64), y.float()))
        assert H.dtype == torch.float32
        # The weights are rounded to 6e-8 of their size.
        right(H, truth, 1e-5)
        tau = 1e-3 * float(truth.abs().max())
        expected = int((torch.linalg.eigvalsh(truth) < -tau).sum())
        assert hvpspec.index(H, tau).index == expected

    def test_gauss_newton(self) -> None:
        """For a squared loss, two thirds of a linear network's Hessian are its own."""
        net, x, y = self.case("layer")
        G = GGNOperator(net, nn.MSELoss(), (x, y)).to_dense()
        values = torch.linalg.eigvalsh(G)
        assert float(values[0]) > -1e-10 * float(values[-1])
        truth = hessian(net, lambda call: F.mse_loss(call(x), y), ["o.weight", "o.bias"])
        k = len(truth)
        assert relative_error(G[-k:, -k:], truth) < 1e-9


def test_physics_informed_residuals() -> None:
    """Derivatives by the inputs inside the network stay right."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                u = self.u(x)
                (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
                (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
            return ddu + math.pi**2 * u

    net, x = seeded(Residual), draw(N, 1)
    t = torch.sin(math.pi * x)
    truth = hessian(net, lambda call: F.mse_loss(call(x), t))
    right(HessianOperator(net, nn.MSELoss(), (x, t)), truth)
    right(HessianOperator(net, nn.MSELoss(), (x, t), chunk_size=5), truth)
