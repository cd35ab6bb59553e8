"""What all results share: what they are about, tables of facts, and how JSON is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hvpspec import __version__
from hvpspec.files import write_atomically


@dataclass(frozen=True)
class Subject:
    """What a result is about, as a reader would say it.

    Attributes:
        network: name and arguments of the network.
        data: where the examples come from.
        num_examples: how many there are; None where only the batches know.
        num_parameters: size of the Hessian.
        loss: name of the loss.
        l2: coefficient of the squared norm of the parameters.
        params: patterns that selected the parameters; None for all.
        model: file that the weights come from.
        provenance: what it takes to compute the same again, as plain data; None if unknown.
        notes: what a reader of the result should know about how it was computed.
    """

    network: str
    data: str
    num_examples: int | None
    num_parameters: int
    loss: str
    l2: float
    params: tuple[str, ...] | None
    model: str
    provenance: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """One line for the head of a picture or a table."""
        examples = f", {self.num_examples:,} examples" if self.num_examples is not None else ""
        some = f" of {', '.join(self.params)}" if self.params else ""
        return f"{self.network} on {self.data}{examples}; {self.num_parameters:,} parameters{some}"


def envelope(kind: str, subject: Subject | None) -> dict[str, Any]:
    """What every file of results begins with: format, version, writer, and what it is about."""
    about = asdict(subject) if subject else None
    return {
        "format": kind,
        "version": 1,
        "hvpspec": __version__,
        "provenance": about.pop("provenance") if about else None,
        "notes": list(about.pop("notes")) if about else [],
        "subject": about,
    }


def network_text(name: str, arguments: Mapping[str, object]) -> str:
    """Name a network with its arguments.

    >>> network_text("mlp2", {"activation": "tanh"})
    'mlp2 (activation=tanh)'
    """
    return f"{name} ({pairs(arguments)})" if arguments else name


def facts_table(title: str, rows: Iterable[Sequence[str]]) -> Table:
    """Lay out labelled facts without lines between them; their text is never read as markup.

    Args:
        title: what the facts are about.
        rows: a label, a value and perhaps what it means, the same number in every row.
    """
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None)
    table.show_header = False
    for i, row in enumerate(rows):
        if i == 0:
            table.add_column(style="bold", no_wrap=True)
            for _ in row[1:]:
                table.add_column(overflow="fold")
        table.add_row(*map(Text, row))
    return table


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data as JSON, whole or not at all.

    Args:
        path: the file; one that exists is replaced.
        content: finite numbers, strings, lists and mappings.

    Raises:
        InputError: it cannot be written.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def pairs(values: Mapping[str, object], joiner: str = "=") -> str:
    """List names with their values."""
    return ", ".join(f"{name}{joiner}{value}" for name, value in values.items())


def number(x: float) -> str:
    """A number to three digits."""
    return f"{x:.3g}"
