"""A look at an objective on some examples: values and derivatives, there and on parts of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hvpspec.curvature.data import Batch, is_nested
from hvpspec.curvature.differences import (
    Comparison,
    Parts,
    compare,
    inner,
    norm,
    slope_defect,
)
from hvpspec.curvature.graph import (
    differentiate,
    has_own_backward,
    refuse_earlier_leaves,
    refuse_known_faults,
)
from hvpspec.curvature.parameters import aligned
from hvpspec.curvature.stage import stage
from hvpspec.errors import HvpspecError, InputError, first_line
from hvpspec.linalg.memory import is_out_of_memory

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective

T = TypeVar("T")

#: Derivatives that are further off are none. Of a fault in few examples, or one that is orthogonal
#: to the gradient, a comparison along one direction sees only a small part.
MOST_DEFECT = 1e-5

# A prime, so that no two rows of a layer are moved alike.
_PERIOD = 65_537

# A defect that differences are not exact enough to tell from none.
_LEAST_DEFECT = 1e-6

#: How a loss on several parts combines to that on the whole; "coupled": in no such way; "unknown":
#: the whole cannot be parted.
Rule = Literal["mean", "sum", "coupled", "unknown"]


def attempted(compute: Callable[[], T]) -> T | Exception:
    """What a network or a loss makes of some examples, be it an exception.

    Raises:
        Exception: a refusal of hvpspec, or that memory does not suffice, which are no answers.
    """
    try:
        return compute()
    except HvpspecError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return error


@dataclass(frozen=True)
class Look:
    """The loss on some examples.

    Attributes:
        batch: the examples.
        value: the loss.
        weight: what it weighs.
        outputs: what the loss took.
    """

    batch: Batch
    value: float
    weight: float
    outputs: Any = None


class Probe:
    """Looks at an objective on some examples, in float64 where that is possible.

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
        self._seen: tuple[Batch, Parts | None, Look] | None = None
        self._generator = torch.Generator().manual_seed(0)

    def draw(self) -> Parts:
        """A random vector of norm about 1, which repeats itself where it is long.

        To draw ten million numbers takes as long as several examples.
        """
        objective, n = self.objective, self.objective.space.dim
        z = torch.rand(min(n, _PERIOD), generator=self._generator, dtype=objective.dtype)
        z = z.sub_(0.5).mul_((12 / n) ** 0.5).to(objective.device)
        parts, start = {}, 0
        for name, part in self.theta.items():
            period = z.roll(-start)
            repeated = period.repeat(-(-part.numel() // len(z)))
            parts[name] = repeated[: part.numel()].view(part.shape)
            start = (start + part.numel()) % len(z)
        return parts

    @cached_property
    def _z(self) -> Parts:
        """The random vector of all comparisons."""
        return self.draw()

    @cached_property
    def theta(self) -> Parts:
        """The present parameters."""
        return {name: leaf.detach() for name, leaf in self.objective.leaves().items()}

    @cached_property
    def nearby(self) -> Parts:
        """A point nearby, where nothing is zero by chance, as outputs of a new layer may be.

        Each parameter moves by a hundredth of its size, and those that are zero as much as others.
        """
        n = self.objective.space.dim
        sizes = {name: _norm(part) / part.numel() ** 0.5 for name, part in self.theta.items()}
        others = median([size for size in sizes.values() if size > 0] or [1.0])
        return {
            name: torch.add(part, self._z[name], alpha=1e-2 * (sizes[name] or others) * n**0.5)
            for name, part in self.theta.items()
        }

    @property
    def unit_roundoff(self) -> float:
        """The unit round-off of what is looked at."""
        return torch.finfo(self.inside or self.objective.dtype).eps / 2

    @property
    def tolerance(self) -> float:
        """Summation order depends on shapes; half the digits is far above that error."""
        return float((2 * self.unit_roundoff) ** 0.5)

    # -- values --------------------------------------------------------------------------------

    def look(
        self, batch: Batch, theta: Parts | None = None, num_examples: int | None = None
    ) -> Look:
        """The loss on some examples.

        Args:
            batch: the examples.
            theta: the selected parameters; None for the present ones.
            num_examples: how many there are, if they are not along the first dimension.
        """
        if self._seen is not None and self._seen[0] is batch and self._seen[1] is theta:
            return self._seen[2]

        def evaluate(objective: Objective) -> Look:
            with self._evaluated(objective, batch, theta, 1) as (_, loss, weight, outputs):
                if objective.loss.weight is None and objective.loss.reduction == "mean":
                    weight = float(num_examples or weight)
                return Look(batch, float(loss.detach()), weight, outputs)

        look = self._in_float64(evaluate)
        self._seen = batch, theta, look
        return look

    def takes(self, batch: Batch, theta: Parts | None = None) -> bool:
        """Whether the network and the loss take some examples of a batch alone."""
        return isinstance(attempted(lambda: self.look(batch, theta)), Look)

    def _in_float64(self, compute: Callable[[Objective], T]) -> T:
        """Compute something in float64, or as the network was given where that fails."""
        found = attempted(lambda: compute(self.objective))
        if not isinstance(found, Exception):
            return found
        native = self.objective.native_dtype
        if self.objective.dtype == native:
            raise found
        as_given = self.objective.changed(dtype=native)
        result = compute(as_given)
        # It works as it was given, and so it is float64 that the network does not take.
        self.objective, self.float64_fails = as_given, first_line(found)
        return result

    @contextmanager
    def _evaluated(
        self, objective: Objective, batch: Batch, theta: Parts | None, seed: int
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, float, Any]]:
        """The leaves, the loss on some examples, its weight and the outputs, on a stage."""
        leaves = objective.leaves(theta)
        tensors = objective.tensors(leaves)
        batch = batch.to(objective.device, objective.dtype)
        with stage(objective, seed), objective.placed(tensors):
            with Coarsest() as dtypes:
                loss, weight, outputs = objective.evaluate(batch, tensors)
            refuse_known_faults([loss])
            refuse_earlier_leaves(loss, leaves.values())
            if dtypes.found is not None:
                self.inside = coarser(self.inside, dtypes.found)
            yield leaves, loss, weight, outputs

    def rules(self, sample: Batch) -> tuple[Rule, Rule, int]:
        """Compare the loss on some examples with that on parts of them.

        They are compared at a point nearby, since at the present one the parts may go together by
        chance: with a last layer of zeros, say, many losses have the same value. That the gradient
        on each chunk is the loss's is compared by itself, and so gradients go together as well.

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
            batch = sample.to(objective.device, objective.dtype)
            by_rows = rule_by_rows(objective, tensors, batch, value, whole.outputs)
        if not sample.can_be_cut:
            return by_rows, by_rows, 0
        found: Rule = "unknown"
        for dim in (0, 1):  # time may be first, and examples second
            parts = self._parts(sample, dim)
            if parts:
                found = _combination(objective, whole.value, parts, self.tolerance)
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
        found = attempted(
            lambda: [
                self.look(sample.map(partial(_select, dim, rows)), self.nearby, len(rows))
                for rows in parts
            ]
        )
        return [] if isinstance(found, Exception) else found

    # -- derivatives ---------------------------------------------------------------------------

    def derivatives(
        self, examples: Iterable[Batch], theta: Parts, vectors: Sequence[Parts] = ()
    ) -> tuple[float, list[dict[str, Tensor]]]:
        """The sum of the losses on some batches with its derivatives, by double backward.

        Args:
            examples: the batches; one on which no target counts has no part in the sum.
            theta: the point.
            vectors: what the Hessian is multiplied with.

        Returns:
            The sum; its gradient, which has the parameters with a path to it, and the products.
        """

        def evaluate(batch: Batch, objective: Objective) -> tuple[float, list[dict[str, Tensor]]]:
            seed = 2 if vectors else 1
            with self._evaluated(objective, batch, theta, seed) as (leaves, loss, weight, _):
                if not weight:
                    return 0.0, [{} for _ in sums]
                gradient = differentiate(loss, leaves, create_graph=bool(vectors))
                found = [gradient]
                ends = {name: g for name, g in gradient.items() if g.requires_grad}
                refuse_known_faults(ends.values())
                for v in vectors:
                    columns = aligned(space, {name: v[name].to(loss.dtype) for name in ends})
                    weights = list(columns.values())
                    found.append(differentiate(ends.values(), leaves, weights, retain_graph=True))
                detached = [{name: x.detach() for name, x in parts.items()} for parts in found]
                return float(loss.detach()), detached

        space, total = self.objective.space, 0.0
        sums: list[dict[str, Tensor]] = [{} for _ in range(1 + len(vectors))]
        for batch in examples:
            value, found = self._in_float64(partial(evaluate, batch))
            total += value
            for into, parts in zip(sums, found, strict=True):
                add_to(into, parts)
        return total, sums

    def compared(
        self, examples: Iterable[Batch], along: Parts | None, theta: Parts | None = None
    ) -> tuple[Comparison, Comparison, float] | None:
        """Compare products at a point with differences of the gradient, and that with the loss.

        Args:
            examples: some batches, which can be gone over again.
            along: a gradient, along which the comparison is made beside the point and a random
                vector, which sees next to nothing of the loss's slope.
            theta: the point; None for the present one.

        Returns:
            The comparisons of a product and of the gradient, and how far products are from
            symmetric; None where they are not finite or no target counts.

        Raises:
            InputError: the parameters that the loss depends on change from pass to pass.
        """
        theta = self.theta if theta is None else theta
        v = {name: part.clone() for name, part in self._z.items()}
        for other in (theta,) if along is None else (theta, along):
            for name, factor in equalised(other).items():
                v[name].add_(other[name], alpha=factor)
        size = norm(v)
        for part in v.values():
            part.div_(size)
        # Where a difference of the gradient agrees with A v, the matrix is symmetric along v; of a
        # pseudo-gradient it does not.
        vectors = [v, self.draw()] if self.objective.pseudo_gradient else [v]
        value, (gradient, Av, *others) = self.derivatives(examples, theta, vectors)
        if not (gradient and all(math.isfinite(norm(x)) for x in (gradient, Av, *others))):
            return None

        def f(theta: Parts) -> tuple[float, Parts]:
            """The loss on all these examples and its gradient."""
            value, (now,) = self.derivatives(examples, theta)
            if now.keys() != gradient.keys():
                raise InputError(
                    "the network keeps a tensor from an earlier pass: the loss depends on other "
                    f"parameters than before ({', '.join(sorted(gradient.keys() ^ now.keys()))}); "
                    "clear what is computed from parameters before each pass"
                )
            return value, now

        n, u, asymmetry = self.objective.space.dim, self.unit_roundoff, 0.0
        for w, Aw in zip(vectors[1:], others, strict=True):
            # Of unit vectors, of which w is random, <w, A v> is about ||A v|| / sqrt(n).
            defect = abs(inner(w, Av) - inner(v, Aw)) * n**0.5
            size = norm(Av) + norm(Aw)
            asymmetry = defect / size if defect > n**0.5 * 1e3 * u * size else 0.0
        return (*compare(f, theta, (value, gradient), v, Av, u, _LEAST_DEFECT), asymmetry)


def add_to(total: dict[str, Tensor], parts: Parts) -> None:
    """Add a vector to another, part by part."""
    for name, part in parts.items():
        total[name] = total[name] + part if name in total else part


def equalised(parts: Parts) -> dict[str, float]:
    """Factors with which all parts of a vector that are not zero have the same norm, together 1.

    So a fault in a layer with small derivatives is not lost beside those of another.
    """
    norms = {name: _norm(part) for name, part in parts.items()}
    counted = {name: norm for name, norm in norms.items() if 0 < norm < math.inf}
    return {name: 1 / (norm * len(counted) ** 0.5) for name, norm in counted.items()}


def _norm(x: Tensor) -> float:
    """The norm of a tensor."""
    return float(torch.linalg.vector_norm(x))


class Slopes:
    """Compares the loss on every chunk of the data with its gradient there.

    The direction is that of the gradient and of the parameters themselves. It takes a backward and
    two forward passes over the data, in the dtype of the objective, with steps at which round-off
    and third derivatives balance about. A chunk on which the two differ is to be looked at closely.

    Args:
        objective: the function.
        leaves: the selected parameters.

    Attributes:
        gradient: the sum of the gradients, by parameter.
        suspect: the chunk on which they differ most, if on any.
        is_own: whether a function with a backward of its own was met.
    """

    def __init__(self, objective: Objective, leaves: Mapping[str, Tensor]) -> None:
        self._objective, self._leaves = objective, leaves
        self.gradient: dict[str, Tensor] = {}
        self.suspect: Batch | None = None
        self.is_own = False
        self._most = MOST_DEFECT
        self._here = {name: leaf.detach() for name, leaf in leaves.items()}
        self._along = equalised(self._here)
        self._scale = norm(self._here) or 1.0

    def look(self, chunk: Batch, loss: Tensor, tensors: Mapping[str, Tensor], u: float) -> None:
        """Compare them on a chunk.

        Args:
            chunk: the examples.
            loss: on them, with its graph.
            tensors: all parameters.
            u: unit round-off.
        """
        refuse_known_faults([loss])
        self.is_own = self.is_own or has_own_backward(loss)
        parts = differentiate(loss, self._leaves)
        add_to(self.gradient, parts)
        by_gradient, here = equalised(parts), self._here
        slope = sum(
            float((part * here[name]).sum()) * self._along.get(name, 0.0)
            + _norm(part) ** 2 * by_gradient.get(name, 0.0)
            for name, part in parts.items()
        )
        value = float(loss.detach())
        # The loss changes by some digits above round-off, and the parameters never by many.
        h = u**0.4 * self._scale
        if slope:
            h = min(h, 4 * u**0.5 * abs(value / slope))
        above, below = (
            self._value(chunk, tensors, parts, by_gradient, sign * h) for sign in (1, -1)
        )
        defect = slope_defect(value, above, below, h * slope, u)
        if defect > self._most:
            self._most, self.suspect = defect, chunk

    def _value(
        self,
        chunk: Batch,
        tensors: Mapping[str, Tensor],
        parts: Parts,
        factors: Mapping[str, float],
        t: float,
    ) -> float:
        """The loss on a chunk a step further; NaN where it cannot be evaluated."""
        theta = {name: x * (1 + t * self._along.get(name, 0.0)) for name, x in self._here.items()}
        for name, factor in factors.items():
            theta[name].add_(parts[name], alpha=t * factor)
        found = attempted(lambda: self._objective.evaluate(chunk, {**tensors, **theta})[0].detach())
        return math.nan if isinstance(found, Exception) else float(found)


def coarser(dtype: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    """The less precise dtype."""
    if dtype is None or torch.finfo(other).eps > torch.finfo(dtype).eps:
        return other
    return dtype


class Coarsest(TorchFunctionMode):
    """Notes the coarsest dtype of what is computed from parameters, and hooks on gradients.

    Attributes:
        found: that dtype; None where nothing is.
        has_hooks: whether a hook was set on a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: torch.dtype | None = None
        self.has_hooks = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        self.has_hooks = self.has_hooks or func is Tensor.register_hook
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

    def look(rows: range) -> Look:
        """The loss on some rows."""
        part = pair.rows(rows)
        weight = objective.loss.batch_weight(part.args[0], part.targets, len(rows))
        value = float(loss(part.args[0], part.targets).detach()) if weight else 0.0
        return Look(batch, value, weight)

    cut = max(1, n // 3)
    looks = attempted(lambda: [look(range(cut)), look(range(cut, n))])
    if isinstance(looks, Exception):  # of fewer examples, such as a mask of fixed length
        return "unknown"
    tolerance = 1e3 * torch.finfo(whole.dtype).eps
    return _combination(objective, float(whole.detach()), looks, tolerance, rules)


def _select(dim: int, rows: Tensor, tensor: Tensor) -> Tensor:
    """Some rows of a tensor along a dimension; a scalar belongs to every part."""
    return tensor.index_select(dim, rows.to(tensor.device)) if tensor.ndim else tensor


def _combination(
    objective: Objective,
    whole: float,
    parts: Sequence[Look],
    tolerance: float,
    rules: Sequence[Rule] | None = None,
) -> Rule:
    """Whether the loss on the whole is the weighted mean or the sum of those on parts."""
    counted = [part for part in parts if part.weight]
    if not counted:
        return "unknown"
    if rules is None:
        rules = ["mean", "sum"] if objective.source == "assumed" else [objective.loss.reduction]
    total = sum(part.weight for part in counted)
    for rule in rules:
        shares = [part.weight / total if rule == "mean" else 1.0 for part in counted]
        terms = [share * part.value for share, part in zip(shares, counted, strict=True)]
        size = max(abs(whole), sum(map(abs, terms)))
        if abs(sum(terms) - whole) <= tolerance * size:
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
