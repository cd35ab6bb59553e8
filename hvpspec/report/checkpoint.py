"""A checkpoint's description."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hvpspec.report.files import network_text, pairs
from hvpspec.results import text_table

if TYPE_CHECKING:
    from hvpspec.zoo import Checkpoint


def checkpoint_to_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """Turn a checkpoint's description into plain data for JSON.

    Version 1 of the format ``hvpspec-checkpoint-info``: ``file``; ``network`` (``name``,
    ``arguments``); ``num_parameters``; ``tensors``, each with ``name``, ``shape``, ``dtype``,
    ``count`` and ``kind`` (``parameter`` or ``buffer``); ``data`` (``source``, ``split``,
    ``subset``), ``settings`` and ``history`` of training, null where unknown; ``versions`` of the
    software that wrote it; ``weights``, where in a file of other people's they were found, or null.

    Args:
        checkpoint: the checkpoint.
    """
    return {
        "format": "hvpspec-checkpoint-info",
        "version": 1,
        "file": str(checkpoint.path),
        "network": {
            "name": checkpoint.network.name,
            "arguments": dict(checkpoint.network.arguments),
        },
        "num_parameters": checkpoint.num_parameters,
        "tensors": _tensors(checkpoint),
        "data": asdict(checkpoint.data) if checkpoint.data else None,
        "settings": asdict(checkpoint.settings) if checkpoint.settings else None,
        "history": asdict(checkpoint.history) if checkpoint.history else None,
        "versions": dict(checkpoint.versions),
        "weights": checkpoint.weights,
    }


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """Lay a checkpoint out for a person: where it comes from, and its tensors.

    Args:
        checkpoint: the checkpoint.
    """
    data, settings, history = checkpoint.data, checkpoint.settings, checkpoint.history
    rows = [
        ("network", network_text(checkpoint.network.name, checkpoint.network.arguments)),
        ("parameters", f"{checkpoint.num_parameters:,}"),
        ("data", _data_text(data.source, data.split, data.subset) if data else "not recorded"),
        ("training", pairs(asdict(settings)) if settings else "not recorded"),
    ]
    if history:
        accuracy = f", accuracy {history.accuracy:.2%}" if history.accuracy is not None else ""
        rows.append(("result", f"training loss {history.loss:.5g}{accuracy}"))
    if checkpoint.weights is not None:
        rows.append(("weights", checkpoint.weights))
    rows.append(("written by", pairs(checkpoint.versions, " ") or "not recorded"))

    tensors = [("tensor", "shape", "dtype", "count", "")]
    for t in _tensors(checkpoint):
        shape = " × ".join(map(str, t["shape"])) or "scalar"
        kind = "" if t["kind"] == "parameter" else t["kind"]
        tensors.append((t["name"], shape, t["dtype"], f"{t['count']:>12,}", kind))
    return f"{text_table(str(checkpoint.path), rows)}\n\n{text_table('', tensors)}"


def _tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Describe every tensor of a network."""
    parameters = {n for n, _ in checkpoint.model.named_parameters(remove_duplicate=False)}
    return [
        {
            "name": t.name,
            "shape": list(t.shape),
            "dtype": t.dtype,
            "count": math.prod(t.shape),
            "kind": "parameter" if t.name in parameters else "buffer",
        }
        for t in checkpoint.tensors
    ]


def _data_text(source: str, split: str, subset: int | None) -> str:
    """Name data as a checkpoint records them."""
    return f"{source}, {split} split" + (f", first {subset:,} examples" if subset else "")
