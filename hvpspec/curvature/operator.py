"""What all matrices of second derivatives of a network's loss have in common as operators."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hvpspec.curvature.derivatives import differentiate
from hvpspec.curvature.engines import add_parts_
from hvpspec.curvature.kronecker import LinearLayer, OwnBlock, add_own_block_, largest_linear
from hvpspec.curvature.losses import Loss
from hvpspec.curvature.matrices import Matrix
from hvpspec.curvature.parameters import ParameterSpace, Selector
from hvpspec.curvature.planning import EngineName, Plan
from hvpspec.curvature.products import Products
from hvpspec.curvature.risk import EmpiricalRisk
from hvpspec.curvature.sharding import whole
from hvpspec.errors import InputError
from hvpspec.linalg.assembly import Part, fill_columns_
from hvpspec.linalg.digests import tensor_digest
from hvpspec.linalg.facts import IndexBound, PointFacts
from hvpspec.linalg.operator import Progress, SymmetricOperator
from hvpspec.linalg.ranks import Ranks
from hvpspec.linalg.tiles import reflect_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class CurvatureOperator(SymmetricOperator):
    """A matrix of second derivatives of ``f(theta) = L(theta) + l2 ||theta||^2``.

    Subclasses say which matrix that of ``L`` is, and what follows from the network's structure; see
    :class:`hvpspec.HessianOperator` for the arguments, attributes and errors.
    """

    _matrix: ClassVar[Matrix]

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
        group: ProcessGroup | None = None,
    ) -> None:
        if not (math.isfinite(l2) and l2 >= 0):
            raise InputError(f"l2 must be a finite number of at least 0, got {l2}")
        if params is not None and not isinstance(params, Selector):
            params = list(params)
        self._risk = EmpiricalRisk(
            model, loss, data, params=params, chunk_size=chunk_size, dtype=dtype, ranks=Ranks(group)
        )
        super().__init__(self._risk.space.dim, dtype=self._risk.dtype, device=self._risk.device)
        self.ranks = self._risk.ranks
        self._arguments = (model, loss, data)
        self._options: dict[str, Any] = {
            "params": params,
            "l2": float(l2),
            "chunk_size": chunk_size,
            "dtype": dtype,
            "engine": engine,
            "memory_budget": memory_budget,
            "group": group,
        }
        self._l2 = float(l2)
        self._reached: frozenset[str] | None = None
        self._products = Products(self._risk, self._matrix, engine, memory_budget)

    @property
    def space(self) -> ParameterSpace:
        """Names, shapes and order of the selected parameters in a vector."""
        return self._risk.space

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self._arguments[0]

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
        return self._products.within_memory(self._risk.value) + self._l2 * float(theta @ theta)

    def gradient(self) -> Tensor:
        """The gradient of ``f`` with the l2 term, shape (n,)."""
        leaves = self._risk.leaves()
        with torch.inference_mode(False):
            theta = self.space.flatten(leaves).detach()

        def share() -> tuple[Tensor, set[str]]:
            """What the data of this process add, and the parameters that they reach."""
            with torch.inference_mode(False):
                gradient = torch.zeros_like(theta)
            reached: set[str] = set()
            with self._risk.terms(leaves) as terms:
                for term in terms:
                    parts = differentiate(term.value, leaves)
                    reached |= parts.keys()
                    add_parts_(gradient, self.space, parts)
            return gradient, reached

        gradient, reached = self._products.within_memory(share)
        self._note_reached(reached)
        return self.ranks.sum_(gradient).add_(theta, alpha=2 * self._l2)

    def block(self, params: Selector | Iterable[Selector]) -> Self:
        """The diagonal block of some of the parameters: a layer's own matrix.

        Args:
            params: names, patterns, modules or parameters, as for the operator itself.

        Returns:
            The operator on those parameters alone, all others held fixed.
        """
        return self._remade(params=params)

    def in_float64(self) -> Self:
        """The same matrix with parameters, buffers and data converted to float64."""
        if self.dtype == torch.float64:
            return self
        return self._remade(dtype=torch.float64)

    def fingerprint(self) -> dict[str, str]:
        """What tells this matrix from others: weights, data, loss and how products are made."""
        options = {name: self._options[name] for name in ("l2", "chunk_size", "engine")}
        model = self._risk.model
        with self._risk.chunks() as chunks:
            data = tensor_digest(tensor for _, batch in chunks for tensor in batch.leaves)
        return {
            **super().fingerprint(),
            "weights": tensor_digest(map(whole, [*model.parameters(), *model.buffers()])),
            "data": " ".join(self.ranks.gather(data)),
            "loss": f"{self.loss():.6e}",
            "parameters": ", ".join(self.space.names),
            **{name: str(value) for name, value in options.items()},
        }

    @abstractmethod
    def structural_upper_bound(self) -> IndexBound | None:
        """An upper bound on the index, or None where none is certain."""

    def facts(self) -> PointFacts:
        """Loss, gradient norm, structural bound and notes, from two passes over the data."""
        gradient_norm = float(torch.linalg.vector_norm(self.gradient().double()))
        bound = self.structural_upper_bound()
        return PointFacts(self.loss(), gradient_norm, bound, self.notes)

    def _assemble_(self, A: Tensor, progress: Progress | None, part: Part) -> None:
        """Fill the largest linear layer's own block without products, where it has that form."""
        layer = largest_linear(self._risk.model, self.space)
        block = None if layer is None else self._own_block_(A, layer, progress, part)
        if block is None:
            super()._assemble_(A, progress, part)
            return
        n, own = len(A), block.layer.columns
        A.diagonal()[own] += 2 * self._l2
        others = sorted(set(range(n)).difference(own))

        def report(done: int) -> None:
            """Leave the last step of the bar to the check and what may follow from it."""
            if progress is not None:
                progress(min(len(own) + done, n - 1), n)

        fill_columns_(A, self, others, part, report)
        reflect_(A, others, own)
        if not block.agrees(A, self):
            fill_columns_(A, self, own, part)
        if progress is not None:
            progress(n, n)

    def _own_block_(
        self, A: Tensor, layer: LinearLayer, progress: Progress | None, part: Part
    ) -> OwnBlock | None:
        """Fill a layer's own block; return None where it has another form."""
        numbers = torch.zeros(2, dtype=torch.float64, device=A.device)

        def fill() -> None:
            """Fill it, and note what is known of it."""
            block = add_own_block_(A, self._risk, self._matrix, layer, progress)
            if block is not None:
                numbers[0], numbers[1] = block.mass, block.num_examples

        own = torch.tensor(layer.columns)  # an index may be on the CPU for a tensor that is not
        part("own-block", [(A, (own[:, None], own)), (numbers, ...)], fill)
        mass, num_examples = numbers.tolist()
        return OwnBlock(layer, mass, int(num_examples)) if num_examples else None

    def _matmat(self, V: Tensor) -> Tensor:
        """Multiply in the way that is planned for blocks of this width."""
        with torch.inference_mode(False):
            rows = V.T
            # Autograd cannot save an inference tensor, and vectors that lie apart go faster.
            if rows.is_inference() or rows.stride(1) != 1:
                rows = rows.clone(memory_format=torch.contiguous_format)
            product = self.ranks.sum_(self._products.multiply(rows))
            product.add_(rows, alpha=2 * self._l2)
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

    def _remade(self, **changes: Any) -> Self:
        """The operator of the same function with some options changed."""
        return type(self)(*self._arguments, **{**self._options, **changes})

    def _non_finite_message(self) -> str:
        return (
            "a product is NaN or infinite though the loss is finite; look for sqrt, log, norm or "
            f"division at 0, or for overflow in {self.dtype}"
        )
