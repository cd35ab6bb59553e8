"""From a checkpoint and options to the Hessian they mean."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from hvpspec.cli.apart import Named, Names, named_by, spare_recorded_data
from hvpspec.cli.options import (
    L2,
    CheckpointEvery,
    CheckpointFolder,
    ChunkSize,
    DataDir,
    DataName,
    Engine,
    IgnoreIndex,
    Loss,
    LossName,
    Mode,
    ModelFile,
    NetArgs,
    NetName,
    Params,
    PseudoGradient,
    Subset,
    WeightsName,
    parse_net_args,
    refuse_together,
)
from hvpspec.cli.processes import joined, num_processes, rank
from hvpspec.errors import InputError
from hvpspec.results import Subject

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from hvpspec import GGNOperator, HessianOperator, SymmetricOperator
    from hvpspec.curvature.choice import Plan
    from hvpspec.curvature.operator import CurvatureOperator


@dataclass(frozen=True)
class Problem:
    """A Hessian, its Gauss-Newton part, and what it is the Hessian of."""

    hessian: HessianOperator
    gauss_newton: Callable[[], GGNOperator]
    about: Subject
    checkpoint: Path | None = None
    checkpoint_every: float | None = None
    start: float = field(default_factory=time.perf_counter)
    plans: dict[str, tuple[Plan, ...]] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        """What it is, for the record with the way in which products were made up to now."""
        about = replace(self.about, notes=self.hessian.notes)
        if about.provenance is None:
            return about
        so_far = {
            "plan": [
                {"matrix": name, **asdict(plan)}
                for name, plans in self.plans.items()
                for plan in plans
            ],
            "seconds": time.perf_counter() - self.start,
        }
        return replace(about, provenance={**about.provenance, **so_far})

    @contextmanager
    def lasting(
        self, operator: CurvatureOperator, name: str = "network"
    ) -> Iterator[SymmetricOperator]:
        """An operator to be asked, whose products are kept, if that is wanted.

        Args:
            operator: one of the matrices, or a block of it.
            name: of its own folder, and in the record.
        """
        with self._kept(operator, name) as lasting:
            yield lasting
        self.plans[name] = operator.plan

    @contextmanager
    def _kept(self, operator: CurvatureOperator, name: str) -> Iterator[SymmetricOperator]:
        """The operator, or one that keeps its products."""
        if self.checkpoint is None:
            yield operator
            return
        from hvpspec import RecordedOperator

        groups = num_processes() // operator.ranks.size
        if groups > 1:  # which have probes of their own
            name = f"{name} {rank() // operator.ranks.size}"
        every = {} if self.checkpoint_every is None else {"every": self.checkpoint_every}
        with RecordedOperator(operator, self.checkpoint / name, **every) as recorded:
            yield recorded


#: What loads the problem that a command's options choose; of the processes that share out the data
#: another ``group`` than all can be named.
LoadProblem = Callable[..., Problem]


def load_problem(
    model: ModelFile,
    *,
    net: NetName = None,
    net_arg: NetArgs = None,
    weights: WeightsName = None,
    data: DataName = None,
    data_dir: DataDir = None,
    subset: Subset = None,
    loss: Loss = None,
    ignore_index: IgnoreIndex = None,
    l2: L2 = None,
    params: Params = None,
    mode: Mode = "eval",
    pseudo_gradient: PseudoGradient = False,
    chunk_size: ChunkSize = None,
    engine: Engine = None,
    checkpoint: CheckpointFolder = None,
    checkpoint_every: CheckpointEvery = None,
    group: Any = None,  # a ProcessGroup, whose name would load PyTorch here
    told: Mapping[str, Any] | None = None,
    written: Named = (),
) -> Problem:
    """Read a checkpoint and make the Hessian of its loss; the defaults are those of its training.

    Args:
        model: checkpoint, or weights for ``net``.
        net: name of the network.
        net_arg: its arguments as ``name=value``.
        weights: which of the weights in a file that is no checkpoint.
        data: source of the data.
        data_dir: folder of the full data sets.
        subset: number of first examples.
        loss: name of the loss, or ``module:callable``; cross-entropy if nothing is recorded either.
        ignore_index: a class that does not count in the cross-entropy.
        l2: coefficient of the squared norm; 0 if nothing is recorded either.
        params: patterns of the parameters.
        mode: whether modules are put in eval mode, or left as ``net`` builds them.
        pseudo_gradient: whether the gradient may be another than the loss's.
        chunk_size: most examples in one graph.
        engine: how to multiply; None for one that is chosen.
        checkpoint: folder in which products are kept.
        checkpoint_every: seconds between writing there.
        group: processes that share out the data; None for this one alone.
        told: all options of the command, for the record.
        written: the files that it writes, each behind its option.

    Raises:
        HvpspecError: something does not exist, does not fit or is not finite.
    """
    import hvpspec
    from hvpspec.zoo import Dataset, load_checkpoint

    if checkpoint is None:
        refuse_together("belongs to --checkpoint", checkpoint_every=checkpoint_every)
    elif engine == "auto":
        raise InputError(
            "--engine auto may change the engine after some products, and a run from --checkpoint "
            "would end with other bits; name one engine, or leave --engine out"
        )
    modules: Literal["eval", "as given"] = "eval" if mode == "eval" else "as given"
    trained = load_checkpoint(
        model,
        net=net,
        net_arguments=parse_net_args(net_arg),
        weights=weights,
        mode=modules,
    )
    settings = trained.settings
    loss = loss or (settings.loss if settings else "cross_entropy")
    if l2 is None:
        l2 = settings.l2 if settings else 0.0
    function = _loss(loss, ignore_index)
    if data is None:
        spare_recorded_data(trained, data_dir, written)
    examples = trained.load_data(data, data_dir=data_dir, subset=subset)
    # In the modes as given, buffers may change, and one example may be too few.
    if mode == "eval":
        _check_fit(trained.model, examples, function)
    if isinstance(examples, Dataset):
        name, num_examples, tensors = examples.name, len(examples), examples.tensors
    else:
        # Only a source that the user names can give batches.
        name, num_examples, tensors = str(data), None, None
    objective = (
        trained.model,
        function,
        _own_share(tensors or examples, num_examples, group),
    )
    options: dict[str, Any] = {
        "params": params,
        "l2": l2,
        "mode": modules,
        "pseudo_gradient": pseudo_gradient,
        "chunk_size": chunk_size,
        # Where a run goes on, its products must not depend on how many were made before, either.
        "engine": engine or ("linearised" if checkpoint else "auto"),
        "group": group,
    }
    hessian = hvpspec.HessianOperator(*objective, **options)
    subject = Subject(
        network=str(trained.network),
        data=name,
        num_examples=num_examples,
        num_parameters=hessian.shape[0],
        loss=loss if ignore_index is None else f"{loss} (ignore_index={ignore_index})",
        l2=l2,
        params=tuple(params) if params else None,
        model=str(trained.path),
        # It takes a pass over the data, and stands in files alone.
        provenance=_provenance(hessian, told) if told and told["json_file"] else None,
    )
    gauss_newton = partial(hvpspec.GGNOperator, *objective, **options)
    return Problem(hessian, gauss_newton, subject, checkpoint, checkpoint_every)


def _loss(name: str, ignore_index: int | None) -> Any:
    """The loss of a name, or of a user's own code."""
    from hvpspec import Loss
    from hvpspec.zoo import build_loss
    from hvpspec.zoo.importing import call_by_name, find_by_name

    if name in get_args(LossName):
        return build_loss(cast("LossName", name), ignore_index=ignore_index)
    if ignore_index is not None:
        raise InputError(f"--ignore-index belongs to --loss cross_entropy, not to {name}")
    found = find_by_name(name)
    if isinstance(found, type):
        found = call_by_name(name, {})
    if not isinstance(found, Loss) and not callable(found):
        raise InputError(
            f"{name} is a {type(found).__name__}, which cannot be called with outputs and targets"
        )
    return found


def _check_fit(model: nn.Module, examples: Any, loss: Any) -> None:
    """Raise InputError if network, loss and data do not fit, as far as the first examples tell."""
    import torch

    from hvpspec import Loss
    from hvpspec.zoo import Dataset, check_fit

    function = loss.function if isinstance(loss, Loss) else loss
    if isinstance(examples, Dataset):
        check_fit(model, examples.tensors, function)
        return
    match next(iter(examples), None):
        case (torch.Tensor() as inputs, torch.Tensor() as targets):  # or a list; others are left
            check_fit(model, (inputs, targets), function, whole=True)


def _provenance(hessian: HessianOperator, told: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to compute the same again, and to see that it is the same."""
    import platform

    import numpy as np
    import torch

    return {
        "options": {name: _plain(value) for name, value in told.items() if value is not None},
        "seed": told["seed"] or 0,
        "fingerprint": hessian.fingerprint(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": platform.machine(),
        "device": str(hessian.device),
        "threads": torch.get_num_threads(),
        "processes": num_processes(),
    }


def _plain(value: Any) -> Any:
    """An option's value as JSON can hold it."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float) else str(value)


class _EveryFew:
    """Every so-manieth batch of a sequence that can be read again."""

    def __init__(self, batches: Iterable[Any], start: int, step: int) -> None:
        self._batches, self._start, self._step = batches, start, step

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in islice(iter(self._batches), self._start, None, self._step):
            yield batch
            empty = False
        if empty:
            raise InputError(
                f"the data have no batch for one of the {self._step} processes that share them: "
                "start fewer, or make the batches smaller; they must also be there on every pass"
            )


def _own_share(data: Any, num_examples: int | None, group: ProcessGroup | None) -> Any:
    """The examples, or batches, of one process of several."""
    if group is None:
        return data
    rank, size = group.rank(), group.size()
    if num_examples is None:
        return _EveryFew(data, rank, size)
    if num_examples < size:
        raise InputError(
            f"{num_examples} examples are too few for {size} processes to share; start fewer, or "
            "share out probes"
        )
    return tuple(tensor[rank::size] for tensor in data)


def on_problem(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`load_problem` beside its own.

    Args:
        command: its first argument is a :data:`LoadProblem`, to be called when its own options have
            been checked; the others are options.
    """
    shared = dict(inspect.signature(load_problem, eval_str=True).parameters)
    del shared["group"], shared["told"], shared["written"]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    files = [p.name for p in own if Names.WRITTEN in get_args(p.annotation)]

    def run(**options: Any) -> None:
        chosen = {name: options.pop(name) for name in shared}
        written = named_by(command, options, Names.WRITTEN)
        with joined() as together:
            told = {**chosen, **options}
            if rank() > 0:  # the first process writes what all of them have found
                options |= dict.fromkeys(files)
            load = partial(load_problem, **chosen, group=together, told=told, written=written)
            command(load, **options)

    model, *others = shared.values()
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (model, *own, *others)]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # What Typer reads options from.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
