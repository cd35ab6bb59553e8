"""``hvpspec train``: train a network and keep it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hvpspec.cli.apart import Names
from hvpspec.cli.options import (
    DataDir,
    LossName,
    NetArgs,
    OptimizerName,
    Seed,
    Subset,
    parse_net_args,
)
from hvpspec.cli.progress import training_bar
from hvpspec.errors import InputError, first_line
from hvpspec.files import check_target
from hvpspec.results import text_table

if TYPE_CHECKING:
    from hvpspec.zoo import Dataset, DataSource, NetworkSpec, TrainingSettings


def train(
    net: Annotated[
        str,
        typer.Option(
            help="mlp2, mlp3, cnn, linear, or module:callable, which is imported and called."
        ),
        Names.CODE,
    ],
    data: Annotated[
        str,
        typer.Option(
            help="mnist-sample, fashion-mnist-sample, mnist, fashion-mnist, a .npz or .pt file, or"
            " module:callable, which is imported and called."
        ),
        Names.READ,
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint to write."), Names.WRITTEN],
    net_arg: NetArgs = None,
    data_dir: DataDir = None,
    subset: Subset = None,
    optimizer: Annotated[OptimizerName, typer.Option(help="How to descend.")] = "sgd",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate.", show_default="0.1 for sgd, 0.001 for adam, 1 for lbfgs"
        ),
    ] = None,
    momentum: Annotated[float, typer.Option(help="Momentum of sgd.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 64,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 20,
    l2: Annotated[float, typer.Option(help="Coefficient of ‖θ‖² in the objective.")] = 0.0,
    loss: Annotated[LossName, typer.Option(help="Loss, a mean.")] = "cross_entropy",
    seed: Seed = 0,
) -> None:
    """Train a network and write a checkpoint: same seed, same weights."""
    arguments = parse_net_args(net_arg) or {}
    check_target(out)
    from hvpspec.zoo import DataSource, NetworkSpec, TrainingSettings

    settings = TrainingSettings(
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        batch_size=batch_size,
        epochs=epochs,
        l2=l2,
        seed=seed,
        loss=loss,
    )
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
    """Train with a progress bar, write the checkpoint and print what training came to.

    Args:
        network: what to train.
        source: what to train it on.
        settings: how.
        out: checkpoint to write.
        data_dir: folder of the full data sets.

    Raises:
        HvpspecError: something does not exist or does not fit, or training diverged.
    """
    from hvpspec import zoo

    model = zoo.build_network(network.name, network.arguments, seed=settings.seed)
    examples = _dataset(source, "train", data_dir)
    with training_bar(settings.epochs) as progress:
        history = zoo.train(model, examples, settings, progress=progress)
    zoo.save_checkpoint(out, model, network, data=source, settings=settings, history=history)
    rows = [
        ("training loss", f"{history.loss:.5g}", f"{settings.loss}, {len(examples):,} examples")
    ]
    if history.accuracy is not None:
        rows.append(("training accuracy", f"{history.accuracy:.2%}", ""))
    try:
        test = _dataset(source, "test", data_dir)
    except InputError as error:
        rows.append(("test loss", "–", first_line(error)))
    else:
        loss, accuracy = zoo.evaluate(model, test, loss=settings.loss)
        rows.append(("test loss", f"{loss:.5g}", f"{len(test):,} examples"))
        if accuracy is not None:
            rows.append(("test accuracy", f"{accuracy:.2%}", ""))
    title = f"{network} on {examples.name}"
    typer.echo(text_table(title, rows))
    typer.echo(f"wrote {out}")


def _dataset(source: DataSource, split: Literal["train", "test"], data_dir: Path | None) -> Dataset:
    """Load data for training, which must all be in memory."""
    from hvpspec.zoo import Dataset, load_data

    subset = source.subset if split == "train" else None
    examples = load_data(source.source, split=split, data_dir=data_dir, subset=subset)
    if not isinstance(examples, Dataset):
        raise InputError(
            f"{source.source} gives batches; training needs all examples as (inputs, targets)"
        )
    return examples
