"""The Hessian of a network's loss as a symmetric operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hvpspec.curvature.batches import tensors_in
from hvpspec.curvature.derivatives import differentiate
from hvpspec.curvature.engines import join
from hvpspec.curvature.kronecker import add_own_block_, largest_linear
from hvpspec.curvature.losses import Loss
from hvpspec.curvature.parameters import ParameterSpace, Selector
from hvpspec.curvature.products import EngineName, Plan, Products
from hvpspec.curvature.risk import EmpiricalRisk
from hvpspec.curvature.structure import affine_layers, index_bound, is_convex
from hvpspec.errors import InputError
from hvpspec.linalg.facts import IndexBound, PointFacts
from hvpspec.linalg.operator import Progress, SymmetricOperator
from hvpspec.linalg.tiles import reflect_


class HessianOperator(SymmetricOperator):
    """The Hessian of ``f(theta) = L(theta) + l2 ||theta||^2`` at a network's present parameters.

    ``L`` is the loss over the data: a mean over all examples (tokens, where targets can be ignored)
    whatever the batch sizes, or a sum if the loss sums. Products are exact: double backward through
    the network in evaluation mode, without approximation of the Hessian and without sampling.
    The model's parameters, gradients, buffers, mode and all random states stay as they are. Data
    and parameters must not change during the operator's life; a change is detected and refused.

    ``to_dense`` needs no products for the columns of the largest linear layer that is used once on
    one row per example: their block is a sum of Kronecker products over the examples. A few random
    products check it every time; if they disagree, it warns and takes a product for each column.

    Args:
        model: the network. BatchNorm must be in evaluation mode; dropout is off.
        loss: a loss of ``torch.nn`` or ``torch.nn.functional`` with reduction "mean" or "sum", a
            :class:`hvpspec.Loss`, or any function of outputs and targets that returns the mean over
            the examples of a batch.
        data: ``(inputs, targets)`` tensors, a mapping of tensors, a ``TensorDataset``, a
            ``DataLoader`` or any re-iterable of batches; a batch is a tuple with the targets last,
            or a mapping with ``labels`` (of which the rest are the model's keyword arguments).
            Outputs with an attribute ``logits`` are replaced by it.
        params: which parameters, by name, pattern, module or parameter, one or several; None for
            all that require gradients. Tied parameters count once, the others are constants.
        l2: the coefficient of ``||theta||^2`` over the selected parameters; it adds ``2 l2`` to
            every eigenvalue.
        chunk_size: the most examples in one graph, which bounds memory and changes no result.
        dtype: to compute in, with parameters, buffers and data converted; None for the parameters'.
        engine: how products are made, all exact: "double backward" (one graph per chunk, shared by
            the vectors), "batched double backward", "forward over reverse" (traced once, with what
            does not depend on the vectors evaluated once per chunk), the same "compiled", or
            "auto" for the fastest, found out on the way and shown by :attr:`plan`. Ways differ by
            round-off, and "auto" goes by the clock: name one for the same bits from run to run.
        memory_budget: bytes for what is kept between products instead of evaluated again: graphs or
            intermediate results of all chunks, if they fit. None for a quarter of free memory.

    Attributes:
        space: names, shapes and order of the selected parameters in a vector.
        notes: what a reader of a result should know.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.

    Example:
        >>> X, y = torch.eye(3), torch.tensor([[1.0], [0.0], [2.0]])
        >>> H = HessianOperator(nn.Linear(3, 1, bias=False), nn.MSELoss(), (X, y))
        >>> H.to_dense()  # 2/N X^T X
        tensor([[0.6667, 0.0000, 0.0000],
                [0.0000, 0.6667, 0.0000],
                [0.0000, 0.0000, 0.6667]])

    Reference:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | nn.Module | Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Selector | Iterable[Selector] | None = None,
        l2: float = 0.0,
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
        engine: EngineName = "auto",
        memory_budget: int | None = None,
    ) -> None:
        if not (math.isfinite(l2) and l2 >= 0):
            raise InputError(f"l2 must be a finite number of at least 0, got {l2}")
        if params is not None and not isinstance(params, Selector):
            params = list(params)
        self._risk = EmpiricalRisk(
            model, loss, data, params=params, chunk_size=chunk_size, dtype=dtype
        )
        super().__init__(self._risk.space.dim, dtype=self._risk.dtype, device=self._risk.device)
        self._arguments = (model, loss, data)
        self._options: dict[str, Any] = {
            "params": params,
            "l2": float(l2),
            "chunk_size": chunk_size,
            "dtype": dtype,
            "engine": engine,
            "memory_budget": memory_budget,
        }
        self._l2 = float(l2)
        self._reached: frozenset[str] | None = None
        self._products = Products(self._risk, engine, memory_budget)

    @property
    def space(self) -> ParameterSpace:
        """Names, shapes and order of the selected parameters in a vector."""
        return self._risk.space

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result should know about how it was computed."""
        notes = list(self._risk.notes)
        if self.dtype != self._risk.native_dtype:
            notes.append(f"computed in {self.dtype} from parameters in {self._risk.native_dtype}")
        unused = [
            name for name in self.space.names if name not in (self._reached or self.space.names)
        ]
        if unused:
            rows = "rows of the l2 term alone" if self._l2 else "exact zero rows"
            notes.append(f"no path to the loss, hence {rows}: {', '.join(unused)}")
        return tuple(notes)

    @property
    def unit_roundoff(self) -> float:
        """The unit round-off of the coarser of two dtypes, the operator's and the loss's."""
        return max(super().unit_roundoff, torch.finfo(self._risk.reference.dtype).eps / 2)

    @property
    def plan(self) -> tuple[Plan, ...]:
        """How products are made by now, for each number of vectors that was multiplied at once."""
        return self._products.plans

    def loss(self) -> float:
        """``f`` at the present parameters, with the l2 term."""
        theta = self.space.flatten(self._risk.leaves()).detach().double()
        return self._risk.value() + self._l2 * float(theta @ theta)

    def gradient(self) -> Tensor:
        """The gradient of ``f`` with the l2 term, shape (n,)."""
        leaves = self._risk.leaves()
        with torch.inference_mode(False):
            gradient = 2 * self._l2 * self.space.flatten(leaves).detach()
        reached: set[str] = set()
        with self._risk.terms(leaves) as terms:
            for term in terms:
                parts = differentiate(term.value, leaves)
                reached |= parts.keys()
                gradient += join(self.space, parts, gradient)
        self._note_reached(reached)
        return gradient

    def block(self, params: Selector | Iterable[Selector]) -> HessianOperator:
        """The diagonal block of some of the parameters: a layer's own Hessian.

        Args:
            params: names, patterns, modules or parameters, as for the operator itself.

        Returns:
            The operator on those parameters alone, all others held fixed.
        """
        return self._remade(params=params)

    def in_float64(self) -> HessianOperator:
        """The same Hessian with parameters, buffers and data converted to float64."""
        if self.dtype == torch.float64:
            return self
        return self._remade(dtype=torch.float64)

    def structural_upper_bound(self) -> IndexBound | None:
        """An upper bound on the Morse index that follows from the network's structure.

        Where the outputs are (piecewise) affine in one layer's parameters and the loss is convex in
        the outputs, the Hessian is positive semi-definite on that layer. The condition is checked
        on the graph of every chunk; a final linear layer always meets it, and so does each layer
        used once in a piecewise linear network.

        Returns:
            The bound from the largest such layer, or None where the conditions are not met.
        """
        leaves = self._risk.leaves()
        layers = None
        with self._risk.terms(leaves) as terms:
            for term in terms:
                loss = term.loss
                if not (loss.convex or is_convex(loss.function, term.outputs, term.targets)):
                    return None
                found = affine_layers(tensors_in(term.outputs), leaves)
                layers = found if layers is None else tuple(x for x in layers if x in found)
        if not layers:
            return None
        return index_bound(self.shape[0], max(layers, key=lambda layer: layer.dim))

    def facts(self) -> PointFacts:
        """Loss, gradient norm, structural bound and notes, from two passes over the data."""
        gradient_norm = float(torch.linalg.vector_norm(self.gradient().double()))
        bound = self.structural_upper_bound()
        return PointFacts(self.loss(), gradient_norm, bound, self.notes)

    def _assemble_(self, A: Tensor, progress: Progress | None) -> None:
        """Fill the largest linear layer's own block without products, where it has that form."""
        layer = largest_linear(self._risk.model, self.space)
        block = None if layer is None else add_own_block_(A, self._risk, layer, progress)
        if block is None:
            super()._assemble_(A, progress)
            return
        n, own = len(A), block.layer.columns
        A.diagonal()[own] += 2 * self._l2
        others = sorted(set(range(n)).difference(own))

        def report(done: int) -> None:
            """Leave the last step of the bar to the check and what may follow from it."""
            if progress is not None:
                progress(min(len(own) + done, n - 1), n)

        self._fill_columns_(A, others, report)
        reflect_(A, others, own)
        if not block.agrees(A, self):
            self._fill_columns_(A, own)
        if progress is not None:
            progress(n, n)

    def _matmat(self, V: Tensor) -> Tensor:
        """Multiply in the way that is planned for blocks of this width."""
        with torch.inference_mode(False):
            rows = V.T
            # Autograd cannot save an inference tensor, and vectors that lie apart go faster.
            if rows.is_inference() or rows.stride(1) != 1:
                rows = rows.clone(memory_format=torch.contiguous_format)
            product = self._products.multiply(rows).add_(rows, alpha=2 * self._l2)
        if self._reached is None and self._products.reached is not None:
            self._note_reached(self._products.reached)
        return product.T

    def _note_reached(self, reached: set[str]) -> None:
        """Remember which parameters have a path to the loss; raise if a selector has none."""
        for label, names in self.space.groups:
            if reached.isdisjoint(names):
                raise InputError(
                    f"params: {label} has no path to the loss: it is unused, or something in "
                    f"between "
                    "(argmax, .detach(), .item()) cuts the graph; select other parameters"
                )
        self._reached = frozenset(reached)

    def _remade(self, **changes: Any) -> HessianOperator:
        """The operator of the same function with some options changed."""
        return HessianOperator(*self._arguments, **{**self._options, **changes})

    def _non_finite_message(self) -> str:
        return (
            "a Hessian-vector product is NaN or infinite though the loss is finite; look for "
            "sqrt, log, "
            "norm or division at 0, or for overflow in " + str(self.dtype)
        )


def structural_upper_bound(
    model: nn.Module,
    loss: Loss | nn.Module | Callable[[Any, Any], Tensor],
    data: Any,
    *,
    params: Selector | Iterable[Selector] | None = None,
) -> IndexBound | None:
    """An upper bound on the Morse index from a network's structure alone.

    Args:
        model: as for :class:`HessianOperator`, like all arguments.
        loss: the loss, which must be convex in the outputs for a bound.
        data: the examples on which the network's graph is looked at.
        params: which parameters.

    Returns:
        The bound and the layer that gives it, or None where none is certain; see
        :meth:`HessianOperator.structural_upper_bound`.

    Example:
        >>> net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        >>> data = torch.randn(7, 5), torch.zeros(7, dtype=torch.long)
        >>> structural_upper_bound(net, nn.CrossEntropyLoss(), data).upper  # 39 - 15
        24
    """
    return HessianOperator(model, loss, data, params=params).structural_upper_bound()
