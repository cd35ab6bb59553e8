"""From a checkpoint and options to the Hessian they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvpspec.cli.options import LossName, parse_net_args
from hvpspec.report import Subject, network_text

if TYPE_CHECKING:
    from hvpspec import HessianOperator


@dataclass(frozen=True)
class Problem:
    """A Hessian, and what it is the Hessian of."""

    hessian: HessianOperator
    subject: Subject


def load_problem(
    model: Path,
    *,
    net: str | None = None,
    net_arg: list[str] | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    subset: int | None = None,
    loss: LossName | None = None,
    l2: float | None = None,
    params: list[str] | None = None,
    chunk_size: int | None = None,
) -> Problem:
    """Read a checkpoint and make the Hessian of its loss; the defaults are those of its training.

    Args:
        model: checkpoint, or weights for ``net``.
        net: name of the network.
        net_arg: its arguments as ``name=value``.
        data: source of the data.
        data_dir: folder of the full data sets.
        subset: number of first examples.
        loss: name of the loss; cross-entropy if nothing is recorded either.
        l2: coefficient of the squared norm; 0 if nothing is recorded either.
        params: patterns of the parameters.
        chunk_size: most examples in one graph.

    Raises:
        HvpspecError: something does not exist, does not fit or is not finite.
    """
    from hvpspec import HessianOperator
    from hvpspec.zoo import Dataset, build_loss, evaluate, load_checkpoint

    checkpoint = load_checkpoint(model, net=net, net_arguments=parse_net_args(net_arg))
    settings = checkpoint.settings
    loss = loss or (settings.loss if settings else "cross_entropy")
    if l2 is None:
        l2 = settings.l2 if settings else 0.0
    examples = checkpoint.load_data(data, data_dir=data_dir, subset=subset)
    if isinstance(examples, Dataset):
        # Says in plain words if network, loss and data do not fit each other.
        evaluate(checkpoint.model, examples.subset(1), loss=loss)
        name, num_examples, tensors = examples.name, len(examples), examples.tensors
    else:
        # Only a source that the user names can give batches.
        name, num_examples, tensors = str(data), None, None
    hessian = HessianOperator(
        checkpoint.model,
        build_loss(loss),
        tensors or examples,
        params=params,
        l2=l2,
        chunk_size=chunk_size,
    )
    subject = Subject(
        network=network_text(checkpoint.network.name, checkpoint.network.arguments),
        data=name,
        num_examples=num_examples,
        num_parameters=hessian.shape[0],
        loss=loss,
        l2=l2,
        params=tuple(params) if params else None,
        model=str(checkpoint.path),
    )
    return Problem(hessian, subject)
