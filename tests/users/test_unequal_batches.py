"""Undeclared means over batches whose examples do not weigh the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvpspec import HessianOperator, Loss
from tests.users.truth import hessian, right, right_or_refused


def positionwise() -> nn.Module:
    """A network that sees each token alone."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()


def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens."""
    return F.cross_entropy(outputs.reshape(-1, 3), targets.reshape(-1))


def draw(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, shape, generator=generator)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 2), (3, 5)),  # as many sequences of other lengths, or fewer columns with time first
        ((2, 1), (2, 2)),
        ((4, 4), (4, 2)),
        ((3, 4), (2, 4), (3, 1)),
    ],
)
def test_sequences_of_other_lengths(shapes: Any, chunk_size: int | None) -> None:
    """Batches in buckets: a row of one batch holds more tokens than one of another."""
    net, batches = positionwise(), [draw(*shape) for shape in shapes]
    x = torch.cat([a.reshape(-1, 2) for a, _ in batches])
    y = torch.cat([b.reshape(-1) for _, b in batches])
    truth = hessian(net, lambda call: tokens(call(x), y))
    right_or_refused(lambda: HessianOperator(net, tokens, batches, chunk_size=chunk_size), truth)
    declared = Loss(tokens, weight=lambda outputs, targets: targets.numel())
    right(HessianOperator(net, declared, batches, chunk_size=chunk_size), truth)


@pytest.mark.parametrize("counts", [(2.0, 1.0, 1.0, 1.0, 2.0), (1.0, 1.0, 3.0, 3.0, 1.0)])
def test_weights_that_are_alike_within_a_batch(counts: tuple[float, ...]) -> None:
    """A weighted mean that looks like a plain one on each batch."""

    def weighted(outputs: Tensor, targets: Any) -> Tensor:
        each = F.cross_entropy(outputs, targets[0], reduction="none")
        return (targets[1] * each).sum() / targets[1].sum()

    net, (x, y), w = positionwise(), draw(5), torch.tensor(counts).double()
    truth = hessian(net, lambda call: weighted(call(x), (y, w)))
    sizes = (1, 1, 2, 1) if counts[0] == 2 else (2, 2, 1)
    batches = [
        (a, (b, c)) for a, b, c in zip(x.split(sizes), y.split(sizes), w.split(sizes), strict=True)
    ]
    right_or_refused(lambda: HessianOperator(net, weighted, batches), truth)
    declared = Loss(weighted, weight=lambda outputs, targets: targets[1].sum())
    right(HessianOperator(net, declared, batches), truth)
