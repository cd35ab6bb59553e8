"""Results as JSON and as tables for people, and files written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from hvpspec import __version__
from hvpspec.files import write_atomically

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from hvpspec.plotting import SpectrumHistogram
    from hvpspec.spectrum import IndexResult
    from hvpspec.zoo import Checkpoint

#: Relative decreases of the loss below which a point counts as critical, and as nearly so.
CRITICAL_BELOW = 1e-12
NEARLY_CRITICAL_BELOW = 1e-6


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
    """

    network: str
    data: str
    num_examples: int | None
    num_parameters: int
    loss: str
    l2: float
    params: tuple[str, ...] | None
    model: str

    @property
    def title(self) -> str:
        """One line for the head of a picture or a table."""
        examples = f", {self.num_examples:,} examples" if self.num_examples is not None else ""
        some = f" of {', '.join(self.params)}" if self.params else ""
        return f"{self.network} on {self.data}{examples}; {self.num_parameters:,} parameters{some}"


def relative_decrease(gradient_norm: float, norm: float, loss: float) -> float:
    """How far a point is from critical, on a scale without units.

    A gradient of norm g says nothing by itself: the loss may be multiplied and the parameters
    stretched. A step of length g / ||H|| against the gradient lowers the quadratic model of the
    loss by at least g^2 / (2 ||H||); this divided by |f| has no units, and is the fraction of the
    loss that one safe step still takes away.

    Args:
        gradient_norm: g, the Euclidean norm of the gradient.
        norm: ||H||, the spectral norm of the Hessian.
        loss: f.

    Returns:
        ``g^2 / (2 ||H|| |f|)``: 0 at an exact critical point, and infinity where a gradient is left
        but the Hessian or the loss is 0, so that nothing bounds the decrease.

    >>> relative_decrease(0.5, 2.0, 0.25)
    0.25
    """
    if gradient_norm == 0:
        return 0.0
    scale = 2 * norm * abs(loss)
    # Divide twice: the square of a small gradient may underflow.
    return gradient_norm / scale * gradient_norm if scale > 0 else math.inf


def describe_gradient(gradient_norm: float, norm: float, loss: float) -> str:
    """Say in a sentence whether a point is critical, so that its index is that of a saddle.

    The measure is `relative_decrease`. Below 1e-12 the step's effect is at the level of round-off
    in a loss summed in float64 over many examples; below 1e-6 the point is as good as critical for
    most purposes.

    Args:
        gradient_norm: Euclidean norm of the gradient.
        norm: spectral norm of the Hessian.
        loss: the loss.

    >>> describe_gradient(0.0, 5.0, 0.2)
    'a critical point to working precision'
    """
    decrease = relative_decrease(gradient_norm, norm, loss)
    if decrease < CRITICAL_BELOW:
        return "a critical point to working precision"
    measure = f"(‖∇f‖² / 2‖H‖|f| = {decrease:.2g})"
    if decrease < NEARLY_CRITICAL_BELOW:
        return f"nearly a critical point {measure}"
    return f"not a critical point: the index describes the curvature here, not a saddle {measure}"


def index_to_dict(
    result: IndexResult, *, subject: Subject | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Turn an index into plain data for JSON.

    Version 1 of the format ``hvpspec-index`` has the fields of `hvpspec.IndexResult` under their
    own names, and besides:

    - ``subject``: the fields of `Subject`, or null;
    - ``lambda_min``, ``lambda_max``: the extreme eigenvalues, null if none were computed;
    - ``loss``, ``gradient_norm``: of the point, null if unknown;
    - ``relative_decrease``: see `relative_decrease`, null if unknown or infinite, and
      ``critical_point``: the sentence about it, or null;
    - ``bound``: the structural bound as ``{"upper", "psd_dim", "reason"}``, or null;
    - ``notes``: what a reader should know, a list of sentences;
    - ``seconds``: time taken, or null; ``hvpspec``: the version that computed it;
    - ``eigenvalues``: all of them, ascending, or null.

    Every number is finite; what is not known is null.

    Args:
        result: the index.
        subject: what it is about.
        seconds: time it took.
    """
    facts = result.facts
    extremes = _extremes(result)
    decrease, sentence = None, None
    if facts.gradient_norm is not None and facts.loss is not None:
        decrease = relative_decrease(facts.gradient_norm, result.norm, facts.loss)
        sentence = describe_gradient(facts.gradient_norm, result.norm, facts.loss)
    return {
        "format": "hvpspec-index",
        "version": 1,
        "hvpspec": __version__,
        "subject": asdict(subject) if subject else None,
        "index": result.index,
        "lower": result.lower,
        "upper": result.upper,
        "estimate": result.estimate,
        "tau": result.tau,
        "noise_floor": result.noise_floor,
        "certified": result.certified,
        "confidence": result.confidence,
        "method": result.method,
        "num_matvecs": result.num_matvecs,
        "dim": result.dim,
        "raw_count": result.raw_count,
        "nullity": result.nullity,
        "positive": result.positive,
        "norm": result.norm,
        "lambda_min": extremes[0] if extremes else None,
        "lambda_max": extremes[1] if extremes else None,
        "loss": facts.loss,
        "gradient_norm": facts.gradient_norm,
        "relative_decrease": decrease if decrease is not None and decrease < math.inf else None,
        "critical_point": sentence,
        "bound": asdict(result.bound) if result.bound else None,
        "notes": list(facts.notes),
        "seconds": seconds,
        "eigenvalues": None if result.eigenvalues is None else result.eigenvalues.tolist(),
    }


def index_table(
    result: IndexResult, *, subject: Subject | None = None, seconds: float | None = None
) -> Table:
    """Lay an index out for a person: what was counted, how sure it is, and what the point is like.

    Args:
        result: the index.
        subject: what it is about.
        seconds: time it took.
    """
    facts = result.facts
    rows = [
        _index_row(result),
        ("nullity", f"{result.nullity:,}", "eigenvalues within ±τ"),
        ("positive", f"{result.positive:,}", "eigenvalues above τ"),
        ("raw count", *_raw_count(result)),
        ("noise floor", _number(result.noise_floor), "error of an eigenvalue; no sign below it"),
    ]
    if result.bound:
        rows.append(("upper bound", f"{result.bound.upper:,}", result.bound.reason))
    else:
        rows.append(("upper bound", "none", "the network's structure gives none that is certain"))
    if facts.loss is not None and facts.gradient_norm is not None:
        sentence = describe_gradient(facts.gradient_norm, result.norm, facts.loss)
        rows.append(("loss f", f"{facts.loss:.5g}", _loss_text(subject)))
        rows.append(("‖∇f‖", _number(facts.gradient_norm), sentence))
    extremes = _extremes(result)
    if extremes:
        rows.append(("λ min", _number(extremes[0]), "smallest eigenvalue"))
        rows.append(("λ max", _number(extremes[1]), "largest eigenvalue"))
    else:
        rows.append(
            ("‖H‖", _number(result.norm), "largest |λ|, estimated; the others not computed")
        )
    rows.append(("products", f"{result.num_matvecs:,}", f"matrix-vector products, {_how(result)}"))
    if seconds is not None:
        rows.append(("time", f"{seconds:.1f} s", ""))
    rows += [("note", "", note) for note in facts.notes]
    return facts_table(subject.title if subject else f"matrix of size {result.dim:,}", rows)


def density_to_dict(
    eigenvalues: ArrayLike, histogram: SpectrumHistogram, *, subject: Subject | None = None
) -> dict[str, Any]:
    """Turn a spectrum and its histogram into plain data for JSON.

    Version 1 of the format ``hvpspec-density``: ``subject`` as in `index_to_dict`; the fields of
    `SpectrumHistogram` under their own names (``linear_threshold`` is null for a linear axis); and
    ``eigenvalues``, all of them, ascending.

    Args:
        eigenvalues: all of them.
        histogram: their counts as drawn.
        subject: what they are of.
    """
    import numpy as np

    return {
        "format": "hvpspec-density",
        "version": 1,
        "hvpspec": __version__,
        "subject": asdict(subject) if subject else None,
        "noise_floor": histogram.noise_floor,
        "linear_threshold": histogram.linear_threshold,
        "num_zero": histogram.num_zero,
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        "eigenvalues": np.sort(np.asarray(eigenvalues, dtype=np.float64)).tolist(),
    }


def checkpoint_to_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """Turn a checkpoint's description into plain data for JSON.

    Version 1 of the format ``hvpspec-checkpoint-info``: ``file``; ``network`` (``name``,
    ``arguments``); ``num_parameters``; ``tensors``, each with ``name``, ``shape``, ``dtype``,
    ``count`` and ``kind`` (``parameter`` or ``buffer``); ``data`` (``source``, ``split``,
    ``subset``), ``settings`` and ``history`` of training, null where unknown; ``versions`` of the
    software that wrote it.

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
    }


def checkpoint_tables(checkpoint: Checkpoint) -> tuple[Table, Table]:
    """Lay a checkpoint out for a person: where it comes from, and its tensors.

    Args:
        checkpoint: the checkpoint.
    """
    data, settings, history = checkpoint.data, checkpoint.settings, checkpoint.history
    rows = [
        ("network", network_text(checkpoint.network.name, checkpoint.network.arguments)),
        ("parameters", f"{checkpoint.num_parameters:,}"),
        ("data", _data_text(data.source, data.split, data.subset) if data else "not recorded"),
        ("training", _pairs(asdict(settings)) if settings else "not recorded"),
    ]
    if history:
        accuracy = f", accuracy {history.accuracy:.2%}" if history.accuracy is not None else ""
        rows.append(("result", f"training loss {history.loss:.5g}{accuracy}"))
    rows.append(("written by", _pairs(checkpoint.versions, " ") or "not recorded"))

    tensors = Table(box=box.SIMPLE_HEAD)
    for heading in ("tensor", "shape", "dtype"):
        tensors.add_column(heading, overflow="fold")
    tensors.add_column("count", justify="right")
    tensors.add_column("")
    for t in _tensors(checkpoint):
        shape = " × ".join(map(str, t["shape"])) or "scalar"
        kind = "" if t["kind"] == "parameter" else t["kind"]
        tensors.add_row(*map(Text, (t["name"], shape, t["dtype"], f"{t['count']:,}", kind)))
    return facts_table(str(checkpoint.path), rows), tensors


def network_text(name: str, arguments: Mapping[str, object]) -> str:
    """Name a network with its arguments.

    >>> network_text("mlp2", {"activation": "tanh"})
    'mlp2 (activation=tanh)'
    """
    return f"{name} ({_pairs(arguments)})" if arguments else name


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


def _index_row(result: IndexResult) -> tuple[str, str, str]:
    """The index or the interval that is certain, and why."""
    tau, floor = _number(result.tau), _number(result.noise_floor)
    if result.index is None:
        reason = (
            f"an interval: τ = {tau} lies below the noise floor {floor}, where signs are round-off;"
            " raise τ"
            if result.tau < result.noise_floor
            else f"an interval: the count at τ = {tau} is not certified"
        )
        return "index", f"[{result.lower:,}, {result.upper:,}]", reason
    at_floor = " (the noise floor)" if result.tau == result.noise_floor else ""
    return "index", f"{result.index:,}", f"eigenvalues below −τ, τ = {tau}{at_floor}"


def _raw_count(result: IndexResult) -> tuple[str, str]:
    """The number of negative signs, and how many of them are round-off."""
    if result.raw_count is None or result.eigenvalues is None:
        return "–", "#(λ < 0) is not known without the eigenvalues, and would be mostly round-off"
    meaningless = result.raw_count - int((result.eigenvalues < -result.noise_floor).sum())
    text = "#(λ < 0), none of it round-off"
    if meaningless:
        mostly = "mostly" if 2 * meaningless > result.raw_count else "partly"
        text = f"#(λ < 0), {mostly} round-off: counts signs below the noise floor ({meaningless:,})"
    return f"{result.raw_count:,}", text


def _extremes(result: IndexResult) -> tuple[float, float] | None:
    """The smallest and the largest eigenvalue, if computed."""
    if result.eigenvalues is None:
        return None
    return float(result.eigenvalues[0]), float(result.eigenvalues[-1])


def _how(result: IndexResult) -> str:
    """Say how the eigenvalues were counted after that."""
    how = {"exact": "then all eigenvalues", "ldl": "then inertia by LDLᵀ"}
    return how.get(result.method, result.method)


def _loss_text(subject: Subject | None) -> str:
    """Name the function whose Hessian it is."""
    if subject is None:
        return ""
    return subject.loss + (f" + {subject.l2:g} ‖θ‖²" if subject.l2 else "")


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


def _pairs(values: Mapping[str, object], joiner: str = "=") -> str:
    """List names with their values."""
    return ", ".join(f"{name}{joiner}{value}" for name, value in values.items())


def _number(x: float) -> str:
    """A number to three digits."""
    return f"{x:.3g}"
