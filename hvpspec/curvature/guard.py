"""What must hold while an answer is computed: every reason for which hvpspec refuses is found here.

An answer stands on statements about the network, the loss and the data:

1. The loss over the data is the weighted mean, or the sum, of the losses over the parts.
2. The products are the derivative of the gradient, and the gradient is that of the loss.
3. The function is one and the same function on every pass.
4. It can be computed in float64, or else it is said in what it is computed.

:meth:`Guard.record` checks them when the first question is asked; :func:`stage` sets the stage for
every pass; :class:`Record` keeps by what a change is known.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hvpspec.curvature.data import Batch, is_nested, leaves_of, map_tensors, tensors_in
from hvpspec.curvature.derivatives import differentiate
from hvpspec.curvature.differences import compare
from hvpspec.curvature.graph import foreign_leaves, nodes
from hvpspec.curvature.parameters import add_parts_
from hvpspec.curvature.sharding import refuse_other_networks, reshard, shard, unmanaged
from hvpspec.errors import (
    DataChangedError,
    HvpspecError,
    InputError,
    NonFiniteError,
    NotDifferentiableError,
    first_line,
)
from hvpspec.linalg.memory import is_out_of_memory

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective

#: How a loss on several parts combines to that on the whole; "coupled": in no such way; "unknown":
#: the whole cannot be parted.
Rule = Literal["mean", "sum", "coupled", "unknown"]

# The fields that every module has, which a forward pass has no business to change.
_FIELDS = frozenset(vars(nn.Module()))

# ---------------------------------------------------------------------------------------------
# The network as it is given


def usable(model: nn.Module, *, pseudo_gradient: bool) -> nn.Module:
    """The model as it computes with parameters that are handed to it.

    Raises:
        InputError: it is no module whose parameters can be replaced and differentiated by.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    original = getattr(model, "_orig_mod", None)  # torch.compile
    model = original if isinstance(original, nn.Module) else model
    for name, module in model.named_modules():
        _refuse_kind(module, f"its module {name!r}" if name else "it", pseudo_gradient)
    for name, tensor in model.named_parameters():
        if nn.parameter.is_lazy(tensor):
            raise InputError(
                f"parameter {name!r} has no shape yet: call the model once on a batch, which "
                "initialises its lazy modules"
            )
        if tensor.is_meta:
            raise InputError(
                f"parameter {name!r} is on the device meta and has no numbers: load the weights, "
                "or build the model on a real device"
            )
    return unmanaged(model)


def _refuse_kind(module: nn.Module, where: str, pseudo_gradient: bool) -> None:
    """Raise InputError for kinds of modules that cannot be differentiated twice."""
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"the model cannot be differentiated twice while {where} is TorchScript: build the "
            "model in Python and load its state_dict()"
        )
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
        raise InputError(
            f"{where} is quantised ({type(module).__name__}), and has no derivatives; use the "
            "model before convert()"
        )
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return
    kind = type(module).__name__
    if module.sparse:
        raise InputError(
            f"{where} is {kind}(sparse=True), whose gradient cannot be differentiated; set "
            "sparse=False, which is the same function"
        )
    if module.scale_grad_by_freq and not pseudo_gradient:
        raise InputError(
            f"{where} is {kind}(scale_grad_by_freq=True), whose gradient is not the loss's; set "
            "scale_grad_by_freq=False"
        )


def check_mode(model: nn.Module, mode: str) -> tuple[str, ...]:
    """Refuse what makes examples depend on each other, and say what is set to evaluation mode.

    Returns:
        Notes for the reader of a result.

    Raises:
        InputError: a normalisation layer uses the statistics of the batch in evaluation mode.
    """
    if mode == "as given":
        training = any(module.training for module in model.modules())
        return ("modules are in the mode in which they were given",) if training else ()
    notes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            per_example = isinstance(module, nn.modules.instancenorm._InstanceNorm)
            if per_example and not module.track_running_stats:
                continue
            kind = f"{type(module).__name__} {name!r}"
            if module.training and not per_example:
                raise InputError(
                    f"{kind} is in train mode: the loss of an example would depend on its batch; "
                    "call model.eval() to use the running statistics, or pass mode='as given' with "
                    "all data in one batch"
                )
            if module.running_mean is None:
                raise InputError(
                    f"{kind} has no running statistics, so the loss of an example depends on its "
                    "batch; build it with track_running_stats=True, or pass mode='as given' with "
                    "all data in one batch"
                )
            notes.append("normalisation layers use their running statistics (evaluation mode)")
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            notes.append("dropout is off")
    return tuple(dict.fromkeys(notes))


# ---------------------------------------------------------------------------------------------
# The stage of a pass


@contextmanager
def stage(objective: Objective, seed: int) -> Iterator[None]:
    """Set the stage for a pass over the data, and leave everything as found, whatever happens.

    Every module is in the mode asked for and, after the pass, holds what it held before: a cache
    of something computed from parameters is then computed anew on each pass. Random states are
    seeded, with another seed on each pass: what is random in the model or the data differs from
    pass to pass and is found out, where a restored state would have repeated it. Gradients are on,
    and what makes a forward pass inexact or once-differentiable is off: autocast, the fused kernels
    of attention and cuDNN's of recurrent networks.

    Args:
        objective: whose model it is.
        seed: for this pass.
    """
    generators = objective.generators
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    default_dtype = torch.get_default_dtype()
    cache = parametrize._cache_enabled, parametrize._cache
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    for module in objective.modules:
        fields = vars(module)
        found.append((fields, fields.copy()))
        for name in fields.keys() - _FIELDS:  # lists, dicts and sets that may be written into
            if isinstance(fields[name], list | dict | set):
                contents.append((fields[name], copy.copy(fields[name])))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(objective.device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if objective.is_recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if objective.is_compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            parametrize._cache_enabled, parametrize._cache = 0, {}
            for fields, _ in found:
                if objective.mode == "eval":
                    fields["training"] = False
                if objective.dtype != objective.native_dtype:
                    _convert(fields, objective)
            if objective.dtype != objective.native_dtype == default_dtype:
                torch.set_default_dtype(objective.dtype)
            random.seed(seed)
            np.random.seed(seed)
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            torch.set_default_dtype(default_dtype)
            parametrize._cache_enabled, parametrize._cache = cache
            for fields, before in found:
                fields.clear()
                fields.update(before)
            for container, content in contents:
                _refill(container, content)


def _refill(container: Any, content: Any) -> None:
    """Give a list, dict or set the content that it had."""
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def _convert(fields: dict[str, Any], objective: Objective) -> None:
    """Convert tensors that a module keeps as plain attributes, as its parameters are converted."""

    def converted(tensor: Tensor) -> Tensor:
        own = tensor.dtype == objective.native_dtype and not tensor.requires_grad
        return tensor.to(objective.dtype) if own else tensor

    for name, value in fields.items():
        is_own = name not in _FIELDS and isinstance(value, Tensor | list | tuple | dict)
        if is_own and any(converted(t) is not t for t in tensors_in(value)):
            fields[name] = map_tensors(converted, value)


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules was given to torch.compile."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules)


def generators_of(device: torch.device, sources: Iterable[Any]) -> list[torch.Generator]:
    """Torch's own generators in use and those of data loaders, each once."""
    known = [torch.default_generator]
    if device.type == "cuda":
        known.append(torch.cuda.default_generators[device.index or 0])
    own = {
        id(generator): generator
        for source in sources
        for owner in (source, getattr(source, "sampler", None))
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    return [*known, *own.values()]


# ---------------------------------------------------------------------------------------------
# Data and weights that change


@dataclass
class Record:
    """What the first pass over the data found, with which all later ones must agree.

    Attributes:
        weights: of the chunks in the mean.
        total: what the sum over chunks is divided by.
        dtype: of the loss.
        marks: of the model's parameters and buffers, by which changes are known.
        sums: whether the loss is a sum, so that each chunk weighs 1.
        losses: on the chunks at the present parameters, by the dtype of the computation.
    """

    weights: list[float]
    total: float
    dtype: torch.dtype
    marks: dict[str, tuple[float, float]]
    sums: bool
    losses: dict[torch.dtype, list[float]] = field(default_factory=dict)

    def combine(self, losses: Sequence[float]) -> float:
        """What these chunks contribute to the loss over the data."""
        return sum(w * x for w, x in zip(self.weights, losses, strict=True)) / self.total

    def size(self, losses: Sequence[float]) -> float:
        """What they would contribute if nothing cancelled between them."""
        return self.combine([abs(x) for x in losses])

    def compare_marks(self, objective: Objective, moved: Iterable[str]) -> None:
        """Raise DataChangedError if parameters or buffers are others than when this was made.

        Args:
            objective: whose they are.
            moved: names of those that are replaced.
        """
        now = parameter_marks(objective)
        if now != self.marks:
            but = set(moved)
            if any(now.get(k) != v for k, v in self.marks.items() if k not in but):
                raise_changed("the parameters are others")


def parameter_marks(objective: Objective) -> dict[str, tuple[float, float]]:
    """Two numbers for each parameter and buffer, or shard of one, by which a change is known.

    A norm tells all changes but those of signs and places, and these are told by the sum with
    unequal weights.
    """
    if objective.is_sharded:
        reshard(objective.given)
    tensors = {**objective.parameters(), **dict(objective.given.named_buffers())}
    marks = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                x = shard(tensor) if objective.is_sharded else tensor
                x = (torch.view_as_real(x) if x.is_complex() else x).flatten()
                dtype = torch.promote_types(x.dtype, torch.float32)
                weights = torch.linspace(1, 2, len(x), dtype=dtype, device=x.device)
                wide = torch.promote_types(x.dtype, torch.float64)
                norm = torch.linalg.vector_norm(x, dtype=wide)
                marks[name] = float(norm), float(torch.dot(x.to(dtype), weights))
    return marks


def raise_changed(difference: str) -> NoReturn:
    """Say that two passes over the data differ."""
    raise DataChangedError(
        f"two passes over the data differ ({difference}): switch off shuffling, augmentation "
        "and randomness in the model, and make a new operator when weights change"
    )


# ---------------------------------------------------------------------------------------------
# What an autograd graph tells


def refuse_known_faults(ends: Iterable[Tensor]) -> None:
    """Raise where a graph holds a function whose derivatives are known to be missing or wrong.

    PyTorch puts an error node behind a function that was declared differentiable only once, but one
    that leads nowhere: asked for the derivative by given tensors it is never run, and its share
    would be missing without a word.
    """
    for node in nodes(ends):
        name = node.name().rpartition("::")[2]
        if name in ("Error", "DelayedError"):
            raise NotDifferentiableError(
                "the network contains a function marked once_differentiable, so that its second "
                "derivative does not exist; replace it by one PyTorch can differentiate twice"
            )
        if name.startswith("WeightNormInterface"):
            raise NotDifferentiableError(
                "PyTorch's second derivative of weight_norm is wrong; remove the parametrisation "
                "(torch.nn.utils.parametrize.remove_parametrizations) or write g * v / v.norm()"
            )
        if name.startswith("BinaryCrossEntropyBackward"):
            raise NotDifferentiableError(
                "PyTorch's second derivative of binary_cross_entropy is wrong where a sigmoid "
                "saturates; use binary_cross_entropy_with_logits on the logits"
            )
        if name == "CheckpointFunctionBackward":
            raise NotDifferentiableError(
                "a reentrant checkpoint hides parameters from torch.autograd.grad; pass "
                "use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        if getattr(node, "_saved_scale_grad_by_freq", False) is True:
            raise NotDifferentiableError(
                "an embedding scales its gradient by frequency, which is then not the loss's; "
                "leave out scale_grad_by_freq=True"
            )


def _refuse_own_parameters(loss: Tensor, objective: Objective) -> None:
    """Raise where a loss takes the model's parameters by itself.

    The operator differentiates by copies that it hands to the model; a penalty on the parameters in
    the loss function, or a cache filled before, holds the originals, which would be constants.
    """
    own = {id(p): name for name, p in objective.parameters().items()}
    for leaf in foreign_leaves(loss):
        if id(leaf) in own:
            raise InputError(
                f"the loss takes the parameter {own[id(leaf)]!r} by itself, not through the "
                "outputs; use l2= for a penalty, or compute it in the model's forward pass (and "
                "clear what the model keeps from an earlier pass)"
            )


# ---------------------------------------------------------------------------------------------
# The checks before the first answer

# Examples on which derivatives are checked: enough to see a fault, too few to cost much.
_FEW = 48
# Products that are further off are no derivatives; round-off in any part of a network is less.
_MOST_DEFECT = 1e-3
# A defect that differences are not exact enough to tell from none.
_LEAST_DEFECT = 1e-6
# That many parameters times examples take no time worth saving.
_CHEAP = 2**20


@dataclass(frozen=True)
class _Look:
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


class Guard:
    """Checks an objective before the first answer, and remembers what it found.

    It is shared by an objective and those made from it, in float64 or with fewer parameters.

    Attributes:
        notes: what a reader of a result should know.
        float64_fails: why the function cannot be computed in float64; empty if it can.
        inside: the coarsest dtype in which something is computed that depends on parameters.
        defect: how far products are from the derivative of the gradient, relative to them, beyond
            what the comparison itself is off.
        is_verified: whether the products are known to be the derivative of the loss's gradient.
        longest: the most examples in a chunk, as far as was seen.
        dim: the dimension along which the examples lie, 1 for sequences with time first.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.float64_fails = ""
        self.inside: torch.dtype | None = None
        self.defect = 0.0
        self.is_verified = False
        self.longest = 0
        self.dim = 0
        self._records: dict[tuple[int | None, bool], Record] = {}
        self._rule: Rule | None = None
        self._probe: Objective | None = None

    @property
    def has_checked(self) -> bool:
        """Whether an answer was asked for before."""
        return bool(self._records)

    def record(self, objective: Objective) -> Record:
        """What the first pass found, after all that an answer stands on was checked.

        Args:
            objective: the function; its data may be cut anew.

        Raises:
            HvpspecError: a statement that an answer stands on does not hold.
        """
        data = objective.data
        found = self._records.get((data.chunk_size, data.whole))
        if found is not None:
            return found
        first = not self._records
        marks = parameter_marks(objective)
        # Of processes that share the data all make the first pass; on later ones each is alone.
        with objective.ranks.together() if first else nullcontext():
            self._probe = self._in_float64(objective)
            weights, losses, dtype, samples = self._first_pass(objective)
            if first:
                self._check_modes(objective, samples[0])
                self._check_derivatives(samples)
        if first:
            self.defect = max(objective.ranks.gather(self.defect))
            self.is_verified = all(objective.ranks.gather(self.is_verified))
        sums = self._rule == "sum" or objective.loss.reduction == "sum"
        if sums:
            weights = [1.0] * len(weights)
        if first:
            refuse_other_networks(objective.given, marks, objective.ranks)
            total = 1.0 if sums else objective.ranks.sum(sum(weights))
        else:
            total = next(iter(self._records.values())).total
        if total == 0:
            raise InputError("every target is ignored by the loss: there is nothing to average")
        record = Record(weights, total, dtype, marks, sums, {objective.dtype: losses})
        self._records[data.chunk_size, data.whole] = record
        self._probe = None
        return record

    def _in_float64(self, objective: Objective) -> Objective:
        """The objective that is looked at; whether it can be in float64 is seen when it is."""
        wide = objective.dtype == torch.float64 or self.float64_fails
        return objective if wide else objective.changed(dtype=torch.float64)

    # -- statement 1 ---------------------------------------------------------------------------

    def _first_pass(
        self, objective: Objective
    ) -> tuple[list[float], list[float], torch.dtype, list[Batch]]:
        """Note weight and loss of each chunk, and see that they combine to the loss over the data.

        Returns:
            The weights, the losses, their dtype, and a few examples of some batches.
        """
        data, self.longest = objective.data, 0
        weights: list[float] = []
        losses: list[float] = []
        dtype = objective.dtype
        samples: list[Batch] = []
        tensors = objective.tensors(objective.leaves())
        waiting: Batch | None = None  # the batch before, as long as it is the only one
        with stage(objective, 0):
            for number, batch in enumerate(data.batches()):
                if number == 0:
                    waiting = batch
                    if objective.ranks.size > 1:  # the others have batches, too
                        self._require_batches(objective, batch, None)
                    if data.chunk_size is None and len(data.cut(batch)) > 1:
                        # Whole, if it must be, unless a size was asked for.
                        self._settle(objective, batch, None)
                        data.whole = not self._can_cut
                elif number == 1 and waiting is not None:
                    self._require_batches(objective, waiting, batch)
                    data.whole = data.whole or not self._can_cut
                    if self.dim and objective.loss.weight is None:
                        weights = [float(waiting.length(self.dim))]
                # The first, the second, the fourth, ..., of which one lies in the middle.
                if number & (number - 1) == 0:
                    samples.append(self._few(objective, batch))
                last = batch
                chunks = data.cut(batch)
                for chunk in chunks:
                    self.longest = max(self.longest, chunk.num_examples)
                    k = len(losses)
                    loss, weight, outputs = objective.evaluate(chunk, tensors)
                    self._check_loss(objective, k, chunk, loss, weight, outputs, tensors)
                    # Where every target is ignored, PyTorch's mean is 0/0, and counts nothing.
                    losses.append(float(loss.detach()) if weight else 0.0)
                    weights.append(weight)
                    dtype = loss.dtype
                if len(chunks) > 1:  # now that the loss is known to be finite on each
                    self._require_cuts(objective, batch)
        if number and number & (number - 1):
            samples.append(self._few(objective, last))
        if len(samples) > 3:
            samples = [samples[0], samples[-3], samples[-1]]
        if number and self._rule in ("mean", "sum"):
            for sample in samples[1:]:  # those that were not looked at yet
                if self._look_at_parts(objective, sample)[0] == "coupled":
                    self._refuse_coupled(objective, sample)
        return weights, losses, dtype, samples

    def _check_loss(
        self,
        objective: Objective,
        k: int,
        chunk: Batch,
        loss: Tensor,
        weight: float,
        outputs: Any,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Look at the loss on chunk ``k``, and at its mean or sum over the rows of the outputs."""
        value = float(loss.detach())
        if weight and not math.isfinite(value):
            raise NonFiniteError(
                f"the loss is {value} on chunk {k} of the data (counting from 0); check "
                "the inputs, the targets and the weights for NaN and overflow"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(
                f"chunk {k} (counting from 0) weighs {weight} in the mean; "
                "the weight of a loss must be a finite number of at least 0"
            )
        if k == 0:
            _refuse_own_parameters(loss, objective)
        if self._rule in ("mean", "sum") and objective.source != "known" and weight:
            by_rows = _rule_by_rows(objective, tensors, chunk, loss, outputs, (self._rule,))
            if by_rows == "coupled":
                _raise_no_mean(objective)

    @property
    def _can_cut(self) -> bool:
        """Whether batches may be cut along their first dimension."""
        return self._rule in ("mean", "sum") and self.dim == 0

    def _require_batches(self, objective: Objective, batch: Batch, other: Batch | None) -> None:
        """Raise InputError unless the loss over several batches is known to combine.

        Args:
            objective: the function.
            batch: the first.
            other: the second, if this process has one.
        """
        if objective.loss.whole:
            raise InputError(
                "a loss that couples the examples (whole=True) needs all data in one batch"
            )
        rule = self._settle(objective, batch, other)
        if rule == "coupled":
            self._refuse_coupled(objective, batch)
        if rule == "unknown" and objective.source == "assumed":
            raise InputError(
                "several batches are given, and whether the loss is a mean over their examples "
                "cannot be seen; say so with hvpspec.Loss(loss, weight=lambda outputs, targets: "
                "...), or give all data as one batch"
            )

    def _require_cuts(self, objective: Objective, batch: Batch) -> None:
        """Raise InputError unless a batch can be cut into chunks."""
        self._settle(objective, batch, None)
        if self._can_cut:
            return
        if objective.loss.whole:
            raise InputError(
                "a loss that couples the examples (whole=True) cannot be cut into chunks; leave "
                f"chunk_size out, or pass at least {batch.num_examples}"
            )
        self._refuse_coupled(objective, batch)

    def _settle(self, objective: Objective, batch: Batch, other: Batch | None) -> Rule:
        """Find out once how the loss on parts of a batch combines."""
        if self._rule is None:
            if objective.loss.whole:
                self._rule = "coupled"
                return self._rule
            sample = self._few(objective, batch)
            if not sample.can_be_cut and other is not None:
                sample = _joined(batch, other) or sample
            self._rule, _ = self._look_at_parts(objective, sample)
            if self._rule == "sum" and objective.source == "assumed":
                self.notes.append("the loss is a sum over the examples, as was found by trying")
        return self._rule

    def _refuse_coupled(self, objective: Objective, batch: Batch) -> NoReturn:
        """Say what does not combine: the network's outputs or the loss."""
        by_rows = self._look_at_parts(objective, self._few(objective, batch))[1]
        if objective.source != "known" and by_rows not in ("mean", "sum"):
            _raise_no_mean(objective)
        raise InputError(
            "the output of an example depends on its batch (batch statistics, or examples that "
            "are not along the first dimension); give all the data as one batch, without a "
            "chunk_size below its length, or change the model"
        )

    def _few(self, objective: Objective, batch: Batch) -> Batch:
        """Some examples of the front, the middle and the end of a batch, or all that it has."""
        n = batch.num_examples
        few = min(_FEW, max(n // 6, _CHEAP // objective.space.dim, 3))
        few = min(few, max(2, objective.data.chunk_size or few))  # of which memory is known
        if n <= few or not batch.can_be_cut:
            return batch
        third = few // 3  # which may be none
        middle = (n - third) // 2
        rows = [*range(third), *range(middle, middle + third), *range(n - (few - 2 * third), n)]
        return batch.rows(rows)

    def _look_at_parts(self, objective: Objective, sample: Batch) -> tuple[Rule, Rule]:
        """Compare the loss and its gradient on some examples with those on parts of them.

        Returns:
            How the loss of the network combines over parts of the batch, and how the loss function
            alone does over parts of the outputs.
        """
        whole = self._look(sample)
        probe = self._probe
        assert probe is not None
        if not math.isfinite(whole.value):
            return "unknown", "unknown"  # whoever asks says so
        by_rows: Rule = "unknown"
        if objective.source != "known":
            tensors = probe.tensors(probe.leaves())
            value = torch.tensor(whole.value, dtype=probe.dtype)
            by_rows = _rule_by_rows(probe, tensors, whole.batch, value, whole.outputs)
        found: Rule = "unknown" if sample.can_be_cut else by_rows
        for dim in (0, 1) if sample.can_be_cut else ():  # time may be first, examples second
            parts = self._parts(sample, dim)
            if parts:
                found = _combination(objective, whole, parts, self._tolerance)
            if found in ("mean", "sum"):
                self.dim = dim
                break
        return found, by_rows

    def _parts(self, sample: Batch, dim: int) -> list[_Look]:
        """Look at the front, the middle and the end of some examples, along a dimension.

        Returns:
            What was seen; nothing where the network does not take the parts.
        """
        lengths = {t.shape[dim] if t.ndim > dim else 0 for t in sample.leaves if t.ndim}
        n = lengths.pop()
        if lengths or n < 2:
            return []
        cuts = sorted({0, max(1, n // 4), max(1, (2 * n) // 3), n})
        try:
            return [
                self._look(sample.map(partial(_narrow, dim, a, b)), num_examples=b - a)
                for a, b in pairwise(cuts)
            ]
        except HvpspecError:
            raise
        except Exception as error:  # whatever a network makes of fewer examples
            if is_out_of_memory(error):
                raise
            return []

    # -- statements 2 to 4 ---------------------------------------------------------------------

    @property
    def _tolerance(self) -> float:
        """Shapes decide how products are summed up: half the digits is far beyond that."""
        assert self._probe is not None
        dtype = self.inside or self._probe.dtype
        return float(torch.finfo(dtype).eps ** 0.5)

    def _look(
        self,
        batch: Batch,
        leaves: Mapping[str, Tensor] | None = None,
        *,
        num_examples: int | None = None,
        seed: int = 1,
    ) -> _Look:
        """The loss and its gradient on some examples, in float64 where that is possible."""
        probe = self._probe
        assert probe is not None
        try:
            return _look(probe, batch, leaves, num_examples, seed, self)
        except HvpspecError:
            raise
        except Exception as error:
            native = probe.native_dtype
            if is_out_of_memory(error) or probe.dtype == native or leaves is not None:
                raise
            as_given = probe.changed(dtype=native)
            look = _look(as_given, batch, leaves, num_examples, seed, self)
            # It works as it was given, and so it is float64 that the network does not take.
            self._probe, self.float64_fails = as_given, first_line(error)
            self.notes.append(
                f"computed in {native}, since the network cannot in float64 ({self.float64_fails})"
            )
            return look

    def _check_modes(self, objective: Objective, sample: Batch) -> None:
        """Say so where the network is another function in training mode, if it was in that."""
        if objective.mode == "as given" or not any(m.training for m in objective.modules):
            return
        look = self._look(sample)
        assert self._probe is not None
        given = self._probe.changed(mode="as given")
        with stage(given, 1):
            try:
                loss, _, outputs = given.evaluate(
                    sample.to(given.device, given.dtype), given.tensors(given.leaves())
                )
            except Exception as error:  # whatever a network makes of training
                self.notes.append(
                    f"in training mode the network fails on these data ({first_line(error)}); "
                    "evaluation mode is another function"
                )
                return
        before, now = (_structure(value) for value in (look.outputs, outputs))
        if before != now:
            self.notes.append(
                f"in training mode the network returns {now}, in evaluation mode {before}: pass "
                "mode='as given' for the former"
            )
        elif "dropout is off" not in objective.mode_notes and not math.isclose(
            float(loss.detach()), look.value, rel_tol=self._tolerance
        ):
            self.notes.append(
                f"in training mode the loss on some examples is {float(loss.detach()):.4g}, in "
                f"evaluation mode {look.value:.4g}: pass mode='as given' for the former"
            )

    def _check_derivatives(self, samples: Sequence[Batch]) -> None:
        """Compare products with differences of the gradient, and the gradient with the loss.

        Where a kink lies at the very point, as those of many ReLU units do when their biases are 0,
        differences say nothing, and the comparison is made at a point nearby.
        """
        looks = [look for look in map(self._look, samples) if look.weight]
        probe = self._probe
        assert probe is not None
        if not any(look.reached for look in looks):
            return  # whoever asks says that there is no path to the loss
        samples = [look.batch for look in looks]
        n, reached = probe.space.dim, frozenset().union(*(look.reached for look in looks))
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            """A random unit vector."""
            z = torch.randn(n, generator=generator, dtype=torch.float64)
            z /= torch.linalg.vector_norm(z)
            return z.to(probe.device, probe.dtype)

        def f(theta: Tensor) -> tuple[float, Tensor]:
            """The loss on all these examples and its gradient."""
            leaves = probe.leaves(theta)
            return _total([self._look(sample, leaves) for sample in samples])

        theta = probe.space.flatten(probe.leaves()).detach()
        _, gradient = _total(looks)
        if not bool(torch.isfinite(gradient).all()):
            return  # the first product will say so
        # Half of it along the gradient: of that alone a random vector sees next to nothing.
        size = float(torch.linalg.vector_norm(gradient))
        v, w = draw() + (gradient / size if size else 0), draw()
        v = v / torch.linalg.vector_norm(v)
        u = torch.finfo(self.inside or probe.dtype).eps / 2
        nearby = theta + 1e-3 * torch.linalg.vector_norm(theta) * draw()
        for point in (theta, nearby):
            Av, Aw = self._products(
                samples, probe.leaves(point), [v, w], looks, reached, point is theta
            )
            if not bool(torch.isfinite(Av).all() and torch.isfinite(Aw).all()):
                return
            # Of unit vectors, one of them random, <w, A v> has a size of about ||A v|| / sqrt(n).
            asymmetry = abs(float(w @ Av) - float(v @ Aw)) * n**0.5
            size = float(torch.linalg.vector_norm(Av) + torch.linalg.vector_norm(Aw))
            self.defect = asymmetry / size if asymmetry > n**0.5 * 1e3 * u * size else 0.0
            if self.defect > _MOST_DEFECT:
                _raise_no_derivative(f"they are not symmetric, by {self.defect:.1%}")
            if probe.pseudo_gradient:
                self.notes.append(
                    "the matrix is the derivative of a pseudo-gradient, which is not that of the "
                    "loss: its index is not that of the loss, and nothing is certified"
                )
                return
            by_product, by_value = compare(f, point, v, Av, u, _LEAST_DEFECT)
            if by_value.is_conclusive and by_value.defect > _MOST_DEFECT:
                raise NotDifferentiableError(
                    "the gradient is not that of the loss: along a random direction they differ by "
                    f"{by_value.defect:.1%} (a straight-through or surrogate gradient, a hook, a "
                    "detached part); repair it, or pass pseudo_gradient=True to look at it as it is"
                )
            if by_product.defect > _MOST_DEFECT:
                _raise_no_derivative(f"along a random direction by {by_product.defect:.1%}")
            self.defect = max(self.defect, by_product.defect)
            if by_product.is_conclusive:
                self.is_verified = True
                return
        self.notes.append(
            "products could not be compared with differences of the gradient, which say nothing "
            "here: there are kinks everywhere, or round-off is too large"
        )

    def _products(
        self,
        samples: Sequence[Batch],
        leaves: Mapping[str, Tensor],
        vectors: Sequence[Tensor],
        looks: Sequence[_Look],
        reached: frozenset[str],
        is_here: bool,
    ) -> list[Tensor]:
        """Products of the Hessian on some examples with vectors, by double backward.

        Raises:
            DataChangedError: the loss is another than before.
            InputError: so are the parameters that it depends on.
        """
        probe = self._probe
        assert probe is not None
        products = [torch.zeros_like(v) for v in vectors]
        found: set[str] = set()
        for sample, look in zip(samples, looks, strict=True):
            tensors = probe.tensors(leaves)
            with stage(probe, 2), probe.placed(tensors):
                loss, _, _ = probe.evaluate(sample, tensors)
                if is_here and not math.isclose(
                    float(loss.detach()), look.value, rel_tol=self._tolerance, abs_tol=1e-300
                ):
                    raise_changed(f"loss {float(loss.detach()):.6g}, before {look.value:.6g}")
                gradient = differentiate(loss, leaves, create_graph=True)
                found |= gradient.keys()
                refuse_known_faults(gradient.values())
                parts = {name: g for name, g in gradient.items() if g.requires_grad}
                for v, product in zip(vectors, products, strict=True):
                    columns = probe.space.unflatten(v)
                    weights = [columns[name] for name in parts]
                    second = differentiate(parts.values(), leaves, weights, retain_graph=True)
                    add_parts_(product, probe.space, second)
        if found != reached:
            raise InputError(
                "the network keeps a tensor from an earlier pass: the loss depends on other "
                f"parameters than before ({', '.join(sorted(found ^ reached))}); clear what is "
                "computed from parameters before each pass"
            )
        return products


def _look(
    probe: Objective,
    batch: Batch,
    leaves: Mapping[str, Tensor] | None,
    num_examples: int | None,
    seed: int,
    guard: Guard,
) -> _Look:
    """Evaluate the loss and its gradient on some examples."""
    batch = batch.to(probe.device, probe.dtype)
    with stage(probe, seed):
        leaves = probe.leaves() if leaves is None else leaves
        tensors = probe.tensors(leaves)
        with probe.placed(tensors):
            with _Coarsest() as dtypes:
                loss, weight, outputs = probe.evaluate(batch, tensors)
            refuse_known_faults([loss])
            parts = differentiate(loss, leaves)
        if probe.loss.weight is None and probe.loss.reduction == "mean" and num_examples:
            weight = float(num_examples)
        gradient = torch.zeros(probe.space.dim, dtype=probe.dtype, device=probe.device)
        add_parts_(gradient, probe.space, parts)
    if dtypes.found is not None:
        guard.inside = _coarser(guard.inside, dtypes.found)
    return _Look(batch, float(loss.detach()), weight, gradient, frozenset(parts), outputs)


def _total(looks: Sequence[_Look]) -> tuple[float, Tensor]:
    """The sum of the losses that were looked at, and of their gradients."""
    value = sum(look.value for look in looks)
    return value, torch.stack([look.gradient for look in looks]).sum(0)


def _coarser(dtype: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    """The dtype of the fewer digits."""
    if dtype is None or torch.finfo(other).eps > torch.finfo(dtype).eps:
        return other
    return dtype


class _Coarsest(TorchFunctionMode):
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
                self.found = _coarser(self.found, leaf.dtype)
        return result


def _rule_by_rows(
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
        looks.append(_Look(batch, value, weight, torch.zeros(0), frozenset(), None))
    look = _Look(batch, float(whole.detach()), 0.0, torch.zeros(0), frozenset(), None)
    return _combination(objective, look, looks, 1e3 * torch.finfo(whole.dtype).eps, rules)


def _narrow(dim: int, start: int, stop: int, tensor: Tensor) -> Tensor:
    """A part of a tensor along a dimension; a scalar belongs to every part."""
    return tensor.narrow(dim, start, stop - start) if tensor.ndim else tensor


def _combination(
    objective: Objective,
    whole: _Look,
    parts: Sequence[_Look],
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


def _joined(batch: Batch, other: Batch) -> Batch | None:
    """Two batches of one example each as one of two; None where they do not go together."""
    tensors = list(zip(batch.leaves, other.leaves, strict=False))
    fits = batch.is_plain and batch.others == other.others
    fits = fits and len(batch.leaves) == len(other.leaves)
    if not fits or any(a.shape[1:] != b.shape[1:] or a.ndim != b.ndim for a, b in tensors):
        return None
    others = iter(other.leaves)

    def join(a: Tensor) -> Tensor:
        b = next(others)
        return torch.cat([a, b]) if a.ndim else a

    joined = batch.map(join)
    return joined if joined.can_be_cut else None


def _structure(value: Any) -> str:
    """What a network returned, in words: the kinds of its parts."""
    shapes = [
        str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves_of(value)
    ]
    return f"{type(value).__name__} of {len(shapes)} ({', '.join(shapes[:4])})"


def _raise_no_mean(objective: Objective) -> NoReturn:
    """Say that a loss is no mean over parts, and what helps."""
    declared = objective.source == "declared"
    what = "as it is declared" if declared else "as a loss function is taken to be"
    raise InputError(
        f"the loss of several parts of the data is not a mean over them, {what}: say what its mean "
        "divides by with hvpspec.Loss(loss, weight=lambda outputs, targets: ...), or, if it "
        "couples the examples, give all data as one batch with hvpspec.Loss(loss, whole=True)"
    )


def _raise_no_derivative(how: str) -> NoReturn:
    """Say that products are not the derivative of the gradient."""
    raise NotDifferentiableError(
        f"the products are not the derivative of the gradient: {how}; look for an "
        "autograd.Function whose backward saves an intermediate or runs without a graph, for hooks "
        "on gradients, and for functions whose derivative is wrong in PyTorch, as abs() at 0"
    )
