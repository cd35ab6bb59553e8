"""What all matrices of second derivatives of a network's loss have in common as operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hvpspec.curvature.choice import EngineName, Plan
from hvpspec.curvature.kronecker import LinearLayer, OwnBlock, add_own_block_, largest_linear
from hvpspec.curvature.losses import Loss
from hvpspec.curvature.matrices import Matrix
from hvpspec.curvature.objective import Mode, Objective
from hvpspec.curvature.parameters import ParameterSpace, Selector
from hvpspec.curvature.products import Products
from hvpspec.curvature.sharding import whole
from hvpspec.errors import InputError
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.operator import IndexBound, Piece, PointFacts, SymmetricOperator
from hvpspec.linalg.tiles import reflect_
from hvpspec.progress import Progress

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


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
        layer, block = largest_linear(self.objective.model, self.space), None
        if layer is not None:
            known = torch.zeros(2, dtype=torch.float64, device=A.device)
            yield self._own_block(A, known, layer, progress)
            mass, num_examples = known.tolist()
            block = OwnBlock(layer, mass, int(num_examples)) if num_examples else None
        if block is None:
            yield from super()._pieces(A, progress)
            return
        n, own = len(A), block.layer.columns
        A.diagonal()[own] += 2 * self.objective.l2
        others = sorted(set(range(n)).difference(own))

        def report(done: int) -> None:
            """Leave the last step of the bar to the check and what may follow from it."""
            if progress is not None:
                progress(min(len(own) + done, n - 1), n)

        yield from self._columns(A, others, report)
        reflect_(A, others, own)
        if not block.agrees(A, self):
            yield from self._columns(A, own)
        if progress is not None:
            progress(n, n)

    def _own_block(
        self, A: Tensor, known: Tensor, layer: LinearLayer, progress: Progress | None
    ) -> Piece:
        """A layer's own block, with its mass and number of examples; 0 if it has another form."""

        def fill() -> None:
            block = add_own_block_(A, self._point, self._matrix, layer, progress)
            if block is not None:
                known[0], known[1] = block.mass, block.num_examples

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
                    f"between "
                    "(argmax, .detach(), .item()) cuts the graph; select other parameters"
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
