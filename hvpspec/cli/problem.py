"""From a checkpoint and options to the Hessian that a command analyses."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import typer

from hvpspec.cli import options as given
from hvpspec.cli.files import spare_recorded_data, written_files
from hvpspec.cli.processes import joined, num_processes, own_share, rank
from hvpspec.errors import InputError
from hvpspec.files import write_json
from hvpspec.results import Subject, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from hvpspec import GGNOperator, HessianOperator, SymmetricOperator
    from hvpspec.curvature.choice import Plan
    from hvpspec.curvature.operator import CurvatureOperator
    from hvpspec.zoo import Checkpoint, DataSource


@dataclass
class Problem:
    """A Hessian, its Gauss-Newton part, and where they come from."""

    hessian: HessianOperator
    gauss_newton: Callable[[], GGNOperator]
    about: Subject
    trained: Checkpoint
    source: DataSource | None
    checkpoint: Path | None = None
    checkpoint_every: float | None = None
    start: float = field(default_factory=time.perf_counter)
    plans: dict[str, tuple[Plan, ...]] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        """What the Hessian belongs to, and how its products have been computed so far."""
        about = replace(self.about, notes=self.hessian.notes)
        if about.provenance is None:
            return about
        plans = [
            {"matrix": name, **asdict(plan)} for name, all_ in self.plans.items() for plan in all_
        ]
        so_far = {"plan": plans, "seconds": time.perf_counter() - self.start}
        return replace(about, provenance={**about.provenance, **so_far})

    @contextmanager
    def lasting(
        self, operator: CurvatureOperator, name: str = "network"
    ) -> Iterator[SymmetricOperator]:
        """Wrap an operator so that its products are saved, if ``--checkpoint`` is given.

        Args:
            operator: one of the matrices, or a block of it.
            name: name of its folder and of its plan in the record.
        """
        if self.checkpoint is None:
            yield operator
        else:
            from hvpspec import RecordedOperator

            groups = num_processes() // operator.ranks.size
            # If groups of processes divide the probes, each group has products of its own.
            place = f"{name} {rank() // operator.ranks.size}" if groups > 1 else name
            every = {} if self.checkpoint_every is None else {"every": self.checkpoint_every}
            with RecordedOperator(operator, self.checkpoint / place, **every) as recorded:
                yield recorded
        self.plans[name] = operator.plan


def show(text: str, json_file: Path | None, content: Mapping[str, Any]) -> None:
    """Print a result, and write it as JSON if a file is named."""
    typer.echo(text)
    if json_file:
        write_json(json_file, content)
        typer.echo(f"wrote {json_file}")


def draw(figure: Figure, out: Path) -> None:
    """Write a picture, and print its name."""
    from hvpspec.plotting import save_figure

    save_figure(figure, out)
    typer.echo(f"wrote {out}")


#: Loads the problem that a command's options select. The argument ``group`` sets the processes that
#: share the data, by default all.
LoadProblem = Callable[..., Problem]


def load_problem(
    model: given.ModelFile,
    *,
    net: given.NetName = None,
    net_arg: given.NetArgs = None,
    weights: given.WeightsName = None,
    data: given.DataName = None,
    data_dir: given.DataDir = None,
    subset: given.Subset = None,
    loss: given.Loss = None,
    ignore_index: given.IgnoreIndex = None,
    l2: given.L2 = None,
    params: given.Params = None,
    mode: given.Mode = "eval",
    pseudo_gradient: given.PseudoGradient = False,
    chunk_size: given.ChunkSize = None,
    engine: given.Engine = None,
    checkpoint: given.CheckpointFolder = None,
    checkpoint_every: given.CheckpointEvery = None,
    group: Any = None,  # a ProcessGroup, whose name would load PyTorch here
    told: Mapping[str, Any] | None = None,
    written: Sequence[tuple[str, Path]] = (),
) -> Problem:
    """Read a checkpoint and build the Hessian of its loss, by default as in training.

    The arguments are the options of the commands, except for the last three: ``group``, the
    processes that share the data (None for one process); ``told``, all options of the command, for
    the record; ``written``, the files that it will write, each after its option.

    Raises:
        HvpspecError: something does not exist, does not fit or is not finite.
    """
    import hvpspec
    from hvpspec.zoo import Dataset, DataSource, load_checkpoint

    if checkpoint is None:
        given.refuse_together("belongs to --checkpoint", checkpoint_every=checkpoint_every)
    elif engine == "auto":
        raise InputError(
            "--engine auto may change the engine during a run, so that a run resumed from "
            "--checkpoint would not give the same bits; name one engine, or leave --engine out"
        )
    modules: Literal["eval", "as given"] = "eval" if mode == "eval" else "as given"
    arguments = given.parse_net_args(net_arg)
    trained = load_checkpoint(
        model, net=net, net_arguments=arguments, weights=weights, mode=modules
    )
    if trained.settings:
        loss = loss or trained.settings.loss
        l2 = trained.settings.l2 if l2 is None else l2
    loss, l2 = loss or "cross_entropy", l2 or 0.0
    function = _loss(loss, ignore_index)
    if data is None:
        spare_recorded_data(trained, data_dir, written)
    examples = trained.load_data(data, data_dir=data_dir, subset=subset)
    # Outside eval mode, buffers may change, and one example may be too few.
    if mode == "eval":
        _check_fit(trained.model, examples, function)
    if isinstance(examples, Dataset):
        name, num_examples, tensors = examples.name, len(examples), examples.tensors
    else:
        # Only data that the user names can come in batches.
        name, num_examples, tensors = str(data), None, None
    objective = trained.model, function, own_share(tensors or examples, num_examples, group)
    options: dict[str, Any] = {
        "params": params,
        "l2": l2,
        "mode": modules,
        "pseudo_gradient": pseudo_gradient,
        "chunk_size": chunk_size,
        # A resumed run does not know how many products came before, by which auto would choose.
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
        # Costs a pass over the data, and is shown in files only.
        provenance=_provenance(hessian, told) if told and told["json_file"] else None,
    )
    gauss_newton = partial(hvpspec.GGNOperator, *objective, **options)
    source = DataSource(data) if data else trained.data
    if source and subset:
        source = replace(source, subset=subset)
    return Problem(hessian, gauss_newton, subject, trained, source, checkpoint, checkpoint_every)


def _loss(name: str, ignore_index: int | None) -> Any:
    """Return the loss with a given name, or the one of a user's own code."""
    from hvpspec import Loss
    from hvpspec.zoo import build_loss
    from hvpspec.zoo.importing import call_by_name, find_by_name

    known = get_args(given.LossName)
    if name in known:
        return build_loss(cast("given.LossName", name), ignore_index=ignore_index)
    if ":" not in name:
        raise InputError(f"--loss {name!r} is not one of {', '.join(known)}, nor module:callable")
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
    """Raise InputError if network, loss and data do not fit, judged by the first examples."""
    import torch

    from hvpspec import Loss
    from hvpspec.zoo import Dataset, check_fit

    function = loss.function if isinstance(loss, Loss) else loss
    if isinstance(examples, Dataset):
        check_fit(model, examples.tensors, function)
        return
    match next(iter(examples), None):
        case (torch.Tensor() as inputs, torch.Tensor() as targets):  # a tuple or a list
            check_fit(model, (inputs, targets), function, whole=True)


def _provenance(hessian: HessianOperator, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is needed to repeat the computation, and to check that it is the same."""
    import platform

    import numpy as np
    import torch

    return {
        "options": plain({name: value for name, value in told.items() if value is not None}),
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


def on_problem(command: Callable[..., None], *, without: Sequence[str] = ()) -> Callable[..., None]:
    """Add the options of :func:`load_problem` to those of a command.

    Args:
        command: a function whose first argument is a :data:`LoadProblem`, to be called after it has
            checked its own options; all other arguments are options.
        without: options that mean nothing to the command.
    """
    shared = dict(inspect.signature(load_problem, eval_str=True).parameters)
    # Not options: the wrapper passes these itself.
    for name in ("group", "told", "written", *without):
        del shared[name]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    files = [p.name for p in own if getattr(get_args(p.annotation)[-1], "use", "") == "written"]

    def run(**options: Any) -> None:
        chosen = {name: options.pop(name) for name in shared}
        written = written_files(command, options)
        with joined() as together:
            told = {**chosen, **options}
            if rank() > 0:  # all processes have the same result, and the first writes it
                options |= dict.fromkeys(files)
            load = partial(load_problem, **chosen, group=together, told=told, written=written)
            command(load, **options)

    # The order on the help page: the model, what the command adds, and all other shared options.
    model, *others = shared.values()
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (model, *own, *others)]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # Typer reads the options from these two attributes.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
