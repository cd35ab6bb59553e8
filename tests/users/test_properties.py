"""Random nestings, batches, layouts and losses: the matrix of the whole, or a refusal.

Some hundred draws in the suite; for more, set HVPSPEC_DRAWS to their number.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvpspec import HessianOperator, HvpspecError, Loss
from tests.users.truth import Function, check_message

DRAWS = int(os.environ.get("HVPSPEC_DRAWS", "100"))
SEARCH = settings(
    max_examples=DRAWS,
    deadline=None,
    derandomize=True,
    # Losses over nested structures are drawn from many small choices.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: As in the other modules here: round-off is 1e-13 of the largest entry, a wrong matrix 1e-3.
ROUNDOFF = 1e-8

FEATURES, HIDDEN = 2, 3


class Named(NamedTuple):
    """A container of two."""

    one: Any
    two: Any


@dataclass
class Structured:
    """Another."""

    one: Any
    two: Any


#: What makes a container of some parts.
CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda parts: {f"part{k}": part for k, part in enumerate(parts)},
    "namedtuple": lambda parts: Named(*parts) if len(parts) == 2 else tuple(parts),
    "dataclass": lambda parts: Structured(*parts) if len(parts) == 2 else list(parts),
}


@dataclass(frozen=True)
class Leaf:
    """A head of the network.

    Attributes:
        kind: "vector" (examples, k), "number" (examples,), "map" (examples, 2, 2),
            "sequence" (examples, steps, k), "classes" (examples, 3).
        index: which of the heads.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Node:
    """Some of them in a container."""

    container: str
    parts: tuple[Any, ...]


def build(tree: Any, leaf: Callable[[Leaf], Any]) -> Any:
    """Containers with something for each leaf."""
    if isinstance(tree, Leaf):
        return leaf(tree)
    return CONTAINERS[tree.container]([build(part, leaf) for part in tree.parts])


def leaves(tree: Any) -> list[Leaf]:
    """The leaves in their order."""
    return [tree] if isinstance(tree, Leaf) else [x for part in tree.parts for x in leaves(part)]


def flatten(value: Any) -> list[Tensor]:
    """The tensors in a structure."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, Structured | SimpleNamespace):
        parts = list(vars(value).values())
    else:
        parts = list(value)
    return [tensor for part in parts for tensor in flatten(part)]


KINDS = ("vector", "number", "map", "sequence", "classes")
WIDTH = {"vector": 2, "number": 1, "map": 4, "sequence": 4, "classes": 3}


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """One head, or a few in nested containers."""
    count = iter(range(100))

    def leaf() -> Leaf:
        return Leaf(draw(st.sampled_from(KINDS)), next(count))

    def node(depth: int) -> Any:
        if depth == 0 or draw(st.booleans()):
            return leaf()
        parts = tuple(node(depth - 1) for _ in range(draw(st.integers(1, 3))))
        return Node(draw(st.sampled_from(sorted(CONTAINERS))), parts)

    tree = node(draw(st.integers(0, 2)))
    return tree if len(leaves(tree)) <= 5 else leaf()


class Heads(nn.Module):
    """A body, and the heads of a tree."""

    def __init__(self, tree: Any, *, zero: bool) -> None:
        super().__init__()
        self.tree = tree
        self.body = nn.Linear(FEATURES, HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, WIDTH[leaf.kind]) for leaf in leaves(tree))
        if zero:
            for p in self.heads.parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        heads = iter(self.heads)
        return build(self.tree, lambda leaf: shaped(leaf.kind, next(heads)(h)))


def shaped(kind: str, out: Tensor) -> Tensor:
    if kind == "number":
        return out.squeeze(1)
    return out.reshape(len(out), 2, 2) if kind in ("map", "sequence") else out


def target(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Targets for n examples."""
    if kind == "classes":
        return torch.randint(3, (n,), generator=generator)
    shape = {"vector": (n, 2), "number": (n,), "map": (n, 2, 2), "sequence": (n, 2, 2)}[kind]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def each_loss(out: Tensor, t: Tensor) -> Tensor:
    """The loss of each example, shape (n,)."""
    if not t.is_floating_point():
        return F.cross_entropy(out, t, reduction="none")
    return ((out - t).square() + (0.5 * out).sin()).reshape(len(out), -1).mean(1)


def total(outputs: Any, targets: Any) -> Tensor:
    """The loss of each example, over all heads."""
    pairs = zip(flatten(outputs), flatten(targets), strict=True)
    return torch.stack([each_loss(out, t) for out, t in pairs]).sum(0)


def mean(outputs: Any, targets: Any) -> Tensor:
    return total(outputs, targets).mean()


def summed(outputs: Any, targets: Any) -> Tensor:
    return total(outputs, targets).sum()


def weighted(outputs: Any, targets: Any) -> Tensor:
    """The mean over what counts, the first of the targets saying how much."""
    counts, rest = targets
    return (counts * total(outputs, rest)).sum() / counts.sum()


def contrast(outputs: Any, targets: Any) -> Tensor:
    """Each example against the others."""
    z = torch.cat([out.reshape(len(out), -1) for out in flatten(outputs)], 1)
    scores = -torch.cdist(z, z.flip(1) + 0.3).square() / 2
    return mean(outputs, targets) + F.cross_entropy(scores, torch.arange(len(z)))


def statistics(outputs: Any, targets: Any) -> Tensor:
    """The square of the mean over the batch."""
    return mean(outputs, targets) + sum(
        out.reshape(len(out), -1).mean(0).square().sum() for out in flatten(outputs)
    )


def variance(outputs: Any, targets: Any) -> Tensor:
    """Less the spread over the batch."""
    return mean(outputs, targets) + sum(
        (-out.reshape(len(out), -1).var(0, unbiased=False)).exp().sum() for out in flatten(outputs)
    )


def dice(outputs: Any, targets: Any) -> Tensor:
    """A ratio of sums over the batch."""
    out = flatten(outputs)[0].reshape(len(flatten(outputs)[0]), -1)
    p, t = out.sigmoid(), flatten(targets)[0].to(out).reshape(len(out), -1)[:, :1].sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def last_only(outputs: Any, targets: Any) -> Tensor:
    """The mean, with a term of the batch's last example alone."""
    return mean(outputs, targets) + flatten(outputs)[0][-1].square().sum()


def root(outputs: Any, targets: Any) -> Tensor:
    """The root of a mean."""
    return (1 + total(outputs, targets).square().mean()).sqrt()


COUPLED = (contrast, statistics, variance, dice, last_only, root)


@st.composite
def sizes(draw: st.DrawFn) -> list[int]:
    """Ragged batches."""
    return draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))


@dataclass(frozen=True)
class Draw:
    """A network, a loss and data, cut into batches in some way.

    Attributes:
        net: the network.
        loss: as it is given.
        data: as they are given.
        whole: the loss over all the data.
        chunk_size: as it is given.
        name: what is counted.
        expected: whether it has to be answered.
    """

    net: nn.Module
    loss: Any
    data: Any
    whole: Callable[[Any], Tensor]
    chunk_size: int | None
    name: str
    expected: bool


def cut(value: Any, start: int, stop: int) -> Any:
    """Some examples of nested targets."""
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, dict):
        return {k: cut(v, start, stop) for k, v in value.items()}
    if isinstance(value, Structured):
        return Structured(cut(value.one, start, stop), cut(value.two, start, stop))
    parts = [cut(v, start, stop) for v in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


@st.composite
def nested(draw: st.DrawFn) -> Draw:
    """Examples along the first dimension of whatever the network returns."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    tree, zero = draw(trees()), draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**20)))
        net = Heads(tree, zero=zero).double().eval()
    batches = draw(sizes())
    n = sum(batches)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    heads = leaves(tree)
    # The targets have their own containers.
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    parts = [target(leaf.kind, n, generator) for leaf in heads]
    targets: Any = parts[0] if len(parts) == 1 and draw(st.booleans()) else (
        CONTAINERS[container](parts)
    )  # fmt: skip
    kind = draw(st.sampled_from(["mean", "sum", "weighted", "coupled", "mean", "sum"]))
    declared = draw(st.booleans())
    one = len(batches) == 1
    chunk_size = draw(st.none() | st.integers(1, n + 2))
    parted = not one or (chunk_size is not None and chunk_size < n)
    if kind == "mean":
        function: Any = mean
        loss = Loss(mean) if declared else mean
    elif kind == "sum":
        function = summed
        loss = Loss(summed, "sum") if declared else summed
    elif kind == "weighted":
        function = weighted
        counts = torch.randint(0, 3, (n,), generator=generator).double()
        counts[0] = 1.0
        targets = (counts, targets)
        loss = Loss(weighted, weight=lambda o, t: t[0].sum()) if declared else weighted
    else:
        function = draw(st.sampled_from(COUPLED))
        loss = Loss(function, whole=True) if declared else function
    starts = [sum(batches[:k]) for k in range(len(batches))]
    pieces = [(x[s : s + b], cut(targets, s, s + b)) for s, b in zip(starts, batches, strict=True)]
    form = draw(st.sampled_from(["batches", "pair"])) if one else "batches"
    data: Any = (x, targets) if form == "pair" else pieces
    # A batch of one example does not tell a sum from a mean, and weighs nothing where all is
    # ignored; everything else that adds up has to be answered.
    told = declared or max(batches) > 1
    expected = (kind in ("mean", "sum") and told) or (kind == "weighted" and declared)
    expected = expected or (kind in ("weighted", "coupled") and not parted)
    return Draw(
        net, loss, data, lambda call: function(call(x), targets), chunk_size,
        f"{kind}, {'declared' if declared else 'undeclared'}{', parted' if parted else ''}",
        expected,
    )  # fmt: skip


class Sequences(nn.Module):
    """A recurrent network over steps in some layout, or one that sees each step alone."""

    def __init__(self, layout: str, *, remembers: bool, both_ways: bool) -> None:
        super().__init__()
        self.layout, self.remembers = layout, remembers
        width = 2 if remembers else HIDDEN
        self.body: nn.Module = (
            nn.RNN(FEATURES, width, batch_first=layout != "time first", bidirectional=both_ways)
            if remembers
            else nn.Linear(FEATURES, width)
        )
        self.head = nn.Linear(width * (1 + (remembers and both_ways)), 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)[0] if self.remembers else torch.tanh(self.body(x))
        out = self.head(h)
        return out.reshape(-1, 3) if self.layout == "flattened" else out


def tokens(out: Tensor, t: Tensor) -> Tensor:
    """The mean over all tokens, in any layout."""
    return F.cross_entropy(out.reshape(-1, 3), t.reshape(-1))


def summed_tokens(out: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(out.reshape(-1, 3), t.reshape(-1), reduction="sum")


@st.composite
def layouts(draw: st.DrawFn) -> Draw:
    """Sequences with the batch first, the time first, or in flattened tokens."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = draw(st.sampled_from(["batch first", "time first", "flattened"]))
    remembers, both_ways = draw(st.booleans()), draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**20)))
        net = Sequences(layout, remembers=remembers, both_ways=both_ways).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)  # so that it remembers more
    steps, batches = draw(st.integers(1, 5)), draw(sizes())
    n = sum(batches)
    dim = 1 if layout == "time first" else 0
    shape = (steps, n) if dim else (n, steps)
    x = torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(3, shape, generator=generator)
    kind = draw(st.sampled_from(["stock", "mean", "sum", "weight"]))
    flat = layout == "flattened" and (kind == "stock" or draw(st.booleans()))
    function = summed_tokens if kind == "sum" else tokens
    loss: Any = {
        "stock": nn.CrossEntropyLoss(),
        "mean": tokens,
        "sum": summed_tokens,
        "weight": Loss(tokens, weight=lambda o, t: t.numel()),
    }[kind]
    if kind == "stock" and layout != "flattened":
        net = nn.Sequential(net, ClassesSecond())
    chunk_size = draw(st.none() | st.integers(1, n + 2))
    pieces = [
        (a, b.reshape(-1) if flat else b)
        for a, b in zip(x.split(batches, dim), y.split(batches, dim), strict=True)
    ]
    one = len(batches) == 1
    form = draw(st.sampled_from(["batches", "pair"])) if one and not flat else "batches"
    data: Any = pieces[0] if form == "pair" else pieces

    def whole(call: Any) -> Tensor:
        out = call(x)
        if isinstance(net, nn.Sequential):
            out = out.movedim(1, -1)
        return function(out, y)

    asked = chunk_size is not None and chunk_size < max(batches)
    known = kind in ("stock", "weight")
    expected = not asked and (
        (layout == "batch first" and (known or max(batches) > 1))
        or (layout == "flattened" and known)
        or (layout == "time first" and known and remembers and steps > 1)
    )  # fmt: skip
    return Draw(net, loss, data, whole, chunk_size, f"{layout}, {kind}", expected)


class ClassesSecond(nn.Module):
    """Classes in the second dimension."""

    def forward(self, out: Tensor) -> Tensor:
        return out.movedim(-1, 1)


class Opaque:
    """What only the network understands: rows, and to which example each belongs."""

    def __init__(self, rows: Tensor, of: Tensor) -> None:
        self.rows, self.of = rows, of


class Bags(nn.Module):
    """The mean over each example's rows."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.body, self.head, self.form = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3), form

    def forward(self, *inputs: Any) -> Tensor:
        if self.form == "list":
            return torch.stack(
                [self.head(torch.tanh(self.body(rows)).mean(0)) for rows in inputs[0]]
            )
        rows, of = (inputs[0].rows, inputs[0].of) if self.form == "object" else inputs
        n = int(of.max()) + 1
        h = torch.tanh(self.body(rows))
        pooled = h.new_zeros(n, HIDDEN).index_add(0, of, h)
        return self.head(pooled / torch.bincount(of, minlength=n)[:, None])


@st.composite
def opaque(draw: st.DrawFn) -> Draw:
    """Inputs that do not run over the examples, of any sizes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    form, batches = draw(st.sampled_from(["list", "object", "rows"])), draw(sizes())
    n = sum(batches)
    lengths = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**20)))
        net = Bags(form).double().eval()
    bags = [
        torch.randn(length, FEATURES, generator=generator, dtype=torch.float64)
        for length in lengths
    ]
    y = torch.randint(3, (n,), generator=generator)

    def inputs(some: list[Tensor]) -> tuple[Any, ...]:
        if form == "list":
            return (some,)
        of = torch.repeat_interleave(torch.tensor([len(bag) for bag in some]))
        return (Opaque(torch.cat(some), of),) if form == "object" else (torch.cat(some), of)

    starts = [sum(batches[:k]) for k in range(len(batches))]
    pieces = [(inputs(bags[s : s + b]), y[s : s + b]) for s, b in zip(starts, batches, strict=True)]
    kind = draw(st.sampled_from(["stock", "mean", "sum"]))
    sums: Any = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
    means: Any = lambda o, t: F.cross_entropy(o, t)  # noqa: E731
    loss: Any = {"stock": nn.CrossEntropyLoss(), "mean": means, "sum": sums}[kind]
    chunk_size = draw(st.none() | st.integers(1, n + 2))
    asked = chunk_size is not None and chunk_size < max(batches)
    function = sums if kind == "sum" else means
    return Draw(
        net, loss, pieces, lambda call: function(call(*inputs(bags)), y), chunk_size,
        f"{form}, {kind}", not asked and (kind == "stock" or max(batches) > 1),
    )  # fmt: skip


def relative(actual: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max())
    return float((actual - expected).abs().max()) / (scale or 1.0)


def answered(case: Draw, dense: bool) -> bool:
    """Whether there is an answer, which then must be right."""
    f = Function(case.net, case.whole)
    V = torch.randn(
        len(f.theta), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    try:
        H = HessianOperator(case.net, case.loss, case.data, chunk_size=case.chunk_size)
        products = H @ V
        matrix = H.to_dense() if dense else None
        value, gradient = H.loss(), H.gradient()
    except HvpspecError as error:
        check_message(error)
        return False
    # The scale is that of the products: an entry near 0 is off by round-off of the others.
    assert relative(products, f.products(V)) < ROUNDOFF, case.name
    if matrix is not None:
        assert relative(matrix, f.hessian()) < ROUNDOFF, case.name
    assert value == pytest.approx(float(f(f.theta).detach()), rel=1e-9, abs=1e-12), case.name
    assert relative(gradient, f.gradient()) < ROUNDOFF, case.name
    return True


def search(cases: st.SearchStrategy[Draw], share: float) -> None:
    """Draw cases, none of which may be wrong; and of those that can be answered, most must be.

    Args:
        cases: what is drawn.
        share: at least how many of the expected ones are answered.
    """
    seen: Counter[tuple[str, bool, bool]] = Counter()

    @SEARCH
    @given(case=cases, dense=st.booleans())
    def draws(case: Draw, dense: bool) -> None:
        seen[case.name, case.expected, answered(case, dense)] += 1

    draws()
    expected = sum(count for (_, want, _), count in seen.items() if want)
    found = sum(count for (_, want, got), count in seen.items() if want and got)
    assert expected >= 0.2 * sum(seen.values()), seen
    assert found >= share * expected, sorted(seen.items())


def test_nested_outputs_and_targets() -> None:
    # A single example in the longest batch, or targets that look like batches, may be refused.
    search(nested(), 0.95)


def test_layouts_of_sequences() -> None:
    # Where the number of steps is that of the examples, the layout is not told by shapes.
    search(layouts(), 0.9)


def test_opaque_inputs() -> None:
    # Where the first batch has one example, a sum is not told from a mean.
    search(opaque(), 0.9)
