"""The objective: a network's loss over data as a function of selected parameters, at any point."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from hvpspec.curvature.data import Batch, Data, Reader, matching, tensors_in
from hvpspec.curvature.graph import HANDED, differentiate
from hvpspec.curvature.guard import Guard, check_mode, usable, uses_batch_statistics
from hvpspec.curvature.losses import Loss, as_loss
from hvpspec.curvature.parameters import (
    ParameterSpace,
    Selector,
    Slot,
    add_parts_,
    as_real,
    places,
    select_parameters,
)
from hvpspec.curvature.record import Record, raise_changed, raise_not_finite
from hvpspec.curvature.sharding import is_shard, whole
from hvpspec.curvature.stage import as_found, generators_of, is_compiled, stage
from hvpspec.errors import (
    ComputationError,
    HvpspecError,
    InputError,
    first_line,
)
from hvpspec.linalg.memory import is_out_of_memory
from hvpspec.linalg.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

    from hvpspec.curvature.operator import HessianOperator

T = TypeVar("T")

#: Which function a network is: that of its evaluation mode, or of the modes its modules are in.
Mode = Literal["eval", "as given"]


@dataclass(frozen=True)
class Term:
    """One chunk's share of an objective, with the graph that leads to it.

    Attributes:
        value: scalar; the terms of a pass add up to the objective (without the l2 term).
        outputs: what the model returned, as the loss took it.
        targets: what the loss compared it with.
        loss: of outputs and targets.
        share: what the loss on the chunk is multiplied by.
        num_examples: how many there are in the chunk.
    """

    value: Tensor
    outputs: Any
    targets: Any
    loss: Callable[[Any, Any], Tensor]
    share: float
    num_examples: int

    def value_at(self, outputs: Any) -> Tensor:
        """The value for other outputs."""
        return self.loss(outputs, self.targets) * self.share


class Objective:
    """``f(theta) = L(theta) + l2 ||theta||^2``, which can be evaluated at any point.

    ``L`` is ``sum_b w_b L_b(theta) / sum_b w_b`` over the batches b of the data, or
    ``sum_b L_b(theta)`` where the loss sums. Before the first answer it is checked that this holds
    for parts of the batches, and that derivatives are what they should be; see
    :class:`hvpspec.curvature.guard.Guard`.

    Arguments are those of :class:`hvpspec.HessianOperator`.

    Attributes:
        space: names, shapes and order of the selected parameters in a vector.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.

    Example:
        >>> f = Objective(nn.Linear(1, 1, bias=False), nn.MSELoss(), (torch.ones(2, 1),) * 2)
        >>> f.value(torch.tensor([3.0])), f.gradient(torch.tensor([3.0]))
        (4.0, tensor([4.]))
        >>> f.hessian(torch.tensor([3.0])).to_dense()
        tensor([[2.]])
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
        mode: Mode = "eval",
        pseudo_gradient: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        if not (math.isfinite(l2) and l2 >= 0):
            raise InputError(f"l2 must be a finite number of at least 0, got {l2}")
        if mode not in get_args(Mode):
            raise InputError(f"mode must be 'eval' or 'as given', got {mode!r}")
        if params is not None and not isinstance(params, Selector):
            params = list(params)
        self.arguments = (model, loss, data)
        self.options: dict[str, Any] = {
            "params": params,
            "l2": float(l2),
            "chunk_size": chunk_size,
            "dtype": dtype,
            "mode": mode,
            "pseudo_gradient": pseudo_gradient,
            "group": group,
        }
        self.l2, self.mode, self.pseudo_gradient = float(l2), mode, pseudo_gradient
        self.ranks = Ranks(group)
        self.given, self.model = model, usable(model)
        given_loss, self.source = as_loss(loss)
        self._name_loss_parameters(given_loss)
        own = {n: p for n, p in self.loss_parameters().items() if n.startswith(_OF_THE_LOSS)}
        self.space: ParameterSpace = select_parameters(self.model, params, own)
        self.mode_notes = check_mode(self.model, mode)
        self.is_coupled = mode == "as given" and uses_batch_statistics(self.model)
        selected = [self.parameters()[name] for name in self.space.names]
        for what, kinds in (
            ("dtypes", {str(as_real(p).dtype) for p in selected}),
            ("devices", {str(p.device) for p in selected}),
        ):
            if len(kinds) > 1:
                raise InputError(
                    f"the selected parameters have different {what} ({', '.join(sorted(kinds))}); "
                    "convert the model with .to() or select fewer with params=..."
                )
        self.native_dtype = as_real(selected[0]).dtype
        self.dtype = self.native_dtype if dtype is None else dtype
        self.device = selected[0].device
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"second derivatives need float32 or float64, got {self.dtype}; pass "
                f"dtype=torch.float32"
            )
        self.loss = given_loss
        self.data = Data(
            data,
            Reader(self.model),
            device=self.device,
            dtype=self.dtype,
            chunk_size=chunk_size,
        )
        # Once and for all: on which pass a process multiplies in another way is its own affair.
        tensors = (*self.parameters().values(), *self.model.buffers())
        self._gathered = {id(t): whole(t.detach()) for t in tensors if is_shard(t)}
        self._places = places(self.model)
        function = self.loss.function
        losses = function.modules() if isinstance(function, nn.Module) else ()
        self.modules: list[nn.Module] = [*self.model.modules(), *losses]
        #: The modes as they were given, by which "as given" is known while a pass is under way.
        self.training = {id(module): module.training for module in self.modules}
        self.is_recurrent = any(isinstance(module, nn.RNNBase) for module in self.modules)
        self.is_compiled = is_compiled([*model.modules(), *losses])
        self.is_sharded = bool(self._gathered)
        self.generators = generators_of(self.device, self.data.sources)
        self._writes_inputs: bool | None = None
        self.spoils_outputs = False  # whether the loss writes into them
        self.guard = Guard()

    def _name_loss_parameters(self, loss: Loss) -> None:
        """Name the tensors of a loss that is a module; its parameters may be the model's, too."""
        self._loss_slots: list[Slot] = []
        self._loss_parameters: dict[str, tuple[dict[str, Any], str]] = {}
        if not isinstance(loss.function, nn.Module):
            return
        of_the_model = {id(p): name for name, p in self.model.named_parameters()}
        for fields, key, own in places(loss.function):
            name = of_the_model.get(id(fields[key]), _OF_THE_LOSS + own)
            self._loss_slots.append((fields, key, name))
            if isinstance(fields[key], nn.Parameter):
                self._loss_parameters[name] = fields, key

    def loss_parameters(self) -> dict[str, Tensor]:
        """The parameters of the loss, by the names they have in the space."""
        return {name: fields[key] for name, (fields, key) in self._loss_parameters.items()}

    def parameters(self) -> dict[str, Tensor]:
        """All parameters, selected or not, by name."""
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        return {**self.loss_parameters(), **own} if self._loss_parameters else own

    @property
    def was_training(self) -> bool:
        """Whether a module of the network was given in training mode."""
        return any(self.training.get(id(module)) for module in self.model.modules())

    def of_the_model(self, names: Iterable[str]) -> list[str]:
        """Those of some parameters that belong to the network, not to the loss alone."""
        return [name for name in names if not name.startswith(_OF_THE_LOSS)]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result should know about how it was computed."""
        notes = [*self.mode_notes, *self.guard.notes]
        if self.dtype != self.native_dtype:
            notes.append(f"computed in {self.dtype} from parameters in {self.native_dtype}")
        inside = self.coarsest
        if torch.finfo(inside).eps > torch.finfo(self.dtype).eps:
            notes.append(
                f"the network casts to {inside} by itself, and the noise floor is that of {inside}"
            )
        counted = [name for name in self.space.names if name.startswith(_OF_THE_LOSS)]
        if counted:
            notes.append(f"parameters of the loss are counted: {', '.join(counted)}")
        dtypes = {as_real(p).dtype for p in self.parameters().values() if p.is_floating_point()}
        for other in sorted(map(str, dtypes - {self.native_dtype, self.dtype})):
            notes.append(f"parameters in {other} are computed with in {self.dtype}")
        if self.data.reader.takes_targets_from_inputs:
            notes.append("the inputs are the targets: no others are given")
        return tuple(dict.fromkeys(notes))

    @property
    def coarsest(self) -> torch.dtype:
        """The coarsest dtype in which something is computed that depends on parameters."""
        natively = self.dtype == self.native_dtype
        inside = self.guard.inside_natively if natively else self.guard.inside
        return inside or self.dtype

    def value(self, theta: Tensor | None = None) -> float:
        """``f`` at a point.

        Args:
            theta: shape (n,); None for the present parameters.

        Raises:
            HvpspecError: see :class:`hvpspec.HessianOperator`.
        """
        return self.at(theta).objective_value()

    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """The gradient of ``f`` at a point, shape (n,).

        Args:
            theta: shape (n,); None for the present parameters.

        Raises:
            HvpspecError: see :class:`hvpspec.HessianOperator`.
        """
        return self.at(theta).gradient()[0]

    def hessian(self, theta: Tensor | None = None) -> HessianOperator:
        """The Hessian of ``f`` at a point.

        Args:
            theta: shape (n,); None for the present parameters.
        """
        from hvpspec.curvature.operator import HessianOperator

        return HessianOperator.of(self, theta)

    def at(self, theta: Tensor | None = None) -> Point:
        """The objective at one point."""
        return Point(self, theta)

    def changed(self, **options: Any) -> Self:
        """The same function of other parameters or in another dtype.

        What was checked holds on, unless parameters come in that were left aside.
        """
        other = type(self)(*self.arguments, **{**self.options, **options})
        if set(other.space.names) <= set(self.space.names) and not self.guard.has_faults:
            other.guard = self.guard
        other.training = self.training
        for name in ("whole", "chunk_size", "num_outputs"):
            setattr(other.data, name, getattr(self.data, name))
        return other

    def in_float64(self) -> Self:
        """The same function with parameters, buffers and data converted to float64.

        It is this one where it computes in float64 already, or the network cannot.
        """
        if self.dtype == torch.float64:
            return self
        self.guard.record(self)
        return self if self.guard.float64_fails else self.changed(dtype=torch.float64)

    def leaves(self, theta: Tensor | Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The selected parameters in the objective's dtype, detached, to differentiate by.

        Args:
            theta: the point, shape (n,) or in parts; None for the present parameters.
        """
        with torch.inference_mode(False):
            if theta is None:
                parameters = self.parameters()
                copies = self._copies({name: parameters[name] for name in self.space.names})
                leaves = {name: as_real(copy) for name, copy in copies.items()}
            else:
                parts = self.space.unflatten(theta) if isinstance(theta, Tensor) else theta
                leaves = {
                    name: part.detach().to(self.device, self.dtype, copy=True)
                    for name, part in parts.items()
                }
            for leaf in leaves.values():
                leaf.requires_grad_()
        HANDED.update(dict.fromkeys(leaves.values()))
        return leaves

    def tensors(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters: ``leaves``, and copies of the others in the objective's dtype."""
        others = {name: p for name, p in self.parameters().items() if name not in leaves}
        return {**self._copies(others), **leaves}

    def outputs(self, tensors: Mapping[str, Tensor], batch: Batch) -> Any:
        """What the loss takes of what the model returns for some examples.

        Args:
            tensors: all parameters, selected or not.
            batch: the examples.
        """
        # Copies: a module that counts its calls, say, must not write into the caller's buffers.
        buffers = self._copies(dict(self.model.named_buffers()))
        with self.placed({**tensors, **buffers}):
            outputs = self.model(*batch.args, **batch.kwargs)
        # PyTorch's losses take a tensor; others may want all that the model tells.
        return getattr(outputs, "logits", outputs) if self.source == "known" else outputs

    @contextmanager
    def placed(
        self, tensors: Mapping[str, Tensor], slots: Iterable[Slot] | None = None
    ) -> Iterator[None]:
        """Put tensors in the place of parameters and buffers, for a while.

        A module that stands at several places of the model has each of its tensors in one:
        `torch.func.functional_call` puts one there twice, and then leaves it in the model.

        Args:
            tensors: by name; complex ones may come as pairs of real numbers.
            slots: where; None for the model's.
        """
        placed: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for fields, key, name in self._places if slots is None else slots:
                tensor = tensors.get(name)
                before = fields[key]
                if tensor is not None:
                    placed.append((fields, key, before))
                    is_pair = before.is_complex() and not tensor.is_complex()
                    fields[key] = torch.view_as_complex(tensor) if is_pair else tensor
            yield
        finally:
            for fields, key, before in reversed(placed):
                fields[key] = before

    def loss_of(self, tensors: Mapping[str, Tensor]) -> Callable[[Any, Any], Tensor]:
        """The loss as a function of outputs and targets, at given parameters."""
        if not self._loss_slots:
            return self.loss.evaluate

        def loss(outputs: Any, targets: Any) -> Tensor:
            """Evaluate it, with its tensors (class weights, say) converted."""
            slots = self._loss_slots
            buffers = {name: fields[key] for fields, key, name in slots if name not in tensors}
            with self.placed({**tensors, **self._copies(buffers)}, slots):
                return self.loss.evaluate(outputs, targets)

        return loss

    def evaluate(self, batch: Batch, tensors: Mapping[str, Tensor]) -> tuple[Tensor, float, Any]:
        """The loss on some examples, what it weighs, and the outputs.

        Args:
            batch: the examples.
            tensors: all parameters, selected or not.
        """
        safe = batch
        if self._writes_inputs is not False:  # a copy until it is known to be needless
            safe = batch.map(torch.clone)
        with as_found(self.modules):
            outputs = self.outputs(tensors, safe)
            versions = self._versions(outputs)
            num_examples = batch.length(self.guard.dim)
            weight = self.loss.batch_weight(outputs, safe.targets, num_examples)
            loss = self.loss_of(tensors)(outputs, safe.targets)
        self.spoils_outputs = versions != self._versions(outputs)
        if self._writes_inputs is None:
            self._writes_inputs = any(t._version or t.requires_grad for t in safe.leaves)
        return loss, weight, outputs

    def _versions(self, outputs: Any) -> list[int]:
        """By which it is seen whether a loss of one's own writes into the outputs."""
        known = self.source == "known"
        return [] if known else [tensor._version for tensor in tensors_in(outputs)]

    def _copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of parameters or buffers, whole and in the objective's dtype.

        What the model writes into them must not reach the caller's.
        """
        copies = {}
        for name, tensor in tensors.items():
            own = self._gathered.get(id(tensor)) if self._gathered else None
            own = tensor.detach() if own is None else own
            dtype = self.dtype if tensor.is_floating_point() else matching(tensor.dtype, self.dtype)
            copies[name] = own.to(dtype, copy=True)
        return copies


#: What the names of a loss's own parameters begin with.
_OF_THE_LOSS = "loss."


class Point:
    """An objective at one point, where every pass over the data must find the same losses.

    Args:
        objective: the function.
        theta: where, shape (n,); None for the present parameters.

    Attributes:
        space: the objective's, as are ``data``, ``ranks``, ``dtype`` and ``device``.
        is_checked: whether products were compared with differences at this point.

    Raises:
        InputError: the point has another shape.
    """

    def __init__(self, objective: Objective, theta: Tensor | None = None) -> None:
        n = objective.space.dim
        if theta is not None and tuple(theta.shape) != (n,):
            raise InputError(f"theta must have shape ({n},), got {tuple(theta.shape)}")
        self.objective, self.theta = objective, theta
        self.space, self.data, self.ranks = objective.space, objective.data, objective.ranks
        self.dtype, self.device = objective.dtype, objective.device
        self._record: Record | None = None
        self.is_checked = False
        self._num_passes = 0

    def ready(self) -> Record:
        """See that all holds that an answer stands on, before a pass.

        Returns:
            What the first pass found for chunks of the present size.
        """
        record = self.objective.guard.record(self.objective)
        if record is not self._record:
            self._record = record
            unknown = [math.nan] * len(record.weights)
            if self.theta is not None:
                self._losses = unknown
            else:  # of which several operators may know
                self._losses = record.losses.setdefault(self.dtype, unknown)
        return record

    @property
    def record(self) -> Record:
        """What the first pass found for chunks of the present size."""
        return self.ready() if self._record is None else self._record

    @property
    def num_chunks(self) -> int:
        """Number of chunks in a pass."""
        return len(self.record.weights)

    @property
    def unit_roundoff(self) -> float:
        """The unit round-off of the coarsest dtype in which something is computed."""
        self.ready()
        return max(torch.finfo(d).eps / 2 for d in (self.dtype, self.objective.coarsest))

    @property
    def scale(self) -> float:
        """The size of a loss, against which a change is judged."""
        return max((abs(x) for x in self._losses if not math.isnan(x)), default=0.0)

    def leaves(self) -> dict[str, Tensor]:
        """The selected parameters at the point, detached, to differentiate by."""
        return self.objective.leaves(self.theta)

    def require_products(self) -> None:
        """Raise NotDifferentiableError where products are not the derivative of the gradient."""
        self.ready()
        guard = self.objective.guard
        guard.require_products()
        if self.theta is not None and not self.is_checked:
            guard.check_at(self.objective, self.theta)
            self.is_checked = True

    def check_parameters(self) -> None:
        """Raise DataChangedError if parameters or buffers are not those that were checked."""
        moved = () if self.theta is None else self.space.names
        self.record.compare_marks(self.objective, moved)

    def value(self) -> float:
        """The loss over the data, without the l2 term."""
        self.ready()
        self.check_parameters()
        if any(map(math.isnan, self._losses)):
            with self.terms(self.leaves()) as terms:
                for _ in terms:
                    pass
        return self.ranks.sum(self.record.combine(self._losses))

    def objective_value(self) -> float:
        """``f``, with the l2 term."""
        theta = self.space.flatten(self.leaves()).detach().double()
        return self.within_memory(self.value) + self.objective.l2 * float(theta @ theta)

    def gradient(self) -> tuple[Tensor, set[str]]:
        """The gradient of ``f``, shape (n,), and the parameters with a path to the loss."""
        leaves = self.leaves()
        with torch.inference_mode(False):
            theta = self.space.flatten(leaves).detach()

        def share() -> tuple[Tensor, set[str]]:
            """What the data of this process contribute, and the parameters that they reach."""
            with torch.inference_mode(False):
                gradient = torch.zeros_like(theta)
            reached: set[str] = set()
            with self.terms(leaves) as terms:
                for term in terms:
                    parts = differentiate(term.value, leaves)
                    reached |= parts.keys()
                    add_parts_(gradient, self.space, parts)
            return gradient, reached

        self.within_memory(self.ready)
        self.objective.guard.require_gradient()
        gradient, reached = self.within_memory(share)
        return self.ranks.sum_(gradient).add_(theta, alpha=2 * self.objective.l2), reached

    @contextmanager
    def terms(self, leaves: Mapping[str, Tensor]) -> Iterator[Iterator[Term]]:
        """Make one pass over the data, as an iterator over each chunk's share of the objective.

        It holds while the pass lasts: the model is in the mode asked for, random states are set
        aside, and gradients are on, for the forward passes and for what is done with a term.

        Args:
            leaves: what the selected parameters are replaced by.

        Raises:
            DataChangedError: a chunk's loss is not what it was on the first pass.
        """
        with self.chunks() as chunks:
            tensors = self.objective.tensors(leaves)
            terms = (self.term(k, batch, tensors) for k, batch in chunks)
            yield (term for term in terms if term is not None)

    @contextmanager
    def chunks(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """Make one pass over the data alone, on the stage that :meth:`terms` sets.

        Raises:
            DataChangedError: there are more or fewer chunks than on the first pass.
        """
        self.ready()
        self.check_parameters()
        self._num_passes += 1
        with stage(self.objective, self._num_passes), self.placed():
            yield self._counted(len(self.record.weights))

    def placed(self) -> AbstractContextManager[None]:
        """Put the point's parameters into the model where they are not those it has.

        A part that is evaluated again in the backward pass, as checkpoints are, finds them there.
        """
        if self.theta is None and self.dtype == self.objective.native_dtype:
            return nullcontext()
        return self.objective.placed(self.objective.tensors(self.leaves()))

    def _counted(self, expected: int) -> Iterator[tuple[int, Batch]]:
        """Number the chunks, provided that there are as many as expected."""
        count = 0
        for k, batch in enumerate(self.data):
            count += 1
            if count > expected:
                raise_changed(f"{count} chunks or more, before {expected}")
            yield k, batch
        if count < expected:
            raise_changed(f"{count} chunks, before {expected}")

    def term(self, k: int, batch: Batch, tensors: Mapping[str, Tensor]) -> Term | None:
        """Evaluate the share of chunk ``k``; None if it counts nothing.

        Args:
            k: number of the chunk in a pass.
            batch: its examples.
            tensors: all parameters, selected or not.

        Raises:
            DataChangedError: the loss is not what it was on the first pass.
        """
        loss, weight, outputs = self.objective.evaluate(batch, tensors)
        record = self.record
        before = record.weights[k]
        if record.sums:
            weight = 1.0
        if weight != before:
            raise_changed(f"chunk {k} weighs {weight:g}, before {before:g}")
        if weight == 0:
            self._losses[k] = 0.0
            return None
        self.check(k, float(loss.detach()))
        share, function = self.share(k), self.objective.loss_of(tensors)
        return Term(loss * share, outputs, batch.targets, function, share, batch.num_examples)

    def share(self, k: int) -> float:
        """What the loss on chunk ``k`` is multiplied by in the objective."""
        return self.record.weights[k] / self.record.total

    def check(self, k: int, loss: float) -> None:
        """Raise DataChangedError unless the loss on chunk ``k`` is that of the first pass."""
        record, before = self.record, self._losses[k]
        if not record.weights[k]:
            return
        if math.isnan(before):
            if not math.isfinite(loss):
                raise_not_finite(loss, k)
            self._losses[k] = loss
            return
        # A repeated forward pass gives the same bits, except for the order of summation on GPUs.
        if loss != before:
            tolerance = 1e3 * torch.finfo(record.dtype).eps * self.scale
            if not abs(loss - before) <= tolerance:
                raise_changed(f"loss {loss:.6g} on chunk {k}, before {before:.6g}")

    def rechunk(self, chunk_size: int) -> None:
        """Cut the data into chunks of another size from now on.

        Raises:
            Exception: what the model makes of chunks of that size; the former is kept.
            DataChangedError: they do not add up to the same value; so it is then.
        """
        former = self.data.chunk_size
        if not self.objective.guard.has_checked:
            self.data.chunk_size = chunk_size
            return
        before = self.ready().combine(self._losses)
        try:
            self.data.chunk_size = chunk_size
            record = self.ready()
            after = record.combine(self._losses)
            tolerance = 1e3 * torch.finfo(record.dtype).eps * record.size(self._losses)
            if abs(after - before) > tolerance:
                raise_changed(f"loss {after:.6g}, before {before:.6g}")
        except Exception:
            self.data.chunk_size = former
            raise

    def within_memory(
        self, compute: Callable[[], T], forget: Callable[[], None] | None = None
    ) -> T:
        """Go over the data of this process, on smaller chunks if memory does not suffice.

        Args:
            compute: what is computed from all chunks, and again where it was too much.
            forget: lets go of what is kept from chunks of the size that was too much.

        Raises:
            ComputationError: memory does not suffice for a single example.
        """
        while True:
            try:
                return compute()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            if forget is not None:
                forget()
            self._halve_chunks(reason)  # when what the error held on to is free again

    def _halve_chunks(self, reason: str) -> None:
        """Go on with half of the examples in a chunk, and say so."""
        longest = self.objective.guard.longest
        while longest >= 2:
            smaller = math.ceil(longest / 2)
            warnings.warn(
                f"out of memory with {longest} examples in a chunk: going on with {smaller}",
                UserWarning,
                stacklevel=2,
            )
            try:
                self.rechunk(smaller)
                return
            except HvpspecError as error:
                raise ComputationError(
                    f"out of memory ({reason}), and the batch cannot be split ({error})"
                ) from error
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                longest, reason = smaller, first_line(error)
        raise ComputationError(
            f"out of memory {'on a single example' if longest else 'before the first example'} "
            f"({reason}); multiply fewer vectors at once, or select fewer parameters with "
            "params=..."
        )
