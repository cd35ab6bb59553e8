"""The Hessian of a network's loss as a symmetric operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

from torch import Tensor, nn

from hvpspec.curvature.losses import Loss
from hvpspec.curvature.matrices import Hessian
from hvpspec.curvature.operator import CurvatureOperator
from hvpspec.curvature.parameters import Selector
from hvpspec.curvature.structure import (
    FlatDirections,
    flat_directions,
    index_bound,
    is_convex_at,
)
from hvpspec.linalg.operator import IndexBound


class HessianOperator(CurvatureOperator):
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
        engine: how products are made, all exact: "double-backward" (one graph per chunk, shared by
            the vectors), "batched" (the same, a block of vectors at once), "linearised" (the
            derivative of the gradient traced once, and evaluated once per chunk as far as it does
            not depend on the vectors) or "compiled" (that, compiled, which takes a minute or more).
            "auto" chooses from the arithmetic of the first chunk and the number of products to come
            (:meth:`expect`), the same in each run; :attr:`plan` shows what it chose. Engines differ
            by round-off.
        memory_budget: bytes for what is kept between products instead of evaluated again: graphs or
            intermediate results of all chunks, if they fit. None for a quarter of free memory.
        group: processes of ``torch.distributed`` that share out the data, of which each gives its
            own examples; the mean is over those of all. Each must then make the same calls.

    Attributes:
        space: names, shapes and order of the selected parameters in a vector.
        notes: what a reader of a result should know.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.

    Example:
        >>> import torch
        >>> X, y = torch.eye(3), torch.tensor([[1.0], [0.0], [2.0]])
        >>> H = HessianOperator(nn.Linear(3, 1, bias=False), nn.MSELoss(), (X, y))
        >>> H.to_dense()  # 2/N X^T X
        tensor([[0.6667, 0.0000, 0.0000],
                [0.0000, 0.6667, 0.0000],
                [0.0000, 0.0000, 0.6667]])

    Reference:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    """

    _matrix = Hessian()

    def structural_upper_bound(self) -> IndexBound | None:
        """An upper bound on the Morse index that follows from the network's structure.

        Where the outputs are (piecewise) affine in some parameters together and the loss is convex
        in the outputs, the Hessian is positive semi-definite on these; for the cross-entropy also
        where all rows of the last weight are shifted alike. The condition is checked on the graph
        of every chunk; a final linear layer always meets it, and so does each layer used once in a
        piecewise linear network, with all later biases.

        Returns:
            The bound from the largest layer and what can be added to it, or None where the
            conditions are not met or the products could not be compared with differences.
        """
        self.check_symmetry()
        if not self.objective.guard.is_verified:
            return None  # what the graph says is not what the products are
        shares = self.ranks.gather(self._point.within_memory(self._flat_directions))
        found = [share for share in shares if share is not None]
        if not found:
            return None
        common = reduce(FlatDirections.common, found)
        shapes = dict(zip(self.space.names, self.space.shapes, strict=True))
        return index_bound(shapes, common) if common.parameters else None

    def _flat_directions(self) -> FlatDirections | None:
        """Those on all chunks of this process; None if no target there counts."""
        leaves, loss = self._point.leaves(), self.objective.loss
        found: FlatDirections | None = None
        with self._point.terms(leaves) as terms:
            for term in terms:
                if not is_convex_at(loss, term.outputs, term.targets):
                    return FlatDirections(())
                among = self.objective.of_the_model(leaves if found is None else found.parameters)
                here = flat_directions(loss, term.outputs, leaves, among)
                found = here if found is None else found.common(here)
        return found


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
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        >>> data = torch.randn(7, 5), torch.zeros(7, dtype=torch.long)
        >>> structural_upper_bound(net, nn.CrossEntropyLoss(), data).upper  # 39 - 15
        24
    """
    return HessianOperator(model, loss, data, params=params).structural_upper_bound()
