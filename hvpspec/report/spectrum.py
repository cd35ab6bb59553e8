"""Densities, extreme eigenvalues and traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hvpspec.report.tables import Subject, envelope, facts_table, number

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from hvpspec.linalg import Eigenpairs, Estimate
    from hvpspec.plotting import SpectrumHistogram
    from hvpspec.spectrum import Outlier, SpectralMeasure


def density_to_dict(
    eigenvalues: ArrayLike, histogram: SpectrumHistogram, *, subject: Subject | None = None
) -> dict[str, Any]:
    """Turn a spectrum and its histogram into plain data for JSON.

    Version 1 of the format ``hvpspec-density``: ``subject`` and ``notes`` as in
    `index_to_dict`; the fields of `SpectrumHistogram` under their own names (``linear_threshold``
    is null for a linear axis); and ``eigenvalues``, all of them, ascending.

    Args:
        eigenvalues: all of them.
        histogram: their counts as drawn.
        subject: what they are of.
    """
    import numpy as np

    return {
        **envelope("hvpspec-density", subject),
        "noise_floor": histogram.noise_floor,
        "linear_threshold": histogram.linear_threshold,
        "num_zero": histogram.num_zero,
        "edges": histogram.edges.tolist(),
        "counts": histogram.counts.tolist(),
        "eigenvalues": np.sort(np.asarray(eigenvalues, dtype=np.float64)).tolist(),
    }


def measure_to_dict(
    measure: SpectralMeasure,
    *,
    subject: Subject | None = None,
    layers: Mapping[str, SpectralMeasure] | None = None,
    gauss_newton: tuple[SpectralMeasure, Mapping[str, SpectralMeasure]] | None = None,
) -> dict[str, Any]:
    """Turn a spectral measure into plain data for JSON.

    Version 1 of the format ``hvpspec-measure``: ``subject`` and ``notes`` as in
    `index_to_dict`; ``dim``, ``dtype``, ``num_matvecs`` and ``probes`` (their distribution); for
    each probe its Euclidean norm in ``norms``, its Ritz values in ``nodes`` and their weights, of
    sum 1, in ``weights``; ``norm``, the largest absolute value of a node; ``resolution``, below
    which differences are round-off; ``bulk``, ``gap_below``, ``gap_above``, ``bottom`` and ``top``
    (lists of ``value``, ``residual``, ``multiplicity``) of `hvpspec.spectrum.Outliers`; ``layers``,
    from the name of a layer to the same of its own block, or null; and ``gauss_newton``, all of
    this of the Gauss-Newton matrix, or null.

    Args:
        measure: the measure.
        subject: what it is of.
        layers: those of diagonal blocks.
        gauss_newton: that of the Gauss-Newton matrix, and those of its blocks.
    """
    return {
        **envelope("hvpspec-measure", subject),
        **_measure_fields(measure, layers),
        "gauss_newton": _measure_fields(*gauss_newton) if gauss_newton else None,
    }


def measure_table(
    measures: Mapping[str, SpectralMeasure], *, subject: Subject, seconds: float
) -> Table:
    """Lay out for a person what spectral measures found: outliers, bulk and gaps.

    Args:
        measures: one or several, by name.
        subject: what they are about.
        seconds: time it took.
    """
    rows: list[tuple[str, str, str]] = []
    for name, measure in measures.items():
        if len(measures) > 1:
            rows.append((name, f"{measure.dim:,}", "parameters"))
        if not measure.reorthogonalized:
            low = min(float(nodes.min()) for nodes in measure.nodes)
            high = max(float(nodes.max()) for nodes in measure.nodes)
            rows.append(
                ("spectrum", f"[{low:.3g}, {high:.3g}]", "without outliers: copies hide them")
            )
            continue
        found = measure.outliers()
        if found.top:
            rows.append(("above", _gap(found.gap_above), "gap between the bulk and these"))
            rows += [_outlier_row(x) for x in reversed(found.top)]
        low, high = found.bulk
        rows.append(("bulk", f"[{low:.3g}, {high:.3g}]", "the eigenvalues without an outer gap"))
        if found.bottom:
            rows.append(("below", _gap(found.gap_below), "gap between the bulk and these"))
            rows += [_outlier_row(x) for x in reversed(found.bottom)]
    products = sum(measure.num_matvecs for measure in measures.values())
    first = next(iter(measures.values()))
    kind = f"matrix-vector products, {len(first.runs)} {first.probes} probes"
    rows.append(("products", f"{products:,}", kind))
    rows.append(("time", f"{seconds:.1f} s", ""))
    rows += [("note", "", note) for note in subject.notes]
    return facts_table(subject.title, rows)


def eigenpairs_to_dict(
    pairs: Eigenpairs, which: str, *, subject: Subject | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Turn eigenvalues into plain data for JSON; eigenvectors are left out.

    Version 1 of the format ``hvpspec-eigs``: ``subject``, ``notes`` and ``seconds`` as in
    `index_to_dict`, ``which``, ``num_matvecs``, and ``values`` (ascending), ``residual_norms`` and
    ``converged``, lists of the same length.

    Args:
        pairs: the eigenpairs.
        which: which they are, see `hvpspec.eigsh`.
        subject: what they are of.
        seconds: time it took.
    """
    return {
        **envelope("hvpspec-eigs", subject),
        "which": which,
        "values": pairs.values.tolist(),
        "residual_norms": pairs.residual_norms.tolist(),
        "converged": pairs.converged.tolist(),
        "num_matvecs": pairs.num_matvecs,
        "seconds": seconds,
    }


def eigenvalue_table(pairs: Eigenpairs, *, subject: Subject, seconds: float) -> Table:
    """Lay eigenvalues out for a person, the largest first.

    Args:
        pairs: the eigenpairs.
        subject: what they are of.
        seconds: time it took.
    """
    rows = [("eigenvalue", "residual", "there is an eigenvalue within this distance")]
    found = zip(
        pairs.values.tolist(),
        pairs.residual_norms.tolist(),
        pairs.converged.tolist(),
        strict=True,
    )
    for value, residual, converged in reversed(list(found)):
        # As many digits as the distance to an eigenvalue leaves, and a few more.
        state = "converged" if converged else "NOT converged"
        rows.append((f"{value: .8g}", f"{residual:.1e}", state))
    rows.append(("products", f"{pairs.num_matvecs:,}", "matrix-vector products"))
    rows.append(("time", f"{seconds:.1f} s", ""))
    rows += [("note", "", note) for note in subject.notes]
    return facts_table(subject.title, rows)


def trace_to_dict(
    trace: Estimate[float],
    norm: Estimate[float],
    method: str,
    *,
    subject: Subject | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Turn a trace and a Frobenius norm into plain data for JSON.

    Version 1 of the format ``hvpspec-trace``: ``subject``, ``notes`` and ``seconds`` as in
    `index_to_dict`, ``method``, and ``trace`` and ``frobenius_norm``, each with ``value``, ``sem``
    (its standard error, 0 if exact) and ``num_matvecs``.

    Args:
        trace: the trace.
        norm: the Frobenius norm.
        method: how the trace was found.
        subject: what they are of.
        seconds: time it took.
    """
    return {
        **envelope("hvpspec-trace", subject),
        "method": method,
        "trace": asdict(trace),
        "frobenius_norm": asdict(norm),
        "seconds": seconds,
    }


def trace_table(
    trace: Estimate[float],
    norm: Estimate[float],
    method: str,
    *,
    subject: Subject,
    seconds: float,
) -> Table:
    """Lay a trace and a Frobenius norm out for a person.

    Args:
        trace: the trace.
        norm: the Frobenius norm.
        method: how the trace was found.
        subject: what they are of.
        seconds: time it took.
    """
    rows = [
        ("trace", *_estimate(trace, method)),
        ("‖H‖_F", *_estimate(norm, "hutchinson")),
        ("products", f"{trace.num_matvecs + norm.num_matvecs:,}", "matrix-vector products"),
        ("time", f"{seconds:.1f} s", ""),
        *(("note", "", note) for note in subject.notes),
    ]
    return facts_table(subject.title, rows)


def _estimate(estimate: Estimate[float], method: str) -> tuple[str, str]:
    """A value with its standard error, and what it cost."""
    if estimate.sem == 0:
        return f"{estimate.value:.8g}", f"exact, by {estimate.num_matvecs:,} products"
    cost = f"± standard error, {estimate.num_matvecs:,} products by {method}"
    return f"{estimate.value:.5g} ± {estimate.sem:.2g}", cost


def _measure_fields(
    measure: SpectralMeasure, layers: Mapping[str, SpectralMeasure] | None
) -> dict[str, Any]:
    """The facts of one measure, and of those of its layers."""
    parts = {name: _measure_facts(layer) for name, layer in layers.items()} if layers else None
    return {**_measure_facts(measure), "layers": parts}


def _measure_facts(measure: SpectralMeasure) -> dict[str, Any]:
    """The facts of one measure."""
    found = measure.outliers() if measure.reorthogonalized else None
    return {
        "dim": measure.dim,
        "dtype": str(measure.dtype).removeprefix("torch."),
        "probes": measure.probes,
        "num_matvecs": measure.num_matvecs,
        "norm": max(float(nodes.abs().max()) for nodes in measure.nodes),
        "resolution": measure.resolution,
        "reorthogonalized": measure.reorthogonalized,
        "bulk": list(found.bulk) if found else None,
        "gap_below": found.gap_below if found else None,
        "gap_above": found.gap_above if found else None,
        "bottom": [asdict(outlier) for outlier in found.bottom] if found else None,
        "top": [asdict(outlier) for outlier in found.top] if found else None,
        "norms": [run.norm for run in measure.runs],
        "nodes": [nodes.tolist() for nodes in measure.nodes],
        "weights": [weights.tolist() for weights in measure.weights],
    }


def _gap(width: float | None) -> str:
    """The width of a gap."""
    return "–" if width is None else number(width)


def _outlier_row(outlier: Outlier) -> tuple[str, str, str]:
    """An outlier, how well it is known and how often it may be there."""
    many = f", about {outlier.multiplicity:.0f} of them" if outlier.multiplicity >= 1.75 else ""
    return "  outlier", f"{outlier.value:.5g}", f"± {outlier.residual:.1e}{many}"
