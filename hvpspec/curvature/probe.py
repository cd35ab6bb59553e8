"""A look at an objective on a few examples: its loss, its gradient, and those on parts of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hvpspec.curvature.data import Batch, is_nested
from hvpspec.curvature.derivatives import differentiate
from hvpspec.curvature.differences import Comparison, compare
from hvpspec.curvature.graph import refuse_earlier_leaves, refuse_known_faults
from hvpspec.curvature.parameters import add_parts_, aligned
from hvpspec.curvature.record import raise_changed
from hvpspec.curvature.stage import stage
from hvpspec.errors import HvpspecError, InputError, first_line
from hvpspec.linalg.memory import is_out_of_memory

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective

#: Products that are further off are no derivatives; round-off in any part of a network is less.
MOST_DEFECT = 1e-3

# A defect that differences are not exact enough to tell from none.
_LEAST_DEFECT = 1e-6

#: How a loss on several parts combines to that on the whole; "coupled": in no such way; "unknown":
#: the whole cannot be parted.
Rule = Literal["mean", "sum", "coupled", "unknown"]


@dataclass(frozen=True)
class Look:
    """The loss on some examples, looked at once.

    Attributes:
        batch: the examples, as they were converted.
        value: the loss.
        weight: what it weighs.
        gradient: by all selected parameters, shape (n,).
        reached: names of the parameters with a path to the loss.
        outputs: what the loss took.
    """

    batch: Batch
    value: float
    weight: float
    gradient: Tensor
    reached: frozenset[str]
    outputs: Any


class Probe:
    """Looks at an objective on a few examples, in float64 where that is possible.

    Args:
        objective: the function.
        is_wide: whether float64 is tried.

    Attributes:
        objective: the function that is looked at, in float64 or as it was given.
        float64_fails: why the function cannot be computed in float64; empty if it can.
        inside: the coarsest dtype in which something is computed that depends on parameters.
    """

    def __init__(self, objective: Objective, *, is_wide: bool) -> None:
        wide = is_wide and objective.dtype != torch.float64
        self.objective = objective.changed(dtype=torch.float64) if wide else objective
        self.float64_fails = ""
        self.inside: torch.dtype | None = None
        self._seen: tuple[Batch, Look] | None = None  # the last at the present parameters
        self._generator = torch.Generator().manual_seed(0)

    def draw(self) -> Tensor:
        """A random unit vector, shape (n,), of uniform numbers, which are cheapest to draw."""
        objective = self.objective
        z = torch.rand(objective.space.dim, generator=self._generator, dtype=objective.dtype)
        z = z.sub_(0.5).to(objective.device)
        return z.div_(torch.linalg.vector_norm(z))

    @cached_property
    def theta(self) -> Tensor:
        """The present parameters, shape (n,)."""
        return self.objective.space.flatten(self.objective.leaves()).detach()

    @cached_property
    def nearby(self) -> Tensor:
        """A point nearby, where nothing is zero by chance, as outputs of a new layer may be.

        Each parameter moves by a hundredth of its size, and those that are zero as much as others.
        """
        moved, space = self.theta.clone(), self.objective.space
        moves = space.unflatten(self.draw() * space.dim**0.5)
        sizes = {name: part.square().mean().sqrt() for name, part in space.unflatten(moved).items()}
        others = torch.stack([size for size in sizes.values() if size > 0] or [moved.new_ones(())])
        for name, part in space.unflatten(moved).items():
            part.add_(1e-2 * (sizes[name] or others.median()) * moves[name])
        return moved

    @property
    def unit_roundoff(self) -> float:
        """The unit round-off of what is looked at."""
        return torch.finfo(self.inside or self.objective.dtype).eps / 2

    @property
    def tolerance(self) -> float:
        """Summation order depends on shapes; half the digits is far above that error."""
        return float((2 * self.unit_roundoff) ** 0.5)

    def look(
        self,
        batch: Batch,
        theta: Tensor | None = None,
        num_examples: int | None = None,
    ) -> Look:
        """The loss and its gradient on some examples.

        Args:
            batch: the examples.
            theta: the selected parameters, shape (n,); None for the present ones.
            num_examples: how many there are, if they are not along the first dimension.
        """
        objective = self.objective
        if theta is None and self._seen is not None and self._seen[0] is batch:
            return self._seen[1]
        try:
            look = self._look(objective, batch, theta, num_examples)
        except HvpspecError:
            raise
        except Exception as error:
            native = objective.native_dtype
            if is_out_of_memory(error) or objective.dtype == native:
                raise
            as_given = objective.changed(dtype=native)
            look = self._look(as_given, batch, theta, num_examples)
            # It works as it was given, and so it is float64 that the network does not take.
            self.objective, self.float64_fails = as_given, first_line(error)
        if theta is None:
            self._seen = batch, look
        return look

    def takes(self, batch: Batch) -> bool:
        """Whether the network and the loss take some examples of a batch alone."""
        try:
            self.look(batch)
        except HvpspecError:
            raise
        except Exception as error:  # whatever they make of fewer examples
            if is_out_of_memory(error):
                raise
            return False
        return True

    def look_at_one(self, few: Batch, more: Batch) -> Look:
        """The loss and its gradient on few examples, or on more if those are not taken alone."""
        return self.look(few if few is more or self.takes(few) else more)

    def _look(
        self,
        objective: Objective,
        batch: Batch,
        theta: Tensor | None,
        num_examples: int | None,
    ) -> Look:
        """Evaluate the loss and its gradient on some examples."""
        batch = batch.to(objective.device, objective.dtype)
        leaves = objective.leaves(theta)
        tensors = objective.tensors(leaves)
        with stage(objective, 1), objective.placed(tensors):
            with Coarsest() as dtypes:
                loss, weight, outputs = objective.evaluate(batch, tensors)
            refuse_known_faults([loss])
            refuse_earlier_leaves(loss, leaves.values())
            parts = differentiate(loss, leaves)
        if objective.loss.weight is None and objective.loss.reduction == "mean" and num_examples:
            weight = float(num_examples)
        gradient = torch.zeros(objective.space.dim, dtype=objective.dtype, device=objective.device)
        add_parts_(gradient, objective.space, parts)
        if dtypes.found is not None:
            self.inside = coarser(self.inside, dtypes.found)
        return Look(batch, float(loss.detach()), weight, gradient, frozenset(parts), outputs)

    def rules(self, sample: Batch) -> tuple[Rule, Rule, int]:
        """Compare the loss and its gradient on some examples with those on parts of them.

        They are compared at a point nearby, since at the present one the parts may go together by
        chance: with a last layer of zeros, say, many losses have the same value and gradient.

        Returns:
            How the loss of the network combines over parts of the batch, how the loss function
            alone does over parts of the outputs, and along which dimension the examples lie.
        """
        whole = self.look(sample, self.nearby)
        objective = self.objective
        if not math.isfinite(whole.value):
            return "unknown", "unknown", 0  # whoever asks says so
        by_rows: Rule = "unknown"
        if objective.source != "known":
            tensors = objective.tensors(objective.leaves(self.nearby))
            value = torch.tensor(whole.value, dtype=objective.dtype)
            by_rows = rule_by_rows(objective, tensors, whole.batch, value, whole.outputs)
        if not sample.can_be_cut:
            return by_rows, by_rows, 0
        found: Rule = "unknown"
        for dim in (0, 1):  # time may be first, and examples second
            parts = self._parts(sample, dim)
            if parts:
                found = _combination(objective, whole, parts, self.tolerance)
            if found in ("mean", "sum"):
                return found, by_rows, dim
        return found, by_rows, 0

    def _parts(self, sample: Batch, dim: int) -> list[Look]:
        """Look at three parts of some examples, along a dimension.

        They are unequal, and no two neighbours are in the same part, whatever couples them.

        Returns:
            What was seen; nothing where the network does not take the parts.
        """
        lengths = {t.shape[dim] if t.ndim > dim else 0 for t in sample.leaves if t.ndim}
        n = lengths.pop()
        if lengths or n < 2:
            return []
        of_row = torch.tensor([2, 1, 2, 0, 2, 1]).repeat(n // 6 + 1)[:n]
        parts = [rows for k in range(3) if len(rows := (of_row == k).nonzero().flatten())]
        try:
            return [
                self.look(sample.map(partial(_select, dim, rows)), self.nearby, len(rows))
                for rows in parts
            ]
        except HvpspecError:
            raise
        except Exception as error:  # whatever a network makes of fewer examples
            if is_out_of_memory(error):
                raise
            return []

    def products(
        self, looks: Sequence[Look], leaves: Mapping[str, Tensor], vectors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[float], frozenset[str]]:
        """Products of the Hessian on some examples with vectors, by double backward.

        Args:
            looks: at the examples.
            leaves: the selected parameters.
            vectors: each of shape (n,).

        Returns:
            The products, the losses, and the names of the parameters with a path to these.
        """
        objective = self.objective
        products = [torch.zeros_like(v) for v in vectors]
        losses: list[float] = []
        found: set[str] = set()
        for look in looks:
            tensors = objective.tensors(leaves)
            with stage(objective, 2), objective.placed(tensors):
                loss, _, _ = objective.evaluate(look.batch, tensors)
                losses.append(float(loss.detach()))
                gradient = differentiate(loss, leaves, create_graph=True)
                found |= gradient.keys()
                refuse_known_faults(gradient.values())
                parts = {name: g for name, g in gradient.items() if g.requires_grad}
                for v, product in zip(vectors, products, strict=True):
                    columns = aligned(objective.space, objective.space.unflatten(v))
                    weights = [columns[name] for name in parts]
                    second = differentiate(parts.values(), leaves, weights, retain_graph=True)
                    add_parts_(product, objective.space, second)
        return products, losses, frozenset(found)

    def compared(
        self, looks: Sequence[Look], theta: Tensor | None
    ) -> tuple[Comparison, Comparison, float] | None:
        """Compare products at a point with differences of the gradient, and that with the loss.

        Args:
            looks: at some examples, at the present point (or the given one).
            theta: the point, shape (n,); None for the present one.

        Returns:
            The comparisons of a product and of the gradient, and how far products are from
            symmetric; None where they are not finite.

        Raises:
            DataChangedError: the loss is another than before.
            InputError: so are the parameters that it depends on.
        """
        objective, n = self.objective, self.objective.space.dim
        examples = [look.batch for look in looks]

        def f(theta: Tensor) -> tuple[float, Tensor]:
            """The loss on all these examples and its gradient."""
            return total([self.look(batch, theta) for batch in examples])

        is_here = theta is None
        theta = self.theta if theta is None else theta.to(self.theta)
        value, gradient = total(looks) if is_here else f(theta)
        if not math.isfinite(float(gradient.sum())):
            return None
        # Half of it along the gradient: of that alone a random vector sees next to nothing.
        size = float(torch.linalg.vector_norm(gradient))
        v = self.draw()
        if size:
            v.add_(gradient, alpha=1 / size)
            v.div_(torch.linalg.vector_norm(v))
        # Where a difference of the gradient agrees with A v, the matrix is symmetric along v; of a
        # pseudo-gradient it does not.
        vectors = [v, self.draw()] if objective.pseudo_gradient else [v]
        (Av, *others), losses, reached = self.products(looks, objective.leaves(theta), vectors)
        if is_here:
            for look, loss in zip(looks, losses, strict=True):
                if not math.isclose(loss, look.value, rel_tol=self.tolerance, abs_tol=1e-300):
                    raise_changed(f"loss {loss:.6g}, before {look.value:.6g}")
        before = frozenset().union(*(look.reached for look in looks))
        if reached != before:
            raise InputError(
                "the network keeps a tensor from an earlier pass: the loss depends on other "
                f"parameters than before ({', '.join(sorted(reached ^ before))}); clear what is "
                "computed from parameters before each pass"
            )
        if not all(math.isfinite(float(product.sum())) for product in (Av, *others)):
            return None
        u, asymmetry = self.unit_roundoff, 0.0
        for w, Aw in zip(vectors[1:], others, strict=True):
            # Of unit vectors, of which w is random, <w, A v> is about ||A v|| / sqrt(n).
            defect = abs(float(w @ Av) - float(v @ Aw)) * n**0.5
            size = float(torch.linalg.vector_norm(Av) + torch.linalg.vector_norm(Aw))
            asymmetry = defect / size if defect > n**0.5 * 1e3 * u * size else 0.0
        here = (value, gradient)
        return (*compare(f, theta, here, v, Av, u, _LEAST_DEFECT), asymmetry)


def total(looks: Sequence[Look]) -> tuple[float, Tensor]:
    """The sum of the losses that were looked at, and of their gradients."""
    return sum(look.value for look in looks), reduce(add, (look.gradient for look in looks))


def coarser(dtype: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    """The less precise dtype."""
    if dtype is None or torch.finfo(other).eps > torch.finfo(dtype).eps:
        return other
    return dtype


class Coarsest(TorchFunctionMode):
    """Notes the coarsest dtype of what is computed from parameters.

    Attributes:
        found: that dtype; None where nothing is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: torch.dtype | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
                self.found = coarser(self.found, leaf.dtype)
        return result


def rule_by_rows(
    objective: Objective,
    tensors: Mapping[str, Tensor],
    batch: Batch,
    whole: Tensor,
    outputs: Any,
    rules: Sequence[Rule] | None = None,
) -> Rule:
    """How the loss function combines over parts of its arguments.

    Args:
        objective: whose loss it is.
        tensors: all parameters.
        batch: the examples.
        whole: the loss on them.
        outputs: what the model returned for them.
        rules: those that are possible; None for those of the loss.
    """
    pair = Batch((outputs,), {}, batch.targets)
    if not (is_nested(outputs) and pair.can_be_cut):
        return "unknown"
    if objective.spoils_outputs:
        return "unknown"  # they are no longer what the loss has taken
    n, loss = pair.num_examples, objective.loss_of(tensors)
    cut = max(1, n // 3)
    looks = []
    for rows in (slice(0, cut), slice(cut, n)):
        part = pair.rows(rows)
        try:
            length = len(range(n)[rows])
            weight = objective.loss.batch_weight(part.args[0], part.targets, length)
            value = float(loss(part.args[0], part.targets).detach()) if weight else 0.0
        except HvpspecError:
            raise
        except Exception as error:  # whatever a loss makes of fewer examples, such as a fixed mask
            if is_out_of_memory(error):
                raise
            return "unknown"
        looks.append(Look(batch, value, weight, torch.zeros(0), frozenset(), None))
    look = Look(batch, float(whole.detach()), 0.0, torch.zeros(0), frozenset(), None)
    return _combination(objective, look, looks, 1e3 * torch.finfo(whole.dtype).eps, rules)


def _select(dim: int, rows: Tensor, tensor: Tensor) -> Tensor:
    """Some rows of a tensor along a dimension; a scalar belongs to every part."""
    return tensor.index_select(dim, rows.to(tensor.device)) if tensor.ndim else tensor


def _combination(
    objective: Objective,
    whole: Look,
    parts: Sequence[Look],
    tolerance: float,
    rules: Sequence[Rule] | None = None,
) -> Rule:
    """Whether the loss on the whole is the weighted mean or the sum of those on parts."""
    counted = [part for part in parts if part.weight]
    if not counted:
        return "unknown"
    if rules is None:
        rules = [objective.loss.reduction]
        if objective.source == "assumed":
            rules = ["mean", "sum"]
    total = sum(part.weight for part in counted)
    for rule in rules:
        shares = [part.weight / total if rule == "mean" else 1.0 for part in counted]
        value = sum(s * part.value for s, part in zip(shares, counted, strict=True))
        size = sum(s * abs(part.value) for s, part in zip(shares, counted, strict=True))
        gradients = torch.stack([part.gradient for part in counted])
        weights = torch.tensor(shares, dtype=gradients.dtype, device=gradients.device)
        difference = float(torch.linalg.vector_norm(whole.gradient - weights @ gradients))
        scale = float(weights @ torch.linalg.vector_norm(gradients, dim=1))
        same_value = abs(value - whole.value) <= tolerance * max(abs(whole.value), size)
        # What is not finite is said of the first product.
        if same_value and not difference > tolerance * scale:
            return rule
    return "coupled"


def joined(batch: Batch, other: Batch, dim: int) -> Batch | None:
    """Two batches as one; None where they do not go together."""
    tensors = list(zip(batch.leaves, other.leaves, strict=False))
    fits = batch.is_plain and batch.others == other.others
    fits = fits and len(batch.leaves) == len(other.leaves)
    if not fits or any(_without(a, dim) != _without(b, dim) for a, b in tensors):
        return None
    others = iter(other.leaves)

    def join(a: Tensor) -> Tensor:
        b = next(others)
        return torch.cat([a, b], dim) if a.ndim else a

    both = batch.map(join)
    return both if dim or both.can_be_cut else None


def _without(tensor: Tensor, dim: int) -> list[int]:
    """The shape of a tensor without a dimension."""
    return [length for k, length in enumerate(tensor.shape) if k != dim]
