"""An index, and whether the point it was counted at is critical."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from hvpspec.report.tables import Subject, envelope, facts_table, number

if TYPE_CHECKING:
    from hvpspec.spectrum import IndexResult, Rung

#: Relative decreases of the loss below which a point counts as critical, and as nearly so.
CRITICAL_BELOW = 1e-12
NEARLY_CRITICAL_BELOW = 1e-6


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
    - ``ladder``: for each tau, from coarse to fine, ``tau``, ``lower``, ``upper``, ``index`` (null
      where it is not certified) and ``estimate``;
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
        **envelope("hvpspec-index", subject),
        "index": result.index,
        "lower": result.lower,
        "upper": result.upper,
        "estimate": result.estimate,
        "tau": result.tau,
        "ladder": [
            {
                "tau": rung.tau,
                "lower": rung.lower,
                "upper": rung.upper,
                "index": rung.index if _proves(result) else None,
                "estimate": rung.estimate,
            }
            for rung in result.ladder
        ],
        "resolution": result.resolution,
        "noise_floor": result.noise_floor,
        "certified": result.certified and _proves(result),
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
    rows = [_index_row(result), *_ladder_rows(result)]
    if result.nullity is not None and result.positive is not None:
        rows.append(("nullity", f"{result.nullity:,}", "eigenvalues within ±τ"))
        rows.append(("positive", f"{result.positive:,}", "eigenvalues above τ"))
        rows.append(("raw count", *_raw_count(result)))
    if result.confidence < 1:
        meaning = "error bars at each τ, no proof"
        if result.method != "chebyshev":
            meaning = "probability that what is said of a τ holds, for each τ"
        rows.append(("confidence", f"{result.confidence:.10g}", meaning))
    if result.resolution:
        meaning = "eigenvalues this near to −τ may be counted or not"
        rows.append(("resolution", number(result.resolution), meaning))
    rows.append(
        ("noise floor", number(result.noise_floor), "error of an eigenvalue; no sign below it")
    )
    if result.bound:
        rows.append(("upper bound", f"{result.bound.upper:,}", result.bound.reason))
    else:
        rows.append(("upper bound", "none", "the network's structure gives none that is certain"))
    if facts.loss is not None and facts.gradient_norm is not None:
        sentence = describe_gradient(facts.gradient_norm, result.norm, facts.loss)
        rows.append(("loss f", f"{facts.loss:.5g}", _loss_text(subject)))
        rows.append(("‖∇f‖", number(facts.gradient_norm), sentence))
    extremes = _extremes(result)
    if extremes:
        rows.append(("λ min", number(extremes[0]), "smallest eigenvalue"))
        rows.append(("λ max", number(extremes[1]), "largest eigenvalue"))
    else:
        rows.append(("‖H‖", number(result.norm), "largest |λ|, estimated; the others not computed"))
    rows.append(("products", f"{result.num_matvecs:,}", f"matrix-vector products, {_how(result)}"))
    if seconds is not None:
        rows.append(("time", f"{seconds:.1f} s", ""))
    rows += [("note", "", note) for note in facts.notes]
    return facts_table(subject.title if subject else f"matrix of size {result.dim:,}", rows)


def comparison_table(
    certified: IndexResult, exact: IndexResult, *, seconds: tuple[float, float]
) -> Table:
    """Lay a matrix-free ladder beside the exact counts at the same resolutions.

    Args:
        certified: with a ladder.
        exact: with all eigenvalues.
        seconds: the time of each.
    """
    assert exact.eigenvalues is not None
    table = Table(
        title=Text("certified beside exact", style="bold"), title_justify="left", box=None
    )
    for heading in ("τ", "τ / ‖H‖", "certified", "exact", ""):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for rung in certified.ladder:
        count = int((exact.eigenvalues < -rung.tau).sum())
        if not rung.lower <= count <= rung.upper:
            verdict = "they DISAGREE"
        else:
            verdict = "they agree" if rung.index is not None else "the interval holds it"
        relative = f"{rung.tau / exact.norm:.2g}" if exact.norm else "–"
        table.add_row(number(rung.tau), relative, _count_text(rung), f"{count:,}", verdict)
    for label, first, second in (
        ("products", f"{certified.num_matvecs:,}", f"{exact.num_matvecs:,}"),
        ("noise floor", number(certified.noise_floor), number(exact.noise_floor)),
        ("time", *(f"{t:.1f} s" for t in seconds)),
    ):
        table.add_row(label, "", first, second, "")
    table.add_row("confidence", "", f"{certified.confidence:.10g}", f"{exact.confidence:.10g}", "")
    return table


def _index_row(result: IndexResult) -> tuple[str, str, str]:
    """The index or the interval that is certain, and why."""
    if len(result.ladder) > 1 and _proves(result):
        return _ladder_headline(result)
    tau, floor = number(result.tau), number(result.noise_floor)
    if result.index is None:
        value = f"[{result.lower:,}, {result.upper:,}]"
        if not _proves(result):
            what = "error bars, no proof" if result.method == "chebyshev" else "an interval"
            return "index", value, f"{what} at τ = {tau}; estimate {result.estimate:,.1f}"
        reason = (
            f"an interval: τ = {tau} lies below the noise floor {floor}, where signs are round-off;"
            " raise τ"
            if result.tau < result.noise_floor
            else f"an interval: the count at τ = {tau} is not certified"
        )
        return "index", value, reason
    return "index", f"{result.index:,}", f"eigenvalues below −τ, τ = {tau}{_relation(result)}"


def _ladder_headline(result: IndexResult) -> tuple[str, str, str]:
    """The finest count without a coarser one left open, and how far down that goes."""
    ladder = result.ladder
    opened = next((i for i, rung in enumerate(ladder) if rung.index is None), len(ladder))
    if opened == 0:
        coarsest = number(ladder[0].tau)
        text = f"an interval at τ = {number(result.tau)}: not even τ = {coarsest} is certified"
        return "index", f"[{result.lower:,}, {result.upper:,}]", text
    rung = ladder[opened - 1]
    text = f"eigenvalues below −τ, certified down to τ = {number(rung.tau)}"
    text += _relation(result) if opened == len(ladder) else ", bracketed below it"
    return "index", f"{rung.lower:,}", text


def _relation(result: IndexResult) -> str:
    """Say where the finest tau comes from, if from the noise floor."""
    return " (the noise floor)" if result.tau == result.noise_floor else ""


def _ladder_rows(result: IndexResult) -> list[tuple[str, str, str]]:
    """A row for each resolution, if there are several."""
    if len(result.ladder) == 1:
        return []
    rows = []
    for rung in result.ladder:
        relative = f"{rung.tau / result.norm:.2g} ‖H‖" if result.norm else ""
        if not _proves(result):
            state = f"estimate {rung.estimate:,.1f}"
        elif rung.index is not None:
            state = "certified"
        elif rung.tau < result.noise_floor:
            state = "bracketed: τ lies below the noise floor"
        else:
            state = "bracketed"
        text = " · ".join(filter(None, (relative, state)))
        rows.append((f"  τ = {number(rung.tau)}", _count_text(rung), text))
    return rows


def _count_text(rung: Rung) -> str:
    """A count or its interval."""
    return f"{rung.lower:,}" if rung.index is not None else f"[{rung.lower:,}, {rung.upper:,}]"


def _proves(result: IndexResult) -> bool:
    """Whether an interval that is a point proves a count, or is only an estimate's."""
    return result.facts.certain and result.method not in ("slq", "chebyshev")


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
    how = {
        "exact": "then all eigenvalues",
        "ldl": "then inertia by LDLᵀ",
        "certified": "by which directions were harvested and the rest bounded",
        "slq": "of stochastic Lanczos quadrature",
        "chebyshev": "of a damped Chebyshev filter",
    }
    return how.get(result.method, result.method)


def _loss_text(subject: Subject | None) -> str:
    """Name the function whose Hessian it is."""
    if subject is None:
        return ""
    return subject.loss + (f" + {subject.l2:g} ‖θ‖²" if subject.l2 else "")
