"""What must hold while an answer is computed: every reason for which hvpspec refuses is found here.

An answer stands on statements about the network, the loss and the data:

1. The loss over the data is the weighted mean, or the sum, of the losses over the parts.
2. The products are the derivative of the gradient, and the gradient is that of the loss.
3. The function is one and the same function on every pass.
4. It can be computed in float64, or else it is said in what it is computed.

:meth:`Guard.record` checks them when the first question is asked. What is not checked there is
refused by the stage of a pass, or known from the record of the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from hvpspec.curvature.data import Batch, is_nested, leaves_of, map_tensors, tensors_in
from hvpspec.curvature.differences import Parts
from hvpspec.curvature.graph import foreign_leaves
from hvpspec.curvature.probe import (
    MOST_DEFECT,
    Coarsest,
    Probe,
    Rule,
    Slopes,
    attempted,
    coarser,
    joined,
    rule_by_rows,
)
from hvpspec.curvature.record import Record, parameter_marks, raise_not_finite
from hvpspec.curvature.sharding import refuse_other_networks, unmanaged
from hvpspec.curvature.stage import stage
from hvpspec.errors import (
    InputError,
    NotDifferentiableError,
    first_line,
)
from hvpspec.linalg.memory import is_out_of_memory

if TYPE_CHECKING:
    from hvpspec.curvature.objective import Objective

# ---------------------------------------------------------------------------------------------
# The network as it is given


def usable(model: nn.Module) -> nn.Module:
    """The model as it computes with parameters that are handed to it.

    Raises:
        InputError: it is no module whose parameters can be replaced and differentiated by.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    original = getattr(model, "_orig_mod", None)  # torch.compile
    model = original if isinstance(original, nn.Module) else model
    for name, module in model.named_modules():
        _refuse_kind(module, f"module {name!r} of the model" if name else "the model")
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


def _refuse_kind(module: nn.Module, where: str) -> None:
    """Raise InputError for kinds of modules that cannot be differentiated twice."""
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"{where} is TorchScript, which cannot be differentiated twice here: build the "
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
    if module.scale_grad_by_freq:
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
            if module.running_mean is None:
                raise InputError(
                    f"{kind} has no running statistics, so the loss of an example depends on its "
                    "batch; build it with track_running_stats=True, or pass mode='as given' with "
                    "all data in one batch"
                )
            if module.training and not per_example:
                raise InputError(
                    f"{kind} is in train mode: the loss of an example would depend on its batch; "
                    "call model.eval() to use the running statistics, or pass mode='as given' with "
                    "all data in one batch"
                )
            notes.append("normalisation layers use their running statistics (evaluation mode)")
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            notes.append("dropout is off")
    return tuple(dict.fromkeys(notes))


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a normalisation layer, in the mode it is in, takes the statistics of the batch."""
    return any(
        isinstance(module, nn.modules.batchnorm._NormBase)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and (module.training or module.running_mean is None)
        for module in model.modules()
    )


# ---------------------------------------------------------------------------------------------
# The checks before the first answer

# Examples that are looked at closely: enough to see most faults, too few to cost much.
_FEW = 24
# That many parameters times examples take no time worth saving.
_CHEAP = 2**17


class Guard:
    """Checks an objective before the first answer, and remembers what it found.

    It is shared by an objective and those made from it, in float64 or with fewer parameters.

    Attributes:
        notes: what a reader of a result should know.
        float64_fails: why the function cannot be computed in float64; empty if it can.
        inside: the coarsest dtype in which something is computed that depends on parameters, in
            float64 where that is possible.
        inside_natively: the same for the network as it was given, which may differ where autocast
            stands in its forward pass.
        defect: the relative error of products as derivatives of the gradient, beyond the error of
            the comparison, where it is too small to refuse them.
        is_verified: whether the products are known to be the derivative of the loss's gradient;
            None where every target is ignored.
        is_pseudo: whether the gradient is another than the loss's, as was allowed.
        longest: the most examples in a chunk, as far as was seen.
        num_examples: how many there are in the data of this process.
        dim: the dimension along which the examples lie, 1 for sequences with time first.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.float64_fails = ""
        self.inside: torch.dtype | None = None
        self.inside_natively: torch.dtype | None = None
        self.defect = 0.0
        self.is_verified: bool | None = None
        self.longest = self.num_examples = 0
        self.dim = 0
        self._records: dict[tuple[int | None, bool], Record] = {}
        self.is_pseudo = False
        self._gradient_fault = self._product_fault = ""
        self._rule: Rule | None = None
        self._takes_rows: bool | None = None
        self._counted: Batch | None = None
        self._looked_at: Iterable[Batch] = ()
        self._rows_tell = True
        self._has_hooks = False
        self._first: tuple[Batch, float, float, Any] | None = None

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
            probe = Probe(objective, is_wide=not self.float64_fails)
            leaves = objective.leaves()
            slopes = Slopes(objective, leaves) if first else None
            weights, losses, dtype, samples = self._first_pass(objective, probe, leaves, slopes)
            if slopes is not None:
                self._check_modes(objective, probe, *samples[0])
                with stage(objective, 0):  # to which the random states of loaders belong
                    self._check_derivatives(objective, probe, samples, slopes)
                self.inside, self.float64_fails = probe.inside, probe.float64_fails
                self._counted = None  # whose memory is free now
        if first:
            if self.float64_fails:
                self.notes.append(
                    f"computed in {objective.native_dtype}, since the network cannot in float64 "
                    f"({self.float64_fails})"
                )
            self.defect = max(objective.ranks.gather(self.defect))
            told = [v for v in objective.ranks.gather(self.is_verified) if v is not None]
            self.is_verified = bool(told) and all(told)
            self.is_pseudo = any(objective.ranks.gather(self.is_pseudo))
            faults = objective.ranks.gather((self._gradient_fault, self._product_fault))
            self._gradient_fault, self._product_fault = map(max, zip(*faults, strict=True))
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
        return record

    @property
    def has_faults(self) -> bool:
        """Whether derivatives are known to be wrong."""
        return bool(self._gradient_fault or self._product_fault)

    def require_gradient(self) -> None:
        """Raise NotDifferentiableError where the gradient is not that of the loss."""
        if self._gradient_fault:
            raise NotDifferentiableError(
                f"the gradient is not that of the loss: they differ {self._gradient_fault} (a "
                "straight-through or surrogate gradient, a hook, a detached part); repair it, or "
                "pass pseudo_gradient=True to look at it as it is"
            )

    def require_products(self) -> None:
        """Raise NotDifferentiableError where products are not the derivative of that gradient."""
        self.require_gradient()
        if self._product_fault:
            raise _no_derivative(self._product_fault)

    # -- statement 1 ---------------------------------------------------------------------------

    def _first_pass(
        self,
        objective: Objective,
        probe: Probe,
        leaves: Mapping[str, Tensor],
        slopes: Slopes | None,
    ) -> tuple[list[float], list[float], torch.dtype, list[tuple[Batch, Batch]]]:
        """Note weight and loss of each chunk, and see that they combine to the loss over the data.

        Returns:
            The weights, the losses, their dtype, and a few examples of some batches, each with what
            to look at where the network does not take these alone.
        """
        data, self.longest, self.num_examples = objective.data, 0, 0
        self._first = None
        weights: list[float] = []
        losses: list[float] = []
        dtype = objective.dtype
        samples: list[tuple[Batch, Batch]] = []
        tensors = objective.tensors(leaves)
        is_compared = False
        with stage(objective, 0):
            batches = data.batches()
            first, second = next(batches), next(batches, None)
            data.num_outputs = data.num_outputs or _num_outputs(objective, first, tensors)
            self._decide(objective, probe, first, second, tensors)
            ahead = [first] if second is None else [first, second]
            for number, batch in enumerate(chain(ahead, batches)):
                chunks = data.cut(batch)
                self.longest = max(self.longest, *(chunk.num_examples for chunk in chunks))
                self.num_examples += batch.num_examples
                # The first, the second, the fourth, ..., of which one lies in the middle.
                if number & (number - 1) == 0:
                    samples.append(self._sample(objective, batch))
                if len(chunks) > 1:
                    self._settle(objective, probe, batch, None)
                for chunk in chunks:
                    loss, weight, outputs = self._evaluate(objective, chunk, batch, tensors)
                    self._check_loss(objective, len(losses), loss, weight, tensors)
                    self._check_rows(objective, tensors, chunk, loss, weight, outputs)
                    if weight and slopes is not None:
                        slopes.look(chunk, loss, tensors, self._roundoff(objective))
                    if weight and self._counted is None:
                        self._counted = chunk
                    # Where every target is ignored, PyTorch's mean is 0/0, and counts nothing.
                    losses.append(float(loss.detach()) if weight else 0.0)
                    weights.append(weight)
                    dtype = loss.dtype
                if len(chunks) > 1:  # now that the loss is known to be finite on each
                    self._require_cuts(objective, probe, batch)
                if number < 2 and len(losses) > 1 and self._can_cut and not is_compared:
                    is_compared = True
                    self._compare_together(objective, probe, tensors, first, batch, weights, losses)
                last = batch
        if number and number & (number - 1):
            samples.append(self._sample(objective, last))
        if len(samples) > 3:
            samples = [samples[0], samples[-3], samples[-1]]
        # A loss of one's own may weigh otherwise where targets are ignored, say; a network is the
        # same on all batches.
        if number and self._rule in ("mean", "sum") and objective.source != "known":
            for sample, _ in samples[1:]:
                if probe.rules(sample)[0] == "coupled":
                    _refuse_coupled(objective, probe, sample)
        self._first = None  # whose memory is free now
        return weights, losses, dtype, samples

    def _decide(
        self,
        objective: Objective,
        probe: Probe,
        batch: Batch,
        other: Batch | None,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Find out whether batches may be cut, and refuse several of them that do not combine.

        Args:
            objective: the function.
            probe: looks at it.
            batch: the first.
            other: the second, if this process has one.
            tensors: all parameters.
        """
        data = objective.data
        try:
            if other is not None or objective.ranks.size > 1:  # the others have batches, too
                self._require_batches(objective, probe, batch, other)
            if data.chunk_size is None and len(data.cut(batch)) > 1:
                self._settle(objective, probe, batch, other)
                data.whole = not self._can_cut  # unless a size was asked for
        except InputError:
            # A network that fails, or a loss that is not finite, is the reason to name first.
            loss, weight, _ = self._evaluate(objective, batch, batch, tensors)
            self._check_loss(objective, 0, loss, weight, tensors)
            raise

    def _roundoff(self, objective: Objective) -> float:
        """The unit round-off of the network as it was given, as far as was seen."""
        return torch.finfo(self.inside_natively or objective.dtype).eps / 2

    def _compare_together(
        self,
        objective: Objective,
        probe: Probe,
        tensors: Mapping[str, Tensor],
        first: Batch,
        second: Batch,
        weights: Sequence[float],
        losses: Sequence[float],
    ) -> None:
        """Compare the loss on the first chunks together with those on each.

        What takes the k largest losses of a batch, or drops what is beyond a capacity, shows only
        where there are more examples than in a chunk. These are as many as may be looked at without
        a chunk size, or fit into memory; of batches that are not cut, the first two.
        """
        data = objective.data
        chunks, count = data.cut(first), 2
        length = chunks[0].num_examples
        if len(chunks) > 1:
            count = min(len(chunks), max(2, first.default_chunk_size(data.num_outputs) // length))
        elif len(data.cut(second)) > 1:
            return
        loss: float | Exception | None = None
        while loss is None:
            is_cut = len(chunks) > 1
            together = first.rows(slice(0, count * length)) if is_cut else joined(first, second, 0)
            if together is None or count < 2:
                return
            try:
                loss = _value(objective, together, tensors)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                count //= 2
        if isinstance(loss, Exception):
            return  # nothing is known where so many examples are not taken
        shares = [1.0] * count
        if self._rule == "mean":
            shares = [w / (sum(weights[:count]) or 1.0) for w in weights[:count]]
        parts = [s * x for s, x in zip(shares, losses[:count], strict=True)]
        size = max(abs(loss), sum(map(abs, parts)))
        tolerance = max(2e3 * self._roundoff(objective), probe.tolerance)
        if any(weights[:count]) and not abs(loss - sum(parts)) <= tolerance * size:
            self._rule = "coupled"
            assert together is not None
            _refuse_coupled(objective, probe, together)

    def _evaluate(
        self, objective: Objective, chunk: Batch, batch: Batch, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, float, Any]:
        """Evaluate a chunk of a batch for the first time, and say what may help where it fails."""
        with Coarsest() as dtypes:
            found = attempted(partial(objective.evaluate, chunk, tensors))
        if dtypes.found is not None:
            self.inside_natively = coarser(self.inside_natively, dtypes.found)
        self._has_hooks = self._has_hooks or dtypes.has_hooks
        if not isinstance(found, Exception):
            return found
        error = found
        reason = f"{type(error).__name__}: {first_line(error)}"
        if chunk is not batch:
            raise InputError(
                f"the network or the loss fails on {chunk.num_examples} of a batch's "
                f"{batch.num_examples} examples ({reason}); leave chunk_size out"
            ) from error
        if objective.mode == "eval" and objective.was_training:
            given = objective.changed(mode="as given")
            with suppress(Exception), stage(given, 1):
                given.evaluate(chunk, tensors)
                reason += "; in training mode, as it was given, it works: pass mode='as given'"
        raise InputError(f"the network or the loss fails on the data ({reason})") from error

    def _check_loss(
        self,
        objective: Objective,
        k: int,
        loss: Tensor,
        weight: float,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """See that the loss on chunk ``k`` and its weight are finite."""
        value = float(loss.detach())
        if weight and not math.isfinite(value):
            own = " (a mean over no target is 0/0: hvpspec.Loss(loss, weight=...) says what counts)"
            raise_not_finite(value, k, "" if objective.source == "known" else own)
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(
                f"chunk {k} (counting from 0) weighs {weight} in the mean; "
                "the weight of a loss must be a finite number of at least 0"
            )
        if k == 0:
            self._look_for_parameters(objective, loss, tensors)

    def _check_rows(
        self,
        objective: Objective,
        tensors: Mapping[str, Tensor],
        chunk: Batch,
        loss: Tensor,
        weight: float,
        outputs: Any,
    ) -> None:
        """See that the loss on a chunk is the mean or sum over the rows of the outputs, too.

        So it must be on the chunk together with the first, since a weight may be the same within
        each chunk.
        """
        if self._rule not in ("mean", "sum") or objective.source == "known" or not weight:
            return
        if self._rows_tell:
            by_rows = rule_by_rows(objective, tensors, chunk, loss, outputs, (self._rule,))
            if by_rows == "coupled":
                _raise_no_mean(objective)
        # Without the graph, so that its memory is free for the next chunk.
        plain = map_tensors(Tensor.detach, outputs) if is_nested(outputs) else None
        value = float(loss.detach())
        if self._first is None:
            self._first = chunk, value, weight, plain
            return
        first, first_value, first_weight, first_plain = self._first
        together: float | Exception | None = None
        if self._rows_tell and plain is not None and first_plain is not None:
            pair = Batch((first_plain,), {}, first.targets), Batch((plain,), {}, chunk.targets)
            rows = joined(*pair, self.dim)
            if rows is not None:
                function = objective.loss_of(tensors)
                (outputs,), targets = rows.args, rows.targets
                together = attempted(lambda: float(function(outputs, targets).detach()))
        if not isinstance(together, float):  # as of a mask of fixed length
            both = joined(first, chunk, self.dim)
            if both is not None:
                together = _value(objective, both, tensors)
        if not isinstance(together, float):
            if objective.source == "assumed" and self._rule == "mean":
                _raise_unknown()
            return
        total = first_weight + weight if self._rule == "mean" else 1.0
        shares = (first_weight, weight) if self._rule == "mean" else (1.0, 1.0)
        parts = [shares[0] * first_value / total, shares[1] * value / total]
        tolerance = 1e3 * torch.finfo(loss.dtype).eps * max(abs(together), sum(map(abs, parts)))
        if not abs(together - sum(parts)) <= tolerance:
            _raise_no_mean(objective)

    def _look_for_parameters(
        self, objective: Objective, loss: Tensor, tensors: Mapping[str, Tensor]
    ) -> None:
        """Refuse a loss that takes the model's parameters by itself, and note others that it takes.

        The operator differentiates by copies that it hands to the model; a penalty on the
        parameters in the loss function, or a cache filled before, holds the originals, which would
        be constants.
        """
        parameters = objective.parameters()
        own = {id(parameters[name]): name for name in objective.space.names}
        handed = {id(t) for t in tensors.values()}
        for leaf in foreign_leaves(loss):
            if id(leaf) in own:
                raise InputError(
                    f"the loss takes the parameter {own[id(leaf)]!r} by itself, not through the "
                    "outputs; use l2= for a penalty, or compute it in the model's forward pass "
                    "(and clear what the model keeps from an earlier pass)"
                )
            known = any(leaf is p for p in parameters.values())  # one that was not selected
            if isinstance(leaf, nn.Parameter) and id(leaf) not in handed and not known:
                self.notes.append(
                    "parameters that are neither the model's nor those of a loss module are "
                    "constants"
                )

    @property
    def _can_cut(self) -> bool:
        """Whether batches may be cut along their first dimension."""
        return self._rule in ("mean", "sum") and self.dim == 0

    def _require_batches(
        self, objective: Objective, probe: Probe, batch: Batch, other: Batch | None
    ) -> None:
        """Raise InputError unless the loss over several batches is known to combine."""
        rule = self._settle(objective, probe, batch, other)
        if rule == "coupled":
            what = _what_couples(objective)
            if what:
                raise InputError(f"{what} that couples the examples needs all data in one batch")
            _refuse_coupled(objective, probe, self._few(objective, probe, batch))
        if rule == "unknown" and objective.source == "assumed":
            _raise_unknown()

    def _require_cuts(self, objective: Objective, probe: Probe, batch: Batch) -> None:
        """Raise InputError unless a batch can be cut into chunks."""
        self._settle(objective, probe, batch, None)
        if self._can_cut:
            return
        what = _what_couples(objective)
        if what:
            raise InputError(
                f"a batch cannot be cut where {what} couples the examples; leave chunk_size out, "
                f"or pass at least {batch.num_examples}"
            )
        _refuse_coupled(objective, probe, self._few(objective, probe, batch))

    def _settle(
        self, objective: Objective, probe: Probe, batch: Batch, other: Batch | None
    ) -> Rule:
        """Find out once how the loss on parts of a batch combines."""
        if self._rule is None:
            if _what_couples(objective):
                self._rule = "coupled"
                return self._rule
            sample = self._few(objective, probe, batch)
            if not sample.can_be_cut and other is not None:
                pair = joined(batch, other, 0)
                sample = pair if pair is not None and probe.takes(pair) else sample
            self._rule, by_rows, self.dim = probe.rules(sample)
            # A loss that takes more than the outputs, such as activations, is no matter of rows.
            self._rows_tell = self._rule == by_rows
            if self._rule == "sum" and objective.source == "assumed":
                self.notes.append("the loss is a sum over the examples, as was found by trying")
        return self._rule

    def _few(self, objective: Objective, probe: Probe, batch: Batch) -> Batch:
        """Some examples of a batch, or all that it has where the network takes these only."""
        few, whole = self._sample(objective, batch)
        if self._takes_rows is None and few is not batch:  # as is seen on the first batch
            self._takes_rows = probe.takes(few, probe.nearby)
        return few if self._takes_rows else whole

    def _sample(self, objective: Objective, batch: Batch) -> tuple[Batch, Batch]:
        """Some examples of the front, the middle and the end of a batch, or all that it has.

        Returns:
            These examples, and what to look at where the network does not take them alone.
        """
        if self._takes_rows is False:
            return batch, batch
        n = batch.num_examples
        few = min(_FEW, max(_CHEAP // objective.space.dim, 2))
        few = min(few, max(2, objective.data.chunk_size or few))  # of which memory is known
        if n <= few or not batch.can_be_cut:
            return batch, batch
        third = few // 3  # which may be none
        middle = (n - third) // 2
        rows = [*range(third), *range(middle, middle + third), *range(n - (few - 2 * third), n)]
        sample = batch.rows(rows)
        # The batch itself, which takes memory, is kept only as long as it may be needed.
        return sample, sample if self._takes_rows else batch

    # -- statements 2 to 4 ---------------------------------------------------------------------

    def _check_modes(self, objective: Objective, probe: Probe, sample: Batch, more: Batch) -> None:
        """Say so where the network is another function in training mode, if it was in that."""
        if objective.mode == "as given" or not objective.was_training:
            return
        look = probe.look(sample if sample is more or probe.takes(sample) else more)
        given = probe.objective.changed(mode="as given")
        batch = look.batch.to(given.device, given.dtype)
        with stage(given, 1):
            found = attempted(lambda: given.evaluate(batch, given.tensors(given.leaves())))
        if isinstance(found, Exception):
            self.notes.append(
                f"in training mode the network fails on these data ({first_line(found)}); "
                "evaluation mode is another function"
            )
            return
        if not math.isfinite(look.value):
            return
        loss, _, outputs = found
        before, now = (_structure(value) for value in (look.outputs, outputs))
        if before != now:
            self.notes.append(
                f"in training mode the network returns {now}, in evaluation mode {before}: pass "
                "mode='as given' for the former"
            )
        elif "dropout is off" not in objective.mode_notes and not math.isclose(
            float(loss.detach()), look.value, rel_tol=probe.tolerance
        ):
            self.notes.append(
                f"in training mode the loss on some examples is {float(loss.detach()):.4g}, in "
                f"evaluation mode {look.value:.4g}: pass mode='as given' for the former"
            )

    def _check_derivatives(
        self,
        objective: Objective,
        probe: Probe,
        samples: Sequence[tuple[Batch, Batch]],
        slopes: Slopes,
    ) -> None:
        """Compare products with differences of the gradient, and the gradient with the loss.

        That is done on few examples, and on the chunk whose loss follows its gradient least, if one
        does not. Only functions whose derivatives are written by hand, and hooks, have first ones
        that are right and second ones that are not; with one of these it is done on all the data.
        """
        if self._counted is None:
            return  # every target is ignored
        self.is_verified = False
        if not slopes.gradient:
            return  # whoever asks says that there is no path to the loss

        def compare(examples: Iterable[Batch]) -> bool:
            self._looked_at = examples
            return self._compare(objective, probe, examples, slopes.gradient)

        if slopes.is_own or self._has_hooks:
            compare(objective.data)
        else:
            few = self._few_of_each(objective, samples)
            found = attempted(lambda: compare([sample for sample, _ in few]))
            if isinstance(found, Exception):  # the network takes its batches as they are only
                found = compare([batch for _, batch in few])
            if not found:  # no target of these counts
                compare([self._counted])
        if slopes.suspect is not None and not self.has_faults:
            _, (along,) = probe.derivatives([slopes.suspect], probe.theta)
            self._compare(objective, probe, [slopes.suspect], along)

    def _few_of_each(
        self, objective: Objective, samples: Sequence[tuple[Batch, Batch]]
    ) -> list[tuple[Batch, Batch]]:
        """A part of each sample, so that they are few in all, with the batch as it is."""
        few = max(_CHEAP // objective.space.dim, 1)
        samples = samples[:few]
        share = few / max(few, sum(sample.num_examples for sample, _ in samples))
        return [(_thinned(sample, share), more) for sample, more in samples]

    def _compare(
        self, objective: Objective, probe: Probe, examples: Iterable[Batch], along: Parts
    ) -> bool:
        """Compare derivatives on some batches with differences, and note what is wrong.

        Where a kink lies at the very point, as those of many ReLU units do when their biases are 0,
        differences say nothing, and the comparison is made at a point nearby.

        Returns:
            Whether there was something to compare: products are finite, and some target counts.
        """
        here = probe.compared(examples, along)
        if here is None:
            return False
        product, gradient, asymmetry = here
        if not product.is_conclusive or gradient.defect > MOST_DEFECT:
            nearby = probe.compared(examples, along, probe.nearby)
            if nearby is None:
                return True
            product = product if product.is_conclusive else nearby[0]
            # What kinks do by chance they do not do at two points.
            gradient = min(gradient, nearby[1], key=lambda comparison: comparison.defect)
        if gradient.defect > MOST_DEFECT:
            self.is_pseudo = objective.pseudo_gradient
            if self.is_pseudo:
                self.notes.append(
                    "the matrix is the derivative of a pseudo-gradient, not of the loss's: its "
                    "index is not that of the loss, and nothing is certified"
                )
            else:
                self._gradient_fault = f"along some direction by {gradient.defect:.2g} of it"
        if asymmetry > MOST_DEFECT:
            self._product_fault = f"they are not symmetric, by {asymmetry:.2g}"
        elif product.defect > MOST_DEFECT and not self.is_pseudo:
            self._product_fault = f"along a random direction by {product.defect:.2g} of it"
        self.defect = max(self.defect, asymmetry)
        if self.is_pseudo:
            return True
        self.defect = max(self.defect, product.defect)
        self.is_verified = product.is_conclusive and not self._product_fault
        if not product.is_conclusive:
            self.notes.append(
                "products could not be compared with differences of the gradient, which say "
                "nothing here: there are kinks everywhere, or round-off is too large"
            )
        return True

    def check_at(self, objective: Objective, theta: Tensor) -> None:
        """Compare products at another point with differences of the gradient there.

        Args:
            objective: the function.
            theta: the point, shape (n,).

        Raises:
            NotDifferentiableError: they are not its derivative.
        """
        if self.is_pseudo or not self._looked_at:
            return
        probe = Probe(objective, is_wide=not self.float64_fails)
        with stage(objective, 0):
            theta = theta.to(probe.objective.device, probe.objective.dtype)
            found = probe.compared(self._looked_at, None, objective.space.unflatten(theta))
        if found is not None and found[0].defect > MOST_DEFECT:
            raise _no_derivative(f"along a random direction by {found[0].defect:.2g} of it")


def _value(objective: Objective, batch: Batch, tensors: Mapping[str, Tensor]) -> float | Exception:
    """The loss on a batch, without a graph, or what the network raises."""
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    return attempted(lambda: float(objective.evaluate(batch, plain)[0].detach()))


def _num_outputs(objective: Objective, batch: Batch, tensors: Mapping[str, Tensor]) -> int:
    """Entries of the outputs for one example; 0 where it is not taken alone."""
    if not batch.can_be_cut:
        return 0
    with stage(objective, 0):
        found = attempted(lambda: objective.outputs(tensors, batch.rows([0])))
    return 0 if isinstance(found, Exception) else sum(t.numel() for t in tensors_in(found))


def _thinned(sample: Batch, share: float) -> Batch:
    """A share of some examples, but at least one."""
    n = sample.num_examples
    count = max(1, int(share * n))
    if count == n or not sample.can_be_cut:
        return sample
    return sample.rows([i * n // count for i in range(count)])


def _what_couples(objective: Objective) -> str:
    """What is known to couple the examples without a look; empty if nothing."""
    if objective.loss.whole:
        return "a loss"
    return "batch normalisation" if objective.is_coupled else ""


def _refuse_coupled(objective: Objective, probe: Probe, sample: Batch) -> NoReturn:
    """Say what does not combine: the network's outputs or the loss."""
    _, by_rows, _ = probe.rules(sample)
    if objective.source != "known" and by_rows not in ("mean", "sum"):
        _raise_no_mean(objective)
    raise InputError(
        "the output of an example depends on its batch (batch statistics, or examples that "
        "are not along the first dimension); give all the data as one batch, without a "
        "chunk_size below its length, or change the model"
    )


def _structure(value: Any) -> str:
    """What a network returned, in words: the kinds of its parts."""
    shapes = [
        str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves_of(value)
    ]
    return f"{type(value).__name__} of {len(shapes)} ({', '.join(shapes[:4])})"


def _raise_unknown() -> NoReturn:
    """Say that it is not known how a loss of one's own combines over batches."""
    raise InputError(
        "several batches are given, and whether the loss is a mean over their examples cannot be "
        "seen; say so with hvpspec.Loss(loss, weight=lambda outputs, targets: ...), or give all "
        "data as one batch"
    )


def _raise_no_mean(objective: Objective) -> NoReturn:
    """Say that a loss is no mean over parts, and what helps."""
    declared = objective.source == "declared"
    what = "as it is declared" if declared else "as hvpspec assumes unless told otherwise"
    raise InputError(
        f"the loss is not a mean over the examples, {what}: say what its mean divides by with "
        "hvpspec.Loss(loss, weight=lambda outputs, targets: ...), or, if it "
        "couples the examples, give all data as one batch with hvpspec.Loss(loss, whole=True)"
    )


def _no_derivative(how: str) -> NotDifferentiableError:
    """Say that products are not the derivative of the gradient."""
    return NotDifferentiableError(
        f"the products are not the derivative of the gradient: {how}; look for an "
        "autograd.Function whose backward saves an intermediate or runs without a graph, for hooks "
        "on gradients, and for functions whose derivative is wrong in PyTorch, as abs() at 0"
    )
