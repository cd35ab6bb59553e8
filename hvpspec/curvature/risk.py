"""The empirical risk: a network's loss over data as a function of selected parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hvpspec.curvature.batches import Batch, ChunkedData, is_nested, tensors_in
from hvpspec.curvature.combining import refuse_dependence, refuse_other_than_mean
from hvpspec.curvature.graph import parameter_marks, refuse_own_parameters
from hvpspec.curvature.isolation import (
    check_mode,
    differentiable_forward,
    evaluation_mode,
    random_states,
)
from hvpspec.curvature.losses import Loss, as_loss
from hvpspec.curvature.parameters import ParameterSpace, Selector, places, select_parameters
from hvpspec.curvature.reference import Reference, raise_changed
from hvpspec.curvature.sharding import is_shard, refuse_other_networks, unmanaged, whole
from hvpspec.curvature.structure import (
    FlatDirections,
    affine_together,
    ignores_shifts,
    is_convex,
    last_weight,
)
from hvpspec.errors import InputError, NonFiniteError
from hvpspec.linalg.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Term:
    """One chunk's share of the risk, with the graph that leads to it.

    Attributes:
        value: scalar; the terms of a pass add up to the risk (without the l2 term).
        outputs: what the model returned.
        targets: what the loss compared it with.
        loss: the loss with its tensors in the operator's dtype.
        share: what the loss on the chunk is multiplied by.
        num_examples: how many there are in the chunk.
    """

    value: Tensor
    outputs: Any
    targets: Any
    loss: Loss
    share: float
    num_examples: int

    @property
    def convex(self) -> bool:
        """Whether the loss is certainly convex in the outputs."""
        return self.loss.convex or is_convex(self.loss.function, self.outputs, self.targets)

    def flat_directions(
        self, leaves: Mapping[str, Tensor], candidates: Iterable[str]
    ) -> FlatDirections:
        """Where the Hessian is certainly a Gauss-Newton matrix, if the loss is convex.

        Args:
            leaves: tensors that the term was computed from, by name.
            candidates: names of those to look at.
        """
        if not is_nested(self.outputs):  # tensors in an object are not seen
            return FlatDirections(())
        among = {name: leaves[name] for name in candidates}
        parameters = affine_together(tensors_in(self.outputs), among)
        shifted = last_weight(self.outputs, leaves) if ignores_shifts(self.loss.function) else None
        return FlatDirections(parameters, None if shifted in parameters else shifted)

    def value_at(self, outputs: Any) -> Tensor:
        """The value for other outputs."""
        return self.loss.evaluate(outputs, self.targets) * self.share


@dataclass(frozen=True)
class _Chunk:
    """The loss on one chunk, before it is weighed."""

    weight: float
    loss: Tensor
    outputs: Any


class EmpiricalRisk:
    """The loss over data as a function of the selected parameters theta.

    ``sum_b w_b L_b(theta) / sum_b w_b`` over chunks b, or ``sum_b L_b(theta)`` where the loss sums.

    Args:
        model: the network, which is only read.
        loss: see :func:`hvpspec.curvature.losses.as_loss`.
        data: see :class:`hvpspec.curvature.batches.ChunkedData`.
        params: see :func:`hvpspec.curvature.parameters.select_parameters`.
        chunk_size: the most examples in one graph.
        dtype: to compute in; None for the dtype of the parameters.
        ranks: the processes over whose data the sum goes.

    Attributes:
        longest: the most examples in a chunk, as far as was seen.

    Raises:
        InputError: any of them cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | nn.Module | Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Selector | Iterable[Selector] | None,
        chunk_size: int | None,
        dtype: torch.dtype | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self._given, model = model, unmanaged(model)
        self.space: ParameterSpace = select_parameters(model, params)
        self.model = model
        self.notes = check_mode(model)
        parameters = dict(model.named_parameters())
        selected = [parameters[name] for name in self.space.names]
        for what, kinds in (
            ("dtypes", {str(p.dtype) for p in selected}),
            ("devices", {str(p.device) for p in selected}),
        ):
            if len(kinds) > 1:
                raise InputError(
                    f"the selected parameters have different {what} ({', '.join(sorted(kinds))}); "
                    "convert the model with .to() or select fewer with params=..."
                )
        self.native_dtype = selected[0].dtype
        self.dtype = self.native_dtype if dtype is None else dtype
        self.device = selected[0].device
        if self.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"second derivatives need float32 or float64, got {self.dtype}; pass "
                f"dtype=torch.float32"
            )
        given, self._loss_is_assumed = as_loss(loss)
        self.loss = given.to(self.device, self.dtype)
        self.data = ChunkedData(data, device=self.device, dtype=self.dtype, chunk_size=chunk_size)
        # Once and for all: on which pass a process multiplies in another way is its own affair.
        self._gathered = {
            id(t): whole(t.detach()) for t in (*model.parameters(), *model.buffers()) if is_shard(t)
        }
        self._places = places(model)
        self.longest = 0
        self._num_passes = 0
        self._writes_inputs: bool | None = None
        self._reference: Reference | None = None

    @property
    def reference(self) -> Reference:
        """The first pass over the data, made when it is first asked for."""
        if self._reference is None:
            self._reference = self._measure()
        return self._reference

    @property
    def num_chunks(self) -> int:
        """Number of chunks in a pass."""
        return len(self.reference.losses)

    def rechunk(self, chunk_size: int | None) -> None:
        """Cut the data into chunks of another size from now on; None for one that is chosen.

        Raises:
            Exception: what the model makes of chunks of that size; the former is kept.
            DataChangedError: they do not add up to the same risk; so it is then.
        """
        former, reference, longest = self.data.chunk_size, self._reference, self.longest
        if chunk_size == former:
            return
        self.longest = 0
        if reference is None:
            self.data.chunk_size = chunk_size
            return
        try:
            self._rechunk(chunk_size)
        except Exception:
            self.data.chunk_size, self._reference, self.longest = former, reference, longest
            raise

    def _rechunk(self, chunk_size: int | None) -> None:
        """Cut the data anew, and compare the risk with that of before."""
        before, size = self._own_value(), self.reference.mass
        self.data.chunk_size = chunk_size
        # The total stays, and other processes need not cut theirs at the same time.
        self._reference = self._measure(self.reference.total)
        after = self._own_value()
        tolerance = 1e3 * torch.finfo(self.reference.dtype).eps * max(size, self.reference.mass)
        if abs(after - before) > tolerance:
            raise_changed(f"loss {after:.6g}, before {before:.6g}")

    def check_parameters(self) -> None:
        """Raise DataChangedError if parameters or buffers are not those of the first pass."""
        if parameter_marks(self._given) != self.reference.marks:
            raise_changed("the parameters are others")

    def value(self) -> float:
        """The risk."""
        return self.ranks.sum(self._own_value())

    def _own_value(self) -> float:
        """The share of the risk that the data of this process have."""
        self.check_parameters()
        return self.reference.value

    def leaves(self) -> dict[str, Tensor]:
        """The selected parameters in the risk's dtype, detached, to differentiate by."""
        parameters = dict(self.model.named_parameters())
        with torch.inference_mode(False):
            return {
                # A copy: what the model writes into a parameter must not reach the caller's.
                name: self._constant(parameters[name]).requires_grad_()
                for name in self.space.names
            }

    @contextmanager
    def terms(self, leaves: Mapping[str, Tensor]) -> Iterator[Iterator[Term]]:
        """Make one pass over the data, as an iterator over each chunk's share of the risk.

        It holds while the pass lasts: the model is in evaluation mode, random states are set aside,
        and gradients are on, for the forward passes and for whatever is done with a term.

        Args:
            leaves: what the selected parameters are replaced by.

        Raises:
            DataChangedError: a chunk's loss is not what it was on the first pass.
        """
        with self.chunks() as chunks:
            parameters = self.parameters(leaves)
            terms = (self.term(k, batch, parameters) for k, batch in chunks)
            yield (term for term in terms if term is not None)

    @contextmanager
    def chunks(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """Make one pass over the data alone, on the stage that :meth:`terms` sets.

        Raises:
            DataChangedError: there are more or fewer chunks than on the first pass.
        """
        self.check_parameters()
        with self._stage():
            yield self._counted(self.num_chunks)

    def term(self, k: int, batch: Batch, parameters: Mapping[str, Tensor]) -> Term | None:
        """Evaluate the share of chunk ``k``; None if it counts nothing.

        Args:
            k: number of the chunk in a pass.
            batch: its examples.
            parameters: all of the model's, selected or not.

        Raises:
            DataChangedError: the loss is not what it was on the first pass.
        """
        chunk = self._evaluate(batch, parameters)
        self.reference.compare(k, chunk.weight, float(chunk.loss.detach()))
        if chunk.weight == 0:
            return None
        share = self.share(k)
        return Term(chunk.loss * share, chunk.outputs, batch.targets, self.loss, share, len(batch))

    def share(self, k: int) -> float:
        """What the loss on chunk ``k`` is multiplied by in the risk."""
        return self.reference.share(k)

    def check(self, k: int, loss: float) -> None:
        """Raise DataChangedError unless the loss on chunk ``k`` is that of the first pass."""
        self.reference.compare(k, self.reference.weights[k], loss)

    @contextmanager
    def _stage(self) -> Iterator[None]:
        """Set the stage for one pass over the data, and tidy up after it whatever happens."""
        self._num_passes += 1
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(random_states(self._num_passes, self.device, self.data.sources))
            stack.enter_context(differentiable_forward(self.model, self.device))
            yield

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

    def _evaluate(self, batch: Batch, parameters: Mapping[str, Tensor]) -> _Chunk:
        """Evaluate the loss on one chunk."""
        safe = batch
        if self._writes_inputs is not False:  # a copy until it is known to be needless
            safe = batch.map(torch.clone)
        outputs = self.outputs(parameters, safe)
        if self._writes_inputs is None:
            self._writes_inputs = any(tensor._version for tensor in safe.leaves)
        weight = self.loss.batch_weight(outputs, batch.targets)
        return _Chunk(weight, self.loss.evaluate(outputs, batch.targets), outputs)

    def parameters(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters: ``leaves``, and copies of the others in the risk's dtype."""
        constants = {
            name: self._constant(p)
            for name, p in self.model.named_parameters()
            if name not in leaves
        }
        return {**constants, **leaves}

    def outputs(self, parameters: Mapping[str, Tensor], batch: Batch) -> Any:
        """What the model returns for a chunk with the given parameters."""
        # Copies: a module that counts its calls, say, must not write into the caller's buffers.
        buffers = {name: self._constant(b) for name, b in self.model.named_buffers()}
        tensors = {**parameters, **buffers}
        placed = {place: tensors[name] for place, name in self._places.items()}
        outputs = functional_call(
            self.model, placed, batch.args, dict(batch.kwargs), tie_weights=False
        )
        return getattr(outputs, "logits", outputs)

    def _constant(self, tensor: Tensor) -> Tensor:
        """A copy of a parameter or buffer, whole and in the risk's dtype."""
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return self._gathered.get(id(tensor), tensor.detach()).to(dtype, copy=True)

    def _measure(self, total: float | None = None) -> Reference:
        """Make the first pass: note the weight and loss of each chunk, and their total if new."""
        marks = parameter_marks(self._given)
        with self.ranks.together() if total is None else nullcontext():
            weights, losses, dtype = self._losses()
        if total is None:
            refuse_other_networks(self._given, marks, self.ranks)
            total = self.ranks.sum(sum(weights)) if self.loss.reduction == "mean" else 1.0
        if total == 0:
            raise InputError("every target is ignored by the loss: there is nothing to average")
        return Reference(weights, losses, dtype, marks, total)

    def _losses(self) -> tuple[list[float], list[float], torch.dtype]:
        """The weight and loss of each chunk, and the dtype of the loss, on a first pass."""
        weights: list[float] = []
        losses: list[float] = []
        dtype = self.dtype
        parameters = self.parameters(self.leaves())
        with self._stage():
            for k, batch in enumerate(self.data):
                self.longest = max(self.longest, len(batch))
                chunk = self._evaluate(batch, parameters)
                # Where every target is ignored, PyTorch's mean is 0/0; the chunk counts nothing.
                value = float(chunk.loss.detach()) if chunk.weight else 0.0
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"the loss is {value} on chunk {k} of the data (counting from 0); check "
                        "the inputs, the targets and the weights for NaN and overflow"
                    )
                if not (math.isfinite(chunk.weight) and chunk.weight >= 0):
                    raise InputError(
                        f"chunk {k} (counting from 0) weighs {chunk.weight} in the mean; "
                        "the weight of a loss must be a finite number of at least 0"
                    )
                if k == 0:
                    refuse_own_parameters(chunk.loss, self.model)
                if k == 1:
                    forward = partial(self.outputs, parameters)
                    refuse_dependence(forward, batch, chunk.outputs)
                if self._loss_is_assumed:
                    refuse_other_than_mean(
                        self.loss.evaluate, chunk.loss, chunk.outputs, batch.targets, len(batch)
                    )
                weights.append(chunk.weight)
                losses.append(value)
                dtype = chunk.loss.dtype
        return weights, losses, dtype
