"""The base of all results: a short repr, a table as text or HTML, and plain data for JSON."""

from __future__ import annotations

import html
import math
import shutil
import textwrap
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hvpspec import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Most characters of one value in a repr.
_LONGEST = 60
#: Least width of the last column of a table.
_NARROWEST = 10

#: Present names of the methods of an index by former ones, which scripts and files may contain.
FORMER_NAMES = {"ldl": "inertia", "slq": "quadrature", "chebyshev": "filtered"}

#: The version of all formats of files.
VERSION = 1

#: A label, a value, and what it means.
Row = Sequence[str]


@dataclass(frozen=True)
class Subject:
    """What a result was computed from.

    Attributes:
        network: name and arguments of the network.
        data: source of the examples.
        num_examples: number of examples; None if the data are batches of unknown size.
        num_parameters: size of the Hessian.
        loss: name of the loss.
        l2: coefficient of the squared norm of the parameters.
        params: patterns that selected the parameters; None for all.
        model: file of the weights.
        provenance: what is needed to repeat the computation, as plain data; None if unknown.
        notes: remarks on how the result was computed.
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
        """One line, for the title of a picture or a table."""
        examples = f", {self.num_examples:,} examples" if self.num_examples is not None else ""
        some = f" of {', '.join(self.params)}" if self.params else ""
        return f"{self.network} on {self.data}{examples}; {self.num_parameters:,} parameters{some}"


class Result:
    """Base class of results, which are frozen dataclasses.

    By default, the table and the plain data contain all fields. A subclass may override
    :meth:`rows` (the table), ``_brief`` (what ``repr`` shows) and ``_content`` (the plain data).
    """

    #: Name of the file format; empty if the result has no file of its own.
    _FORMAT: ClassVar[str] = ""

    def __repr__(self) -> str:
        """The class and the most important values, in a line or two."""
        shown = ", ".join(f"{name}={brief(value)}" for name, value in self._brief().items())
        return f"{type(self).__name__}({shown})"

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in [*self.rows(), *closing_rows(None, self._notes)]
        )
        return f"<table><caption>{html.escape(self._title())}</caption>{rows}</table>"

    def summary(self, *, subject: Subject | None = None, seconds: float | None = None) -> str:
        """Return the table that the command prints.

        Args:
            subject: what the result was computed from, if known.
            seconds: time taken, if known.

        Returns:
            Lines of aligned columns, at most as wide as the terminal.
        """
        notes = self._notes or (subject.notes if subject else ())
        rows = [*self.rows(subject), *closing_rows(seconds, notes)]
        return text_table(subject.title if subject else self._title(), rows)

    def to_dict(
        self, *, subject: Subject | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Return plain data, as ``--json`` writes them; unknown and non-finite values are None.

        Args:
            subject: what it was computed from; used only if the result has a file format.
            seconds: time taken; likewise.
        """
        if not self._FORMAT:
            return self._content()
        return {**envelope(self._FORMAT, subject), **self._content(), "seconds": seconds}

    def rows(self, subject: Subject | None = None) -> list[Row]:
        """Return the lines of the table, each a label, a value and its meaning."""
        return [(name, brief(value)) for name, value in self._brief().items()]

    @property
    def _notes(self) -> tuple[str, ...]:
        """Remarks that the result itself contains."""
        return ()

    def _title(self) -> str:
        """The title of the table if the subject is unknown."""
        return type(self).__name__

    def _brief(self) -> dict[str, object]:
        """What ``repr`` shows, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]

    def _content(self) -> dict[str, Any]:
        """The plain data, by name."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]


class Drawn(Result):
    """A result that can be drawn, by the method ``_draw`` of a subclass."""

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the result.

        Args:
            ax: axes to draw into; None for a new figure.

        Returns:
            The figure, which a notebook displays.

        Raises:
            InputError: the result does not contain what the picture needs.
        """
        return self._draw(ax)

    @abstractmethod
    def _draw(self, ax: Axes | None) -> Figure:
        """Draw into given axes or a new figure."""


def envelope(kind: str, subject: Subject | None) -> dict[str, Any]:
    """Return the first fields of every file: format, version, writer and subject."""
    about = asdict(subject) if subject else None
    return {
        "format": kind,
        "version": VERSION,
        "hvpspec": __version__,
        "provenance": about.pop("provenance") if about else None,
        "notes": list(about.pop("notes")) if about else [],
        "subject": about,
    }


def plain(x: Any) -> Any:
    """Convert a value to types that JSON has; numbers that are not finite become None.

    >>> plain({"a": (1.0, float("nan"))})
    {'a': [1.0, None]}
    """
    if isinstance(x, Result):
        return x.to_dict()
    if hasattr(x, "tolist"):  # a tensor or an array; neither library is imported here
        x = x.tolist()
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if is_dataclass(x):
        return {f.name: plain(getattr(x, f.name)) for f in fields(x)}
    return x if isinstance(x, (str, int, type(None))) else str(x)


def brief(x: object) -> str:
    """Return a value in a few characters; for a tensor or a long list, its size.

    >>> brief(list(range(100)))
    '<100 entries>'
    """
    if isinstance(x, float):  # short decimals as Python writes them, others rounded
        return f"{x:.6g}" if x != round(x, 6) else repr(x)
    shape = getattr(x, "shape", None)
    if shape is not None:
        return f"<shape {tuple(shape)}>"
    text = repr(x)
    if len(text) <= _LONGEST:
        return text
    if isinstance(x, (list, tuple)):
        return f"<{len(x)} entries>"
    return f"{text[: _LONGEST - 3]}..."


def number(x: float) -> str:
    """Format a number to three significant digits."""
    return f"{x:.3g}"


def closing_rows(seconds: float | None, notes: Iterable[str]) -> list[Row]:
    """Return the last lines of a command's table: the time and the notes."""
    rows: list[Row] = [] if seconds is None else [("time", f"{seconds:.1f} s", "")]
    return rows + [("note", "", note) for note in notes]


def text_table(
    title: str, rows: Iterable[Row], *, right: bool = False, width: int | None = None
) -> str:
    """Align rows in columns; the last column is wrapped to the width of the terminal.

    Args:
        title: the first line.
        rows: cells of text; shorter rows end early.
        right: whether to align all columns but the last to the right.
        width: maximal length of a line; None for the width of the terminal.

    >>> print(text_table("a matrix", [("index", "1", "below 0"), ("products", "12", "")]))
    a matrix
     index     1   below 0
     products  12
    """
    rows = [tuple(row) for row in rows]
    width = shutil.get_terminal_size().columns if width is None else width
    num_columns = max(map(len, rows), default=0)
    filled = [(*row, *[""] * (num_columns - len(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)][:-1]
    # One space before each line, two between columns, and one left free at the end.
    room = max(width - 2 - sum(w + 2 for w in widths), _NARROWEST)
    lines = textwrap.wrap(title, max(width, _NARROWEST))
    for *cells, last in filled:
        padded = [f"{c:>{w}}" if right else f"{c:<{w}}" for c, w in zip(cells, widths, strict=True)]
        for i, piece in enumerate(textwrap.wrap(last, room) or [""]):
            before = padded if i == 0 else [" " * w for w in widths]
            lines.append(f" {'  '.join([*before, piece])}".rstrip())
    return "\n".join(lines)
