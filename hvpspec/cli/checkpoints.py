"""``hvpspec train`` and ``hvpspec info``: write and describe checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from hvpspec.cli.files import spare_recorded_data
from hvpspec.cli.options import (
    DATA_HELP,
    NET_HELP,
    READ,
    WRITTEN,
    DataDir,
    JsonFile,
    LossName,
    NetArgs,
    NetName,
    Seed,
    Subset,
    WeightsName,
    of_method,
    of_model,
    of_output,
    parse_net_args,
)
from hvpspec.cli.problem import show
from hvpspec.errors import InputError, first_line
from hvpspec.progress import bar
from hvpspec.results import text_table

if TYPE_CHECKING:
    from hvpspec.zoo import Dataset, DataSource, NetworkSpec, TrainingSettings


def train(
    net: Annotated[str, of_model("--net", NET_HELP, metavar="NAME"), READ],
    data: Annotated[str, of_model("--data", DATA_HELP, metavar="SOURCE"), READ],
    out: Annotated[Path, of_output("--out", "Checkpoint to write.", metavar="FILE"), WRITTEN],
    net_arg: NetArgs = None,
    data_dir: DataDir = None,
    subset: Subset = None,
    loss: Annotated[LossName, of_model("--loss", "Loss, averaged over a batch.")] = "cross_entropy",
    l2: Annotated[float, of_model("--l2", "Coefficient of ‖θ‖² in the objective.")] = 0.0,
    optimizer: Annotated[
        Literal["sgd", "adam", "lbfgs"],
        of_method("--optimizer", "lbfgs needs --batch-size to be all examples."),
    ] = "sgd",
    lr: Annotated[
        float | None,
        of_method("--lr", "Learning rate.", "0.1 for sgd, 0.001 for adam, 1 for lbfgs"),
    ] = None,
    momentum: Annotated[float, of_method("--momentum", "Momentum of sgd.")] = 0.0,
    batch_size: Annotated[int, of_method("--batch-size", "Examples per step.")] = 64,
    epochs: Annotated[int, of_method("--epochs", "Passes over the data.")] = 20,
    seed: Seed = 0,
) -> None:
    """Train a network and write a checkpoint; the same seed gives the same weights."""
    arguments = parse_net_args(net_arg) or {}
    from hvpspec.zoo import DataSource, NetworkSpec, TrainingSettings

    settings = TrainingSettings(optimizer, lr, momentum, batch_size, epochs, l2, seed, loss)
    source = DataSource(data, subset=subset)
    train_and_save(NetworkSpec(net, arguments), source, settings, out, data_dir=data_dir)


def train_and_save(
    network: NetworkSpec,
    source: DataSource,
    settings: TrainingSettings,
    out: Path,
    *,
    data_dir: Path | None = None,
) -> None:
    """Train with a progress bar, write the checkpoint and print losses and accuracies.

    Raises:
        HvpspecError: something does not exist or does not fit, or training diverged.
    """
    from hvpspec import zoo

    model = zoo.build_network(network.name, network.arguments, seed=settings.seed)
    # A user's own code may return batches, which `train` refuses.
    load = partial(zoo.load_data, source.source, data_dir=data_dir)
    examples = cast("Dataset", load(subset=source.subset))
    with bar("training") as update:

        def progress(epoch: int, objective: float) -> None:
            update(epoch, settings.epochs, f"training, objective {objective:.4f}")

        history = zoo.train(model, examples, settings, progress=progress)
    zoo.save_checkpoint(out, model, network, data=source, settings=settings, history=history)
    rows = [
        ("training loss", f"{history.loss:.5g}", f"{settings.loss}, {len(examples):,} examples")
    ]
    if history.accuracy is not None:
        rows.append(("training accuracy", f"{history.accuracy:.2%}", ""))
    try:
        test = cast("Dataset", load(split="test"))
    except InputError as error:
        rows.append(("test loss", "–", first_line(error)))
    else:
        loss, accuracy = zoo.evaluate(model, test, loss=settings.loss)
        rows.append(("test loss", f"{loss:.5g}", f"{len(test):,} examples"))
        if accuracy is not None:
            rows.append(("test accuracy", f"{accuracy:.2%}", ""))
    typer.echo(text_table(f"{network} on {examples.name}", rows))
    typer.echo(f"wrote {out}")


def info(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint; or weights (.pt, .safetensors), with --net."), READ
    ],
    net: NetName = None,
    net_arg: NetArgs = None,
    weights: WeightsName = None,
    json_file: JsonFile = None,
) -> None:
    """Describe a checkpoint: network, tensors, data, training, versions."""
    arguments = parse_net_args(net_arg)
    from hvpspec.zoo import load_checkpoint

    found = load_checkpoint(checkpoint, net=net, net_arguments=arguments, weights=weights)
    if json_file:
        spare_recorded_data(found, None, [("--json", json_file)])
    show(found.summary(), json_file, found.to_dict())
