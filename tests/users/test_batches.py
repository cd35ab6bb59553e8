"""Losses over batches: what is no mean over examples, what a batch weighs, what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import hvpspec
from hvpspec import HessianOperator, Loss
from tests.users.truth import hessian, refused, right, right_or_refused

#: A batch of this many examples of K features in WIDTH copies has 2.4 million input entries, so
#: that the chunk size which is chosen by default cuts it into three.
N, K, WIDTH = 36, 4, 2**14

KINDS = ("tuple", "list", "dict", "namedtuple", "dataclass", "object", "stacked")


class Pair(NamedTuple):
    """Two outputs."""

    first: Tensor
    second: Tensor


@dataclass
class Outputs:
    """Two outputs."""

    first: Tensor
    second: Tensor


def packed(kind: str, first: Tensor, second: Tensor) -> Any:
    """Two outputs in a container of some kind."""
    return {
        "tuple": lambda: (first, second),
        "list": lambda: [first, second],
        "dict": lambda: {"first": first, "second": second},
        "namedtuple": lambda: Pair(first, second),
        "dataclass": lambda: Outputs(first, second),
        "object": lambda: SimpleNamespace(first=first, second=second),
        "stacked": lambda: torch.stack([first, second], 1),
    }[kind]()


def unpacked(outputs: Any) -> tuple[Tensor, Tensor]:
    """The two outputs in it."""
    if isinstance(outputs, Tensor):
        return outputs[:, 0], outputs[:, 1]
    if isinstance(outputs, dict):
        return outputs["first"], outputs["second"]
    if isinstance(outputs, tuple | list):
        return outputs[0], outputs[1]
    return outputs.first, outputs.second


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Features in many copies with a little noise: few parameters, many input entries."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*shape, 1, generator=generator, dtype=torch.float64)
    return features + 0.1 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)


class Towers(nn.Module):
    """Two embeddings of wide inputs."""

    def __init__(self, kind: str = "tuple", *, zero: bool = False, width: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, width), nn.Linear(K, width)
        self.kind = kind
        if zero:
            for p in self.parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Any:
        x = x.mean(-1)
        return packed(self.kind, torch.tanh(self.first(x)), self.second(x))


def towers(kind: str = "tuple", *, zero: bool = False) -> Towers:
    torch.manual_seed(1)
    return Towers(kind, zero=zero).double().eval()


def info_nce(outputs: Any, _: Any) -> Tensor:
    """Contrast each first embedding with all second ones."""
    a, b = (F.normalize(z + 0.1, dim=1) for z in unpacked(outputs))
    logits, same = a @ b.T / 0.3, torch.arange(len(a))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def barlow_twins(outputs: Any, _: Any) -> Tensor:
    """Decorrelate the two embeddings over the batch."""
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-3).sqrt() for z in unpacked(outputs))
    return (a.T @ b / len(a) - torch.eye(a.shape[1], dtype=a.dtype)).square().sum()


def vicreg(outputs: Any, _: Any) -> Tensor:
    """Invariance, which is a mean over examples, with the variance over the batch."""
    a, b = unpacked(outputs)
    return F.mse_loss(a, b) + sum(F.softplus(1 - z.var(0, unbiased=False)).mean() for z in (a, b))


def mean_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy less the entropy of the mean prediction."""
    p = unpacked(outputs)[1].softmax(1).mean(0)
    return F.cross_entropy(unpacked(outputs)[1], targets) + (p * p.log()).sum()


def load_balance(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy with the square of the mean output."""
    a, b = unpacked(outputs)
    return F.cross_entropy(b, targets) + a.mean(0).square().sum()


def soft_dice(outputs: Any, targets: Tensor) -> Tensor:
    """Overlap over the whole batch."""
    p = unpacked(outputs)[1].sigmoid()
    t = F.one_hot(targets, 3).to(p)
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def correlation(outputs: Any, targets: Tensor) -> Tensor:
    """One minus Pearson's correlation over the batch."""
    o = unpacked(outputs)[1][:, 0]
    t = targets.to(o)
    o, t = o - o.mean(), t - t.mean()
    return 1 - (o * t).sum() / (o.norm() * t.norm() + 1e-3)


def ranking(outputs: Any, targets: Tensor) -> Tensor:
    """A partial likelihood: each example against those at risk."""
    risk = unpacked(outputs)[1][:, 0]
    at_risk = (targets[None, :] >= targets[:, None]).to(risk)
    return ((at_risk * risk.exp()[None]).sum(1).log() - risk).mean()


def maximum(outputs: Any, _: Any) -> Tensor:
    """The smooth maximum over the batch, as of the worst group."""
    return unpacked(outputs)[1].square().sum(1).logsumexp(0)


def root_mean_square(outputs: Any, targets: Tensor) -> Tensor:
    """The root of a mean."""
    return (unpacked(outputs)[1][:, 0] - targets.to(torch.float64)).square().mean().sqrt()


COUPLED = [
    info_nce, barlow_twins, vicreg, mean_entropy, load_balance, soft_dice, correlation, ranking,
    maximum, root_mean_square,
]  # fmt: skip


def labels() -> Tensor:
    return torch.randint(3, (N,), generator=torch.Generator().manual_seed(5))


def cut(*tensors: Tensor, sizes: tuple[int, ...] = (20, 13, 3)) -> list[tuple[Tensor, ...]]:
    """Ragged batches."""
    return list(zip(*(t.split(sizes) for t in tensors), strict=True))


class TestCoupled:
    """A loss that is no mean over the examples."""

    @pytest.mark.parametrize("loss", COUPLED, ids=lambda f: f.__name__)
    def test_one_batch_is_used_whole(self, loss: Callable[..., Tensor]) -> None:
        net, x, y = towers(), wide(N, K), labels()
        truth = hessian(net, lambda call: loss(call(x), y))
        right(HessianOperator(net, loss, (x, y)), truth)

    @pytest.mark.parametrize("kind", KINDS)
    def test_whatever_the_outputs_come_in(self, kind: str) -> None:
        net, x, y = towers(kind), wide(N, K), labels()
        truth = hessian(net, lambda call: info_nce(call(x), y))
        right(HessianOperator(net, info_nce, (x, y)), truth)
        refused(lambda: HessianOperator(net, info_nce, (x, y), chunk_size=12))

    @pytest.mark.parametrize("loss", COUPLED, ids=lambda f: f.__name__)
    def test_parts_are_refused_with_the_remedy(self, loss: Callable[..., Tensor]) -> None:
        net, x, y = towers(), wide(N, K)[..., :3], labels()
        assert "whole=True" in refused(lambda: HessianOperator(net, loss, (x, y), chunk_size=12))
        assert "whole=True" in refused(lambda: HessianOperator(net, loss, cut(x, y)))

    @pytest.mark.parametrize("loss", COUPLED, ids=lambda f: f.__name__)
    def test_said_to_be_whole(self, loss: Callable[..., Tensor]) -> None:
        net, x, y = towers(), wide(N, K), labels()
        truth = hessian(net, lambda call: loss(call(x), y))
        said = Loss(loss, whole=True)
        right(HessianOperator(net, said, (x, y)), truth)
        assert HessianOperator(net, said, (x, y)).loss() == pytest.approx(
            float(loss(net(x), y).detach()), rel=1e-12
        )
        x = x[..., :3]
        truth = hessian(net, lambda call: loss(call(x), y))
        right(HessianOperator(net, said, [(x, y)]), truth)
        right_or_refused(lambda: HessianOperator(net, said, (x, y), chunk_size=5), truth)
        refused(lambda: HessianOperator(net, said, cut(x, y)))

    @pytest.mark.parametrize("loss", COUPLED, ids=lambda f: f.__name__)
    @pytest.mark.parametrize("chunk_size", [None, 12])
    def test_said_to_be_a_mean(self, loss: Callable[..., Tensor], chunk_size: int | None) -> None:
        net, x, y = towers(), wide(N, K), labels()
        truth = hessian(net, lambda call: loss(call(x), y))
        right_or_refused(
            lambda: HessianOperator(net, Loss(loss), (x, y), chunk_size=chunk_size), truth
        )

    @pytest.mark.parametrize("loss", [load_balance, mean_entropy, vicreg], ids=lambda f: f.__name__)
    def test_where_values_and_gradients_hide_it(self, loss: Callable[..., Tensor]) -> None:
        """A head that starts at zero: only second derivatives differ between whole and parts."""
        net, x, y = towers(zero=True), wide(N, K), labels()
        truth = hessian(net, lambda call: loss(call(x), y))
        right_or_refused(lambda: HessianOperator(net, loss, (x, y)), truth)
        x = x[..., :3]
        truth = hessian(net, lambda call: loss(call(x), y))
        right_or_refused(lambda: HessianOperator(net, loss, (x, y), chunk_size=12), truth)
        right_or_refused(lambda: HessianOperator(net, loss, cut(x, y)), truth)

    @pytest.mark.parametrize("where", [slice(0, 6), slice(15, 21), slice(30, 36)])
    def test_only_some_examples_are_coupled(self, where: slice) -> None:
        """Pairs of the same class attract each other; only few examples have a partner."""
        net, x = towers(), wide(N, K)[..., :3]
        y = torch.arange(N)
        y[where] = 99

        def pairs(outputs: Any, targets: Tensor) -> Tensor:
            z = unpacked(outputs)[1]
            same = (targets[:, None] == targets[None]).to(z)
            return z.square().mean() + (same * torch.cdist(z, z + 0.1).square()).sum() / len(z)

        truth = hessian(net, lambda call: pairs(call(x), y))
        right(HessianOperator(net, pairs, (x, y)), truth)
        right_or_refused(lambda: HessianOperator(net, pairs, (x, y), chunk_size=12), truth)
        right_or_refused(lambda: HessianOperator(net, pairs, cut(x, y)), truth)

    def test_a_scalar_from_the_network(self) -> None:
        """The network returns its loss, which couples the examples."""

        class Scalar(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = towers()

            def forward(self, x: Tensor) -> Tensor:
                return info_nce(self.net(x), None)

        net, x, y = Scalar().eval(), wide(N, K), labels()
        truth = hessian(net, lambda call: call(x))
        take: Callable[..., Tensor] = lambda out, _: out  # noqa: E731
        right_or_refused(lambda: HessianOperator(net, take, (x, y)), truth)
        right(HessianOperator(net, Loss(take, whole=True), (x, y)), truth)
        x = x[..., :3]
        truth = hessian(net, lambda call: call(x))
        right_or_refused(lambda: HessianOperator(net, take, (x, y), chunk_size=12), truth)
        right_or_refused(lambda: HessianOperator(net, take, cut(x, y)), truth)


class Autoencoder(nn.Module):
    """A variational autoencoder of the pooled inputs, with its noise as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.log_variance = (
            nn.Linear(K, 3),
            nn.Linear(3, 2),
            nn.Linear(3, 2),
        )
        self.decode = nn.Linear(2, K)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.encode(x.mean(-1)))
        mean, log_variance = self.mean(h), self.log_variance(h)
        return self.decode(mean + noise * (log_variance / 2).exp()), mean, log_variance


def elbo(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Summed over the batch, as in PyTorch's own example."""
    reconstruction, mean, log_variance = outputs
    error = F.binary_cross_entropy_with_logits(
        reconstruction, x.mean(-1).sigmoid(), reduction="sum"
    )
    return error - (1 + log_variance - mean.square() - log_variance.exp()).sum() / 2


class TestSums:
    """A loss summed over the examples, which nobody said."""

    @pytest.fixture
    def net(self) -> Autoencoder:
        torch.manual_seed(2)
        return Autoencoder().double().eval()

    def noise(self) -> Tensor:
        return torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def test_default_chunks(self, net: Autoencoder) -> None:
        x, noise = wide(N, K), self.noise()
        H = HessianOperator(net, elbo, (x, noise, x))
        right(H, hessian(net, lambda call: elbo(call(x, noise), x)))
        assert H.loss() == pytest.approx(float(elbo(net(x, noise), x).detach()), rel=1e-12)
        assert any("sum" in note for note in H.notes)

    @pytest.mark.parametrize("chunk_size", [1, 7, 35, 36, 100])
    def test_any_chunks(self, net: Autoencoder, chunk_size: int) -> None:
        x, noise = wide(N, K)[..., :3], self.noise()
        truth = hessian(net, lambda call: elbo(call(x, noise), x))
        right(HessianOperator(net, elbo, (x, noise, x), chunk_size=chunk_size), truth)

    def test_loaders(self, net: Autoencoder) -> None:
        x, noise = wide(N, K)[..., :3], self.noise()
        truth = hessian(net, lambda call: elbo(call(x, noise), x))
        for batch_size in (5, 16, 36):
            loader = DataLoader(TensorDataset(x, noise, x), batch_size=batch_size)
            right(HessianOperator(net, elbo, loader), truth)
        right(HessianOperator(net, Loss(elbo, "sum"), cut(x, noise, x)), truth)

    def test_batches_of_one_do_not_tell_a_sum_from_a_mean(self, net: Autoencoder) -> None:
        x, noise = wide(N, K)[:6, :, :3], self.noise()[:6]
        truth = hessian(net, lambda call: elbo(call(x, noise), x))
        batches = cut(x, noise, x, sizes=(1,) * 6)
        right_or_refused(lambda: HessianOperator(net, elbo, batches), truth)
        right(HessianOperator(net, Loss(elbo, "sum"), batches), truth)

    def test_said_to_be_a_mean(self, net: Autoencoder) -> None:
        x, noise = wide(N, K)[..., :3], self.noise()
        truth = hessian(net, lambda call: elbo(call(x, noise), x))
        for data in ((x, noise, x), cut(x, noise, x)):
            right_or_refused(partial(HessianOperator, net, Loss(elbo), data), truth)
        right_or_refused(
            lambda: HessianOperator(net, Loss(elbo), (x, noise, x), chunk_size=7), truth
        )

    def test_a_mean_plus_a_penalty_that_is_not_averaged(self, net: Autoencoder) -> None:
        """Reconstruction is a mean, the divergence a sum: neither of the two."""

        def mixed(outputs: Any, x: Tensor) -> Tensor:
            return F.mse_loss(outputs[0], x.mean(-1)) + outputs[1].square().sum()

        x, noise = wide(N, K)[..., :3], self.noise()
        truth = hessian(net, lambda call: mixed(call(x, noise), x))
        right(HessianOperator(net, mixed, (x, noise, x)), truth)
        right_or_refused(lambda: HessianOperator(net, mixed, (x, noise, x), chunk_size=7), truth)
        right_or_refused(lambda: HessianOperator(net, mixed, cut(x, noise, x)), truth)


class Heads(nn.Module):
    """A body with heads of several widths."""

    def __init__(self, kind: str, widths: tuple[int, ...] = (3, 1)) -> None:
        super().__init__()
        self.body, self.kind = nn.Linear(4, 4), kind
        self.heads = nn.ModuleList(nn.Linear(4, width) for width in widths)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        outputs = [head(h) for head in self.heads]
        if self.kind in ("tuple", "list"):
            return tuple(outputs) if self.kind == "tuple" else outputs
        if self.kind == "dict":
            return {f"head{k}": o for k, o in enumerate(outputs)}
        if self.kind == "with a scalar":
            return (*outputs, h.square().mean())
        if self.kind == "across":  # attention weights, say, with another first dimension
            return (torch.stack([h, h]), *outputs)
        return SimpleNamespace(**{f"head{k}": o for k, o in enumerate(outputs)})


class TestWeights:
    """What a batch counts in the mean."""

    M = 33

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        x, y = torch.randn(self.M, 4).double(), torch.randint(3, (self.M,))
        r = torch.randn(self.M, 1).double()
        r[32] += 20  # what a batch of one weighs shows
        return x, y, r

    def net(self, kind: str, widths: tuple[int, ...] = (3, 1)) -> Heads:
        torch.manual_seed(4)
        return Heads(kind, widths).double().eval()

    @pytest.mark.parametrize("kind", ["tuple", "list", "dict", "object"])
    @pytest.mark.parametrize("targets", ["tuple", "dict"])
    def test_two_heads_and_two_targets(self, kind: str, targets: str) -> None:
        net = self.net(kind)
        x, y, r = self.data()

        def loss(o: Any, t: Any) -> Tensor:
            if isinstance(o, dict | tuple | list):
                o = list(o.values()) if isinstance(o, dict) else o
            else:
                o = (o.head0, o.head1)
            t = (t["class"], t["value"]) if isinstance(t, dict) else t
            return F.cross_entropy(o[0], t[0]) + F.mse_loss(o[1], t[1])

        def of(y: Tensor, r: Tensor) -> Any:
            return {"class": y, "value": r} if targets == "dict" else (y, r)

        truth = hessian(net, lambda call: loss(call(x), of(y, r)))
        batches = [(x[:32], of(y[:32], r[:32])), (x[32:], of(y[32:], r[32:]))]
        examples = [(x[i], of(y[i], r[i])) for i in range(self.M)]
        right(HessianOperator(net, loss, (x, of(y, r))), truth)
        for data, chunk_size in (
            (batches, None),
            (DataLoader(examples, batch_size=32), None),
            ([(x, of(y, r))], 32),
            ((x, of(y, r)), 8),
        ):
            make = partial(HessianOperator, net, loss, data, chunk_size=chunk_size)
            # An object of any class cannot be taken apart.
            assert right_or_refused(make, truth) or kind == "object"
        declared = Loss(loss, weight=lambda o, t: len(t["class"] if targets == "dict" else t[0]))
        right(HessianOperator(net, declared, batches), truth)

    @pytest.mark.parametrize("kind", ["with a scalar", "across"])
    def test_outputs_that_do_not_all_run_over_the_examples(self, kind: str) -> None:
        net = self.net(kind)
        x, y, r = self.data()

        def loss(o: Any, t: Any) -> Tensor:
            heads = o[:2] if kind == "with a scalar" else o[1:]
            return F.cross_entropy(heads[0], t[0]) + F.mse_loss(heads[1], t[1])

        truth = hessian(net, lambda call: loss(call(x), (y, r)))
        batches = [(x[:32], (y[:32], r[:32])), (x[32:], (y[32:], r[32:]))]
        right(HessianOperator(net, loss, [(x, (y, r))]), truth)
        right_or_refused(lambda: HessianOperator(net, loss, batches), truth)
        right_or_refused(lambda: HessianOperator(net, loss, [(x, (y, r))], chunk_size=8), truth)
        right(HessianOperator(net, Loss(loss, weight=lambda o, t: len(t[0])), batches), truth)

    def test_one_target_for_many_heads(self) -> None:
        """Deep supervision: every head is compared with the same labels."""
        net = self.net("tuple", (3, 3, 3))
        x, y, _ = self.data()
        loss: Callable[..., Tensor] = lambda o, t: sum(F.cross_entropy(h, t) for h in o)  # noqa: E731
        truth = hessian(net, lambda call: loss(call(x), y))
        right(HessianOperator(net, loss, cut(x, y, sizes=(16, 16, 1))), truth)
        right(HessianOperator(net, loss, (x, y), chunk_size=5), truth)

    def test_no_target_that_runs_over_the_examples(self) -> None:
        """The targets are one number for all: the number of examples is that of the inputs."""
        net = self.net("tuple")
        x, _, _ = self.data()
        loss: Callable[..., Tensor] = lambda o, t: (o[1] - t).square().mean()  # noqa: E731
        t = torch.tensor(3.0, dtype=torch.float64)
        truth = hessian(net, lambda call: loss(call(x), t))
        batches = [(x[:32], t), (x[32:], t)]
        assert right_or_refused(lambda: HessianOperator(net, loss, batches), truth)

    @pytest.mark.parametrize("masked", ["ignore_index", "mask"])
    def test_targets_that_do_not_count(self, masked: str) -> None:
        """A mean over valid targets is none over examples; its weight can be declared."""
        net = self.net("tuple", (3,))
        x, y, _ = self.data()
        keep = torch.rand(self.M, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[30:] = torch.tensor([True, False, False])  # the last batch counts less

        def loss(o: Any, t: Any) -> Tensor:
            if masked == "mask":
                return F.cross_entropy(o[0][t[1]], t[0][t[1]])
            return F.cross_entropy(o[0], t, ignore_index=-1)

        def weight(o: Any, t: Any) -> Tensor:
            return t[1].sum() if masked == "mask" else (t != -1).sum()

        def of(rows: slice) -> Any:
            kept = keep[rows]
            return (y[rows], kept) if masked == "mask" else y[rows].masked_fill(~kept, -1)

        everything = slice(0, self.M)
        truth = hessian(net, lambda call: loss(call(x), of(everything)))
        parts = [slice(0, 16), slice(16, 30), slice(30, 33)]
        batches = [(x[part], of(part)) for part in parts]
        right(HessianOperator(net, loss, [(x, of(everything))]), truth)
        right_or_refused(lambda: HessianOperator(net, loss, batches), truth)
        right_or_refused(
            lambda: HessianOperator(net, loss, [(x, of(everything))], chunk_size=7), truth
        )
        right(HessianOperator(net, Loss(loss, weight=weight), batches), truth)
        # Parts in which nothing counts weigh nothing.
        right(HessianOperator(net, Loss(loss, weight=weight), batches, chunk_size=2), truth)

    def test_a_weight_that_is_wrong(self) -> None:
        net = self.net("tuple")
        x, y, r = self.data()
        loss: Callable[..., Tensor] = lambda o, t: F.cross_entropy(o[0], t[0])  # noqa: E731
        truth = hessian(net, lambda call: loss(call(x), (y, r)))
        batches = [(x[:32], (y[:32], r[:32])), (x[32:], (y[32:], r[32:]))]
        heads = Loss(loss, weight=lambda o, t: len(o))
        right_or_refused(lambda: HessianOperator(net, heads, batches), truth)
        right_or_refused(lambda: HessianOperator(net, heads, [(x, (y, r))], chunk_size=32), truth)


VOCABULARY = 5


class Language(nn.Module):
    """A recurrent language model of tokens in some layout."""

    def __init__(self, *, batch_first: bool, flat: bool = False, both_ways: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 2)
        self.rnn = nn.RNN(2, 2, batch_first=batch_first, bidirectional=both_ways)
        self.head, self.flat = nn.Linear(4 if both_ways else 2, VOCABULARY), flat

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.rnn(self.embed(tokens))[0])
        return logits.reshape(-1, VOCABULARY) if self.flat else logits


def language(**options: bool) -> Language:
    torch.manual_seed(6)
    net = Language(**options).double().eval()
    with torch.no_grad():  # so that it remembers
        for p in net.parameters():
            p.mul_(2)
    return net


def flattened(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens."""
    return F.cross_entropy(outputs.reshape(-1, VOCABULARY), targets.reshape(-1))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


class TestTimeFirst:
    """Examples along the second dimension, which is the default of recurrent layers."""

    @pytest.mark.parametrize("both_ways", [False, True])
    @pytest.mark.parametrize("columns", [10, 700])
    def test_one_batch(self, both_ways: bool, columns: int) -> None:
        """Where the default chunking sets in, too: an index counts as 256 entries."""
        net = language(batch_first=False, both_ways=both_ways)
        x = tokens(6, columns)
        y = x[:1].expand(6, columns).contiguous()  # each column's first token
        truth = hessian(net, lambda call: flattened(call(x), y))
        right_or_refused(lambda: HessianOperator(net, flattened, (x, y)), truth)
        right(HessianOperator(net, flattened, (x, y), chunk_size=6), truth)
        right_or_refused(lambda: HessianOperator(net, flattened, (x, y), chunk_size=2), truth)
        right_or_refused(lambda: HessianOperator(net, flattened, (x, y), chunk_size=5), truth)

    @pytest.mark.parametrize("square", [False, True])
    def test_batches_with_fewer_columns(self, square: bool) -> None:
        """Each batch has the same first dimension, and does not weigh the same."""
        net = language(batch_first=False)
        x = tokens(7, 11)
        y = x[:1].expand(7, 11).contiguous()
        truth = hessian(net, lambda call: flattened(call(x), y))
        sizes = (7, 4) if square else (8, 3)
        batches = list(zip(x.split(sizes, 1), y.split(sizes, 1), strict=True))
        right_or_refused(lambda: HessianOperator(net, flattened, batches), truth)
        declared = Loss(flattened, weight=lambda o, t: t.numel())
        right(HessianOperator(net, declared, batches), truth)
        right_or_refused(lambda: HessianOperator(net, declared, batches, chunk_size=3), truth)

    def test_a_loss_of_torch(self) -> None:
        net = nn.Sequential(language(batch_first=False), Permuted())
        x = tokens(7, 11)
        y = x[:1].expand(7, 11).contiguous()
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        right(HessianOperator(net, nn.CrossEntropyLoss(), [(x, y)], chunk_size=7), truth)
        right_or_refused(lambda: HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)
        batches = list(zip(x.split((8, 3), 1), y.split((8, 3), 1), strict=True))
        right(HessianOperator(net, nn.CrossEntropyLoss(), batches), truth)
        right_or_refused(
            lambda: HessianOperator(net, nn.CrossEntropyLoss(), batches, chunk_size=3), truth
        )

    def test_attention_over_the_first_dimension(self) -> None:
        """Each of four thousand positions sees the others; the network is no recurrent one."""
        torch.manual_seed(7)
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0).double().eval()
        x, y = torch.randn(9, 6, 4).double(), torch.randn(9, 6, 4).double()
        truth = hessian(layer, lambda call: F.mse_loss(call(x), y))
        right(HessianOperator(layer, nn.MSELoss(), [(x, y)], chunk_size=9), truth)
        right_or_refused(lambda: HessianOperator(layer, nn.MSELoss(), (x, y)), truth)
        right_or_refused(lambda: HessianOperator(layer, nn.MSELoss(), (x, y), chunk_size=4), truth)

    def test_memory_that_shows_in_few_columns(self) -> None:
        """The parts must not be looked at in the last row or column alone."""

        class Gate(nn.Module):
            """Only where a sequence starts with a high number does it remember."""

            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> Tensor:
                start = F.relu(x[:1, :, :1] - 3)
                return self.b(torch.tanh(self.a(x))) * (1 + start)

        torch.manual_seed(8)
        net = Gate().double().eval()
        x, y = torch.randn(12, 5, 2).double().clamp(-2, 2), torch.randn(12, 5, 2).double()
        x[0, 2, 0] = 5.0
        loss: Callable[..., Tensor] = lambda o, t: (o - t).square().mean()  # noqa: E731
        truth = hessian(net, lambda call: loss(call(x), y))
        for chunk_size in (3, 4, 6, 11):
            make = partial(HessianOperator, net, loss, (x, y), chunk_size=chunk_size)
            right_or_refused(make, truth)

    def test_features_first(self) -> None:
        """Columns are the examples: (features, examples)."""

        class Columns(nn.Module):
            def __init__(self, features: int) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(3, features))

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(self.w @ x)

        loss: Callable[..., Tensor] = lambda o, t: F.cross_entropy(o.T, t)  # noqa: E731
        for features in (4, 9):  # as many features as examples, too
            torch.manual_seed(8)
            net = Columns(features).double()
            x, y = torch.randn(features, 9).double(), torch.randint(3, (9,))
            truth = hessian(net, lambda call, x=x, y=y: loss(call(x), y))
            right_or_refused(partial(HessianOperator, net, loss, (x, y)), truth)
            right(HessianOperator(net, loss, [(x, y)], chunk_size=9), truth)
            right_or_refused(partial(HessianOperator, net, loss, [(x, y)], chunk_size=3), truth)


class Permuted(nn.Module):
    """Classes in the second dimension, as cross-entropy wants them."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.movedim(-1, 1)


class TestFlattenedTokens:
    """Language models whose outputs (b T, V) and targets (b T,) are flattened."""

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy, flattened])
    @pytest.mark.parametrize("where", ["data", "loss"])
    def test_several_batches(self, loss: Any, where: str) -> None:
        net = language(batch_first=True, flat=True)
        x, y = tokens(10, 6), tokens(10, 6, seed=1)
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y.reshape(-1)))
        batches = []
        for a, b in zip(x.split((4, 4, 2)), y.split((4, 4, 2)), strict=True):
            batches.append((a, b.reshape(-1) if where == "data" else b))
        if where == "loss" and loss is not flattened:
            given: Any = loss
            loss = lambda o, t: given(o, t.reshape(-1))  # noqa: E731
        right(HessianOperator(net, loss, batches), truth)

    def test_one_batch(self) -> None:
        net = language(batch_first=True, flat=True)
        x, y = tokens(10, 6), tokens(10, 6, seed=1).reshape(-1)
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y))
        for loss in (nn.CrossEntropyLoss(), flattened):
            right(HessianOperator(net, loss, [(x, y)]), truth)
            right_or_refused(partial(HessianOperator, net, loss, (x, y)), truth)
            right_or_refused(partial(HessianOperator, net, loss, [(x, y)], chunk_size=3), truth)

    def test_padded_tokens(self) -> None:
        """Batches of other lengths, in which padding does not count."""
        net = language(batch_first=True, flat=True)
        x, y = tokens(9, 6), tokens(9, 6, seed=1)
        lengths = torch.tensor([6, 5, 4, 3, 3, 2, 2, 1, 1])
        y = y.masked_fill(torch.arange(6)[None] >= lengths[:, None], -100)
        truth = hessian(net, lambda call: F.cross_entropy(call(x), y.reshape(-1)))
        batches = []
        for rows in (slice(0, 3), slice(3, 5), slice(5, 9)):
            longest = int(lengths[rows].max())
            batches.append((x[rows, :longest], y[rows, :longest].reshape(-1)))
        right(HessianOperator(net, nn.CrossEntropyLoss(), batches), truth)
        right_or_refused(lambda: HessianOperator(net, flattened, batches), truth)
        declared = Loss(flattened, weight=lambda o, t: (t != -100).sum())
        right(HessianOperator(net, declared, batches), truth)

    def test_unflattened_logits(self) -> None:
        """(b, T, V) against (b, T), as people write it: refused with the recipe, or right."""
        net = language(batch_first=True)
        x, y = tokens(10, 6), tokens(10, 6, seed=1)
        truth = hessian(net, lambda call: flattened(call(x), y))
        right_or_refused(lambda: HessianOperator(net, nn.CrossEntropyLoss(), (x, y)), truth)

    @pytest.mark.parametrize("ignore", [False, True])
    def test_next_token_loss(self, ignore: bool) -> None:
        net = language(batch_first=True)
        x = tokens(10, 6)
        y = x.clone()
        if ignore:
            y[torch.arange(6)[None] > torch.arange(1, 11)[:, None]] = -100
        truth = hessian(net, lambda call: flattened(call(x)[:, :-1], y[:, 1:]))
        loss = hvpspec.next_token_loss
        right(HessianOperator(net, loss, (x, y)), truth)
        right(HessianOperator(net, loss, cut(x, y, sizes=(5, 4, 1))), truth)
        right(HessianOperator(net, loss, (x, y), chunk_size=3), truth)


@dataclass
class Graphs:
    """Some graphs as one: nodes, edges, and to which graph each node belongs."""

    x: Tensor
    edges: Tensor
    graph: Tensor


def graphs(sizes: tuple[int, ...], seed: int = 0) -> Graphs:
    generator = torch.Generator().manual_seed(seed)
    edges, start = [], 0
    for n in sizes:
        edges.append(start + torch.randint(n, (2, 2 * n), generator=generator))
        start += n
    x = torch.randn(start, 3, generator=generator, dtype=torch.float64)
    return Graphs(x, torch.cat(edges, 1), torch.repeat_interleave(torch.tensor(sizes)))


def together(batches: list[Graphs]) -> Graphs:
    """Several batches of graphs as one."""
    nodes = num = 0
    edges, of = [], []
    for batch in batches:
        edges.append(batch.edges + nodes)
        of.append(batch.graph + num)
        nodes, num = nodes + len(batch.x), num + int(batch.graph.max()) + 1
    return Graphs(torch.cat([b.x for b in batches]), torch.cat(edges, 1), torch.cat(of))


class GraphNetwork(nn.Module):
    """Messages along edges, then the mean over each graph's nodes."""

    def __init__(self, *, opaque: bool) -> None:
        super().__init__()
        self.a, self.b, self.opaque = nn.Linear(3, 3), nn.Linear(3, 3), opaque

    def forward(self, x: Any, edges: Any = None, graph: Any = None) -> Tensor:
        if self.opaque:
            x, edges, graph = x.x, x.edges, x.graph
        h = self.a(x)
        h = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        num = int(graph.max()) + 1
        size = torch.zeros(num, dtype=h.dtype).index_add(0, graph, h.new_ones(len(graph)))
        return self.b(h.new_zeros(num, 3).index_add(0, graph, h) / size[:, None])


class TestGraphs:
    """Batches of graphs, which cannot be cut and need not be."""

    @pytest.mark.parametrize("opaque", [False, True])
    @pytest.mark.parametrize(
        "loss", [nn.CrossEntropyLoss(), Loss(F.cross_entropy), lambda o, t: F.cross_entropy(o, t)]
    )
    def test_batches(self, opaque: bool, loss: Any) -> None:
        torch.manual_seed(1)
        net = GraphNetwork(opaque=opaque).double().eval()
        some = [graphs((5, 7)), graphs((4, 9, 6), 1), graphs((8,), 2)]
        y = torch.tensor([0, 2, 1, 1, 0, 2])
        one = together(some)

        def inputs(g: Graphs) -> Any:
            return g if opaque else (g.x, g.edges, g.graph)

        args = inputs(one)
        truth = hessian(net, lambda call: F.cross_entropy(call(args) if opaque else call(*args), y))
        labels = y.split((2, 3, 1))
        batches = [(inputs(g), t) for g, t in zip(some, labels, strict=True)]
        right(HessianOperator(net, loss, batches), truth)
        right(HessianOperator(net, loss, [(args, y)]), truth)
        # Asking for parts asks for what cannot be.
        right_or_refused(lambda: HessianOperator(net, loss, batches, chunk_size=1), truth)
        right(HessianOperator(net, loss, batches, chunk_size=1000), truth)

    def test_as_many_nodes_as_graphs(self) -> None:
        """Lengths that agree by chance do not make a batch that can be cut."""
        torch.manual_seed(1)
        net = GraphNetwork(opaque=False).double().eval()
        g = graphs((1, 1, 1, 1, 1, 1))
        g.edges = torch.randint(6, (2, 6), generator=torch.Generator().manual_seed(4))
        y = torch.tensor([0, 2, 1, 1, 0, 2])
        truth = hessian(net, lambda call: F.cross_entropy(call(g.x, g.edges, g.graph), y))
        data = [((g.x, g.edges, g.graph), y)]
        right(HessianOperator(net, nn.CrossEntropyLoss(), data), truth)
        right_or_refused(
            lambda: HessianOperator(net, nn.CrossEntropyLoss(), data, chunk_size=2), truth
        )

    @pytest.mark.parametrize("dense", [False, True])
    @pytest.mark.parametrize("form", ["tensors", "list", "inputs"])
    @pytest.mark.parametrize("mask", ["boolean", "closure", "ignore_index"])
    def test_nodes(self, dense: bool, form: str, mask: str) -> None:
        """Classification of some of one graph's nodes."""

        class Nodes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor, A: Tensor) -> Tensor:
                h = self.a(x)
                if dense:
                    return self.b(A @ torch.tanh(A @ h))
                return self.b(torch.tanh(torch.zeros_like(h).index_add(0, A[1], h[A[0]])))

        torch.manual_seed(1)
        net = Nodes().double().eval()
        n = 20
        x, y = torch.randn(n, 3).double(), torch.randint(3, (n,))
        A = torch.rand(n, n).double() / n if dense else torch.randint(n, (2, 50))
        keep = torch.rand(n) < 0.4
        truth = hessian(net, lambda call: F.cross_entropy(call(x, A)[keep], y[keep]))
        targets: Any = y
        if mask == "boolean":
            targets = (y, keep)
            loss: Any = lambda o, t: F.cross_entropy(o[t[1]], t[0][t[1]])  # noqa: E731
        elif mask == "closure":
            loss = lambda o, t: F.cross_entropy(o[keep], t[keep])  # noqa: E731
        else:
            loss, targets = nn.CrossEntropyLoss(), y.masked_fill(~keep, -100)
        data: Any = {
            "tensors": (x, A, targets), "list": [(x, A, targets)], "inputs": [((x, A), targets)]
        }[form]  # fmt: skip
        if form == "tensors" and not dense:
            # Lengths differ, which elsewhere is a mistake.
            right_or_refused(lambda: HessianOperator(net, loss, data), truth)
        else:
            right(HessianOperator(net, loss, data), truth)
        right_or_refused(lambda: HessianOperator(net, loss, data, chunk_size=6), truth)
        if form != "tensors":
            right(HessianOperator(net, Loss(loss, whole=True), data), truth)


class Sequences(nn.Module):
    """A recurrent classifier of packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 3), nn.Linear(3, 2)

    def forward(self, sequences: PackedSequence) -> Tensor:
        return self.head(self.rnn(sequences)[1][-1])


class TestPackedSequences:
    @pytest.mark.parametrize("form", ["bare", "inputs"])
    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda o, t: F.cross_entropy(o, t)])
    def test_batches(self, form: str, loss: Any) -> None:
        torch.manual_seed(1)
        net = Sequences().double().eval()
        some = [torch.randn(n, 3).double() for n in (5, 3, 4, 2, 6)]
        y = torch.tensor([0, 1, 1, 0, 1])

        def batch(rows: slice) -> Any:
            inputs = pack_sequence(some[rows], enforce_sorted=False)
            return (inputs if form == "bare" else (inputs,), y[rows])

        everything = pack_sequence(some, enforce_sorted=False)
        truth = hessian(net, lambda call: F.cross_entropy(call(everything), y))
        right(HessianOperator(net, loss, [batch(slice(0, 5))]), truth)
        right(HessianOperator(net, loss, [batch(slice(0, 2)), batch(slice(2, 5))]), truth)
        right(HessianOperator(net, loss, [batch(slice(0, 4)), batch(slice(4, 5))]), truth)
        right_or_refused(
            lambda: HessianOperator(net, loss, [batch(slice(0, 5))], chunk_size=2), truth
        )

    def test_tagging(self) -> None:
        """Packed outputs against packed targets: a mean over tokens."""

        class Tagger(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn, self.head = nn.RNN(3, 3), nn.Linear(3, 2)

            def forward(self, sequences: PackedSequence) -> PackedSequence:
                out = self.rnn(sequences)[0]
                return out._replace(data=self.head(out.data))

        torch.manual_seed(1)
        net = Tagger().double().eval()
        some = [torch.randn(n, 3).double() for n in (5, 3, 4, 2)]
        tags = [torch.randint(2, (len(s),)) for s in some]

        def batch(rows: slice) -> Any:
            return pack_sequence(some[rows], False), pack_sequence(tags[rows], False)

        loss: Any = lambda o, t: F.cross_entropy(o.data, t.data)  # noqa: E731
        x, y = batch(slice(0, 4))
        truth = hessian(net, lambda call: loss(call(x), y))
        right(HessianOperator(net, loss, [(x, y)]), truth)
        batches = [batch(slice(0, 3)), batch(slice(3, 4))]
        right_or_refused(lambda: HessianOperator(net, loss, batches), truth)
        declared = Loss(loss, weight=lambda o, t: len(t.data))
        right(HessianOperator(net, declared, batches), truth)

    def test_padded_with_lengths(self) -> None:
        """Padded sequences with their lengths as a second input can be cut."""

        class Padded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn, self.head = nn.RNN(3, 3, batch_first=True), nn.Linear(3, 2)

            def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
                p = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
                return self.head(self.rnn(p)[1][-1])

        torch.manual_seed(1)
        net = Padded().double().eval()
        lengths = torch.tensor([5, 3, 4, 2, 6])
        x = pad_sequence([torch.randn(int(n), 3).double() for n in lengths], batch_first=True)
        y = torch.tensor([0, 1, 1, 0, 1])
        truth = hessian(net, lambda call: F.cross_entropy(call(x, lengths), y))
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, lengths, y)), truth)
        right(HessianOperator(net, nn.CrossEntropyLoss(), (x, lengths, y), chunk_size=2), truth)
