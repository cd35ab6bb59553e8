"""Hessian and Gauss-Newton matrix of a network's loss as symmetric operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hvpspec.curvature.engines import GaussNewton, Hessian, Matrix
from hvpspec.curvature.kronecker import LinearLayer, add_own_block_, agrees, largest_linear
from hvpspec.curvature.objective import Mode, Objective
from hvpspec.curvature.products import Products
from hvpspec.curvature.sharding import whole
from hvpspec.curvature.structure import (
    FlatDirections,
    flat_directions,
    index_bound,
    is_convex_at,
)
from hvpspec.errors import InputError
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.operator import IndexBound, Piece, PointFacts, SymmetricOperator
from hvpspec.linalg.tiles import reflect_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from hvpspec.curvature.choice import EngineName, Plan
    from hvpspec.curvature.losses import Loss
    from hvpspec.curvature.parameters import ParameterSpace, Selector
    from hvpspec.progress import Progress


class CurvatureOperator(SymmetricOperator):
    """A matrix of second derivatives of ``f(theta) = L(theta) + l2 ||theta||^2``.

    Subclasses say which matrix that of ``L`` is, and what follows from the network's structure; see
    :class:`hvpspec.HessianOperator` for the arguments, attributes and errors.
    """

    _matrix: ClassVar[Matrix]
    # Products neither write into the vectors nor are they written into afterwards.
    _keeps_apart = True

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
        mode: Mode = "eval",
        pseudo_gradient: bool = False,
        engine: EngineName = "auto",
        memory_budget: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        objective = Objective(
            model,
            loss,
            data,
            params=params,
            l2=l2,
            chunk_size=chunk_size,
            dtype=dtype,
            mode=mode,
            pseudo_gradient=pseudo_gradient,
            group=group,
        )
        self._place(objective, None, engine, memory_budget)

    @classmethod
    def of(
        cls,
        objective: Objective,
        theta: Tensor | None = None,
        *,
        engine: EngineName = "auto",
        memory_budget: int | None = None,
        is_checked: bool = False,
    ) -> Self:
        """The matrix of an objective at a point.

        Args:
            objective: the function.
            theta: the point, shape (n,); None for the present parameters.
            engine: how products are made.
            memory_budget: bytes for what is kept between products.
            is_checked: whether the caller compares products with differences at this point, or at
                the end of a way of which it is one.
        """
        operator = cls.__new__(cls)
        operator._place(objective, theta, engine, memory_budget)
        operator._point.is_checked = is_checked
        return operator

    def _place(
        self,
        objective: Objective,
        theta: Tensor | None,
        engine: EngineName,
        memory_budget: int | None,
    ) -> None:
        """Stand at a point of an objective."""
        super().__init__(objective.space.dim, dtype=objective.dtype, device=objective.device)
        self.objective, self.ranks = objective, objective.ranks
        self._point = objective.at(theta)
        self._ways: dict[str, Any] = {"engine": engine, "memory_budget": memory_budget}
        self._reached: frozenset[str] | None = None
        self._products = Products(self._point, self._matrix, engine, memory_budget)

    @property
    def space(self) -> ParameterSpace:
        """Names, shapes and order of the selected parameters in a vector."""
        return self.objective.space

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.objective.given

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result should know about how it was computed."""
        notes = list(self.objective.notes)
        unused = [
            name for name in self.space.names if name not in (self._reached or self.space.names)
        ]
        if unused:
            rows = "rows of the l2 term alone" if self.objective.l2 else "exact zero rows"
            notes.append(f"no path to the loss, hence {rows}: {', '.join(unused)}")
        return tuple(notes)

    @property
    def unit_roundoff(self) -> float:
        """The unit round-off of the coarsest dtype in which something is computed."""
        return self._point.unit_roundoff

    @property
    def defect(self) -> float:
        """How far products are from the derivative of the gradient, relative to the norm.

        It was seen along one direction; others are taken to be off by no more than twice as much.
        """
        return 2 * self.objective.guard.defect

    @property
    def plan(self) -> tuple[Plan, ...]:
        """How products are made by now, for each number of vectors that was multiplied at once."""
        return self._products.plans

    def expect(self, num_vectors: int, width: int) -> None:
        """Announce products, so that it is known whether tracing them pays."""
        self._products.expect(num_vectors, width)

    def check_symmetry(self) -> None:
        """See that all holds that an answer stands on, the symmetry of products among it."""
        self._point.within_memory(self._point.require_products)

    def loss(self) -> float:
        """``f`` at the point, with the l2 term."""
        return self._point.objective_value()

    def gradient(self) -> Tensor:
        """The gradient of ``f`` with the l2 term, shape (n,)."""
        gradient, reached = self._point.gradient()
        self._note_reached(reached)
        return gradient

    def block(self, params: Selector | Iterable[Selector]) -> Self:
        """The diagonal block of some of the parameters: a layer's own matrix.

        Args:
            params: names, patterns, modules or parameters, as for the operator itself.

        Returns:
            The operator on those parameters alone, all others held fixed.
        """
        if self._point.theta is not None:
            raise InputError("a block of a matrix at another point than the model's is not made")
        return self._remade(self.objective.changed(params=params))

    def in_float64(self) -> Self:
        """The same matrix with parameters, buffers and data converted to float64.

        It is this one where it is in float64 already, or the network cannot compute in that.
        """
        wide = self._point.within_memory(self.objective.in_float64)
        return self if wide is self.objective else self._remade(wide)

    def fingerprint(self) -> dict[str, str]:
        """What tells this matrix from others: weights, data, loss and how products are made."""
        objective = self.objective
        options = {**objective.options, **self._ways}
        model = objective.model
        with self._point.chunks() as chunks:
            data = tensor_digest(tensor for _, batch in chunks for tensor in batch.leaves)
        tensors = [*objective.parameters().values(), *model.buffers()]
        if self._point.theta is not None:
            tensors.append(self._point.theta)
        kept = {"l2": options["l2"], "chunk_size": options["chunk_size"]}
        for name, usual in (("mode", "eval"), ("pseudo_gradient", False)):
            if options[name] != usual:
                kept[name] = options[name]
        return {
            **super().fingerprint(),
            "weights": tensor_digest(map(whole, tensors)),
            "data": " ".join(self.ranks.gather(data)),
            "loss": f"{self.loss():.6e}",
            "parameters": ", ".join(self.space.names),
            **{name: str(value) for name, value in {**kept, "engine": options["engine"]}.items()},
        }

    @abstractmethod
    def structural_upper_bound(self) -> IndexBound | None:
        """An upper bound on the index, or None where none is certain."""

    def facts(self) -> PointFacts:
        """Loss, gradient norm, structural bound and notes, from two passes over the data."""
        gradient_norm = float(torch.linalg.vector_norm(self.gradient().double()))
        bound = self.structural_upper_bound()
        certain = not self.objective.guard.is_pseudo
        return PointFacts(self.loss(), gradient_norm, bound, self.notes, certain)

    def _pieces(self, A: Tensor, progress: Progress | None) -> Iterator[Piece]:
        """Take the largest linear layer's own block without products, where it has that form."""
        layer = largest_linear(self.objective.model, self.space)
        known = torch.zeros(2, dtype=torch.float64, device=A.device)
        if layer is not None:
            yield self._own_block(A, known, layer, progress)
        mass, num_examples = known.tolist()
        if layer is None or not num_examples:
            yield from super()._pieces(A, progress)
            return
        n, own = len(A), layer.columns
        A.diagonal()[own] += 2 * self.objective.l2
        others = sorted(set(range(n)).difference(own))

        def report(done: int) -> None:
            """Leave the last step of the bar to the check and what may follow from it."""
            if progress is not None:
                progress(min(len(own) + done, n - 1), n)

        yield from self._columns(A, others, report)
        reflect_(A, others, own)
        if not agrees(A, self, layer, mass, int(num_examples)):
            yield from self._columns(A, own)
        if progress is not None:
            progress(n, n)

    def _own_block(
        self, A: Tensor, known: Tensor, layer: LinearLayer, progress: Progress | None
    ) -> Piece:
        """A layer's own block, with its mass and number of examples; 0 if it has another form."""

        def fill() -> None:
            found = add_own_block_(A, self._point, self._matrix, layer, progress)
            if found is not None:
                known[0], known[1] = found

        own = torch.tensor(layer.columns)  # an index may be on the CPU for a tensor that is not
        return Piece("own-block", [(A, (own[:, None], own)), (known, ...)], fill)

    def _matmat(self, V: Tensor) -> Tensor:
        """Multiply by the engine that is chosen for blocks of this width."""
        with torch.inference_mode(False):
            rows = V.T
            # Autograd cannot save an inference tensor, and vectors that lie apart go faster.
            if rows.is_inference() or rows.stride(1) != 1:
                rows = rows.clone(memory_format=torch.contiguous_format)
            product = self.ranks.sum_(self._products.multiply(rows))
            product.add_(rows, alpha=2 * self.objective.l2)
        if self._reached is None and self._products.reached is not None:
            self._note_reached(self._products.reached)
        return product.T

    def _note_reached(self, reached: set[str]) -> None:
        """Remember which parameters have a path to the loss; raise if a selector has none."""
        reached = set().union(*self.ranks.gather(reached))
        for label, names in self.space.groups:
            if reached.isdisjoint(names):
                raise InputError(
                    f"params: {label} has no path to the loss: it is unused, or something in "
                    "between (argmax, .detach(), .item()) cuts the graph; select other parameters"
                )
        self._reached = frozenset(reached)

    def _remade(self, objective: Objective) -> Self:
        """The operator of a function that was made from this one's."""
        return type(self).of(objective, self._point.theta, **self._ways)

    def _non_finite_message(self) -> str:
        return (
            "a product is NaN or infinite though the loss is finite; look for sqrt, log, norm or "
            f"division at 0, or for overflow in {self.dtype}"
        )


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
        mode: which function the network is: "eval" for that of its evaluation mode, "as given" for
            that of the modes its modules are in.
        pseudo_gradient: whether the gradient may be another than the loss's, such as a
            straight-through one; nothing is certified then.
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


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix at a network's present parameters.

    ``G = J^T (d^2 L / dz dz) J + 2 l2 I`` with the network's outputs ``z`` on the data and their
    derivative ``J`` by the parameters: the Hessian of ``L(theta) + l2 ||theta||^2`` for the
    linearised network. It leaves out the Hessian's other part, the sum of ``dL/dz_k`` times the
    Hessian of ``z_k``. So the two are equal where the outputs are affine in the parameters, as in
    those of a last linear layer, and close where the loss is nearly stationary in the outputs, as
    at an interpolating fit. Where the loss is convex in the outputs, G is positive semi-definite.

    Outputs are all floating-point tensors that the model returns, in tuples, lists and dicts, too
    (of outputs with an attribute ``logits``, that one): what of the loss is inside the model counts
    as part of the network. Products are exact, made in the same ways as those of the Hessian, at
    about the same cost, and ``to_dense`` takes as many of them.

    Arguments, attributes and errors are those of :class:`hvpspec.HessianOperator`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())
        >>> _ = nn.init.constant_(net[0].weight, 1.0)
        >>> G = GGNOperator(net, nn.MSELoss(), (X, y))
        >>> G.to_dense()  # 2/N sum of (x (1 - tanh(x)^2))^2
        tensor([[0.1963]])

    Reference:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural
        Computation 14 (2002); Martens, New insights and perspectives on the natural gradient
        method, JMLR 21 (2020), section 8.
    """

    _matrix = GaussNewton()

    def structural_upper_bound(self) -> IndexBound | None:
        """The bound 0 on the number of negative eigenvalues where the loss is convex.

        Returns:
            The bound, or None where the loss is not known to be convex in the outputs.
        """
        self.check_symmetry()
        if not self.objective.guard.is_verified:
            return None  # what the graph says is not what the products are
        loss = self.objective.loss
        with self._point.terms(self._point.leaves()) as terms:
            convex = all(is_convex_at(loss, term.outputs, term.targets) for term in terms)
        if not all(self.ranks.gather(convex)):
            return None
        return IndexBound(
            upper=0,
            psd_dim=self.shape[0],
            reason="The loss is convex in the outputs, so the Gauss-Newton matrix is positive"
            " semi-definite.",
        )
