"""A linear layer's own block of a matrix, without a product for each of its columns.

Where a layer ``z = W a + b`` is used once and the loss is a sum over examples, the Hessian in ``W``
and ``b`` is ``sum_s Q_s (x) a_s a_s^T`` with ``Q_s = d^2 l_s / dz dz``, exactly: it takes D
derivatives and matrix products instead of D (p + 1) products with unit vectors. The same holds for
the Gauss-Newton matrix in ``W`` and ``b``, with that in ``z_s`` for ``Q_s``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvpspec.curvature.engines import Matrix, ProductGraph
from hvpspec.curvature.graph import is_used_once
from hvpspec.curvature.objective import Point
from hvpspec.curvature.parameters import ParameterSpace
from hvpspec.linalg.kronecker_sum import PIECE_ROWS, KroneckerSum
from hvpspec.linalg.operator import SymmetricOperator
from hvpspec.progress import Progress

#: Random products with which an assembled matrix is checked.
NUM_CHECKS = 3

# Roundings on the way through a network, in units of one, that a check allows.
_ROUNDINGS = 64

# Fewer products than this, net of what the block takes itself, are not worth other rounding errors.
_LEAST_SAVED = 32

# Examples of short chunks wait for each other until their Q_s have about this many entries.
_MOST_WAITING = 2**24


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer whose weight is selected.

    Attributes:
        name: dotted name of the module.
        module: the layer.
        parameters: the full names of its selected parameters.
        weight: where its weight lies in a vector.
        bias: where its bias lies, or None if there is none or it is not selected.
    """

    name: str
    module: nn.Linear
    parameters: tuple[str, ...]
    weight: slice
    bias: slice | None

    @property
    def columns(self) -> list[int]:
        """The entries of a vector that belong to the layer."""
        slices = [self.weight] if self.bias is None else [self.weight, self.bias]
        return [i for s in slices for i in range(s.start, s.stop)]

    @property
    def num_saved(self) -> int:
        """How many matrix-vector products its block saves.

        Its second derivatives by each output take at most as long as a product each. The matrix
        products need not be counted: the layer's own share of D p matrix-vector products takes at
        least 8 D^2 p^2 operations per example, they take 0.6 D^2 p^2.
        """
        return len(self.columns) - self.module.out_features - NUM_CHECKS


def largest_linear(model: nn.Module, space: ParameterSpace) -> LinearLayer | None:
    """Find the linear layer with the most selected parameters.

    A layer whose weight is not selected saves no product and is left aside, as are subclasses,
    whose forward pass may be another, and layers with a parametrised weight, which is no parameter.

    Returns:
        The layer, or None if none would save a number of products that matters.
    """
    stops = torch.tensor(space.sizes).cumsum(0).tolist()
    where = {
        name: slice(stop - size, stop)
        for name, size, stop in zip(space.names, space.sizes, stops, strict=True)
    }
    layers = []
    for name, module in model.named_modules():
        weight, bias = (f"{name}.{kind}" if name else kind for kind in ("weight", "bias"))
        if type(module) is nn.Linear and "forward" not in vars(module) and weight in where:
            names = (weight, bias) if bias in where else (weight,)
            layers.append(LinearLayer(name, module, names, where[weight], where.get(bias)))
    layer = max(layers, key=lambda layer: len(layer.columns), default=None)
    return layer if layer is not None and layer.num_saved >= _LEAST_SAVED else None


def add_own_block_(
    A: Tensor, point: Point, matrix: Matrix, layer: LinearLayer, progress: Progress | None
) -> tuple[float, int] | None:
    """Write a layer's own block of a matrix of second derivatives.

    Args:
        A: what it is written into, (n, n), zero in the layer's rows and columns.
        point: the function, where it is looked at.
        matrix: which matrix of its second derivatives.
        layer: the layer.
        progress: called with the columns of the layer done, as chunks go by, and n.

    Returns:
        The size of the block if nothing cancelled, see :class:`KroneckerSum`, and the number of
        examples; or None where it has another form, and what was written means nothing. It has this
        form if the layer is called once in a forward pass, on one row per example, its parameters
        are used for nothing else, and rows do not act on each other.
    """
    shares = point.ranks.gather(_add_own_share_(A, point, matrix, layer, progress))
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return None
    point.ranks.sum_(A)
    mass, num_examples = (sum(numbers) for numbers in zip(*known, strict=True))
    return mass, int(num_examples)


def agrees(
    A: Tensor, operator: SymmetricOperator, layer: LinearLayer, mass: float, num_examples: int
) -> bool:
    """Whether an assembled matrix multiplies as its operator does; if not, warn.

    Args:
        A: the matrix, shape (n, n).
        operator: what it was assembled from.
        layer: whose own block was assembled without products.
        mass: the size of that block if nothing cancelled.
        num_examples: how many are summed up in it.
    """
    n = len(A)
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(n, NUM_CHECKS, generator=generator, dtype=torch.float64)
    Z = Z.to(A.device, A.dtype)
    product = operator.matmat(Z)
    difference = float(torch.linalg.matrix_norm(A @ Z - product))
    # ||E Z||_F is about ||E||_F for each column. An entry is a sum over N examples, and one of
    # the product a sum over n entries; a sum of m numbers with independent roundings is off by
    # some sqrt(m) u times their size before anything cancels. Each of these numbers has gone
    # through the layers of a network, for which a few dozen roundings are allowed.
    scale = float(torch.linalg.matrix_norm(A, dtype=torch.float64)) + mass
    roundings = _ROUNDINGS * math.sqrt(NUM_CHECKS * (n + num_examples))
    if difference <= roundings * operator.unit_roundoff * scale:
        return True
    relative = difference / float(torch.linalg.matrix_norm(product))
    warnings.warn(
        f"layer {layer.name!r}: the block assembled from its inputs differs from matrix-vector "
        f"products by {relative:.1e} of them, so that examples seem to depend on each other, or "
        f"something inside is computed in low precision; {len(layer.columns)} products take its "
        "place",
        UserWarning,
        stacklevel=4,
    )
    return False


def _add_own_share_(
    A: Tensor, point: Point, matrix: Matrix, layer: LinearLayer, progress: Progress | None
) -> tuple[float, int] | None:
    """Write what the data of this process add to a layer's own block; its mass and examples."""
    leaves = point.leaves()
    total = KroneckerSum(A, layer.weight, layer.bias, layer.module.out_features)
    enough = max(1, min(PIECE_ROWS, _MOST_WAITING // layer.module.out_features**2))
    waiting: list[tuple[Tensor, Tensor]] = []
    num_examples = 0

    def add_waiting() -> None:
        """Add the examples of several short chunks at once, which makes better use of BLAS."""
        if waiting:
            inputs, columns = zip(*waiting, strict=True)
            total.add(torch.cat(inputs), torch.cat(columns, dim=1))
            waiting.clear()

    with _calls_of(layer.module, point.objective.model) as call, point.terms(leaves) as terms:
        for count, term in enumerate(terms, start=1):
            if not call.is_single(term.num_examples, A.dtype):
                return None
            if not all(is_used_once([term.value], leaves[name]) for name in layer.parameters):
                return None
            num_examples += term.num_examples
            # The terms are shares of the point, so that these second derivatives are weighed.
            graph = matrix.graph(term, {"z": call.shift})
            if not graph.reached or _are_coupled(graph, call.shift):
                return None
            inputs, columns = call.inputs.detach(), _second_derivatives(graph, call.shift)
            if len(inputs) >= enough:
                total.add(inputs, columns)
            else:
                waiting.append((inputs, torch.stack(list(columns))))
                if sum(len(a) for a, _ in waiting) >= enough:
                    add_waiting()
            if progress is not None:
                done = min(count / point.num_chunks, 1)
                progress(int(done * len(layer.columns)), len(A))
        add_waiting()
    total.finish()
    return total.mass, num_examples


def _are_coupled(graph: ProductGraph, shift: Tensor) -> bool:
    """Whether the loss of some examples depends on the ``z`` of others, shape (examples, D).

    The product with a random vector that is zero on half of them is exactly zero there if it does
    not, so that coupling shows far below the tolerance of a check.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shift.shape, generator=generator, dtype=torch.float64).to(shift)
    others = torch.randperm(len(shift), generator=generator)[len(shift) // 2 :]
    weights[others] = 0
    product = graph.multiply({"z": weights})
    if not product:
        return False
    size = product["z"].abs()
    return bool(size[others].max() > torch.finfo(size.dtype).eps / 2 * size.max())


def _second_derivatives(graph: ProductGraph, shift: Tensor) -> Iterator[Tensor]:
    """The columns ``Q_s[:, j]`` for each output j, shape (examples, D)."""
    for j in range(shift.shape[1]):
        selected = torch.zeros_like(shift)
        selected[:, j] = 1
        column = graph.multiply({"z": selected})
        # Where the loss is linear in z, the derivative is zero.
        yield column["z"] if column else torch.zeros_like(shift)


class _Call:
    """What a layer was called on in the last forward pass, and a zero added to what it returned.

    Attributes:
        inputs: ``a``, shape (examples, p).
        shift: the zero, a leaf to differentiate by instead of ``z``.
        count: the number of calls.
    """

    def __init__(self) -> None:
        self.inputs = self.shift = torch.zeros(0)
        self.count = 0

    def reset(self, *_: Any) -> None:
        """Start a forward pass."""
        self.count = 0

    def record(self, _: nn.Module, args: Any, kwargs: Mapping[str, Any], outputs: Tensor) -> Tensor:
        """Note a call, and shift its result."""
        self.count += 1
        if self.count == 1:
            self.inputs = args[0] if args else kwargs["input"]
            self.shift = torch.zeros_like(outputs, requires_grad=True)
        # A checkpointed part is run again in the backward pass, and must be the same again.
        return outputs + self.shift if outputs.shape == self.shift.shape else outputs

    def is_single(self, num_examples: int, dtype: torch.dtype) -> bool:
        """Whether there was one call, on one row per example, without autocast to another dtype."""
        is_row_each = self.shift.ndim == 2 and len(self.shift) == num_examples
        return self.count == 1 and is_row_each and self.shift.dtype == self.inputs.dtype == dtype


@contextmanager
def _calls_of(layer: nn.Linear, model: nn.Module) -> Iterator[_Call]:
    """Watch the calls of a layer in each forward pass of a model."""
    call = _Call()
    handles = [model.register_forward_pre_hook(call.reset)]
    # Before the hooks of others, which may change what the layer returned.
    handles.append(layer.register_forward_hook(call.record, prepend=True, with_kwargs=True))
    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()
