"""``hvpspec info``: say what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hvpspec.cli.apart import Names, spare_recorded_data
from hvpspec.cli.options import JsonFile, NetArgs, NetName, WeightsName, parse_net_args
from hvpspec.files import check_target
from hvpspec.results import write_json


def info(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Checkpoint, or weights (.pt, .safetensors) together with --net."),
        Names.READ,
    ],
    net: NetName = None,
    net_arg: NetArgs = None,
    weights: WeightsName = None,
    json_file: JsonFile = None,
) -> None:
    """Describe a checkpoint: network, tensors, data, training, versions."""
    arguments = parse_net_args(net_arg)
    if json_file:
        check_target(json_file)
    from hvpspec.zoo import load_checkpoint

    found = load_checkpoint(checkpoint, net=net, net_arguments=arguments, weights=weights)
    if json_file:
        spare_recorded_data(found, None, [("--json", json_file)])
    typer.echo(found.summary())
    if json_file:
        write_json(json_file, found.to_dict())
        typer.echo(f"wrote {json_file}")
