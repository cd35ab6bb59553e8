"""The paper's tables and figures as runs that can be interrupted and go on.

A run is a frozen dataclass of settings; what it measures is one line of JSON beside them. ``sweep``
carries out the runs that have no line yet, in processes side by side. What is shown of them is put
together from the lines alone.
"""

from hvpspec.experiments.curves import (
    CurveRun,
    curve_grids,
    curve_runs,
    draw_curves,
    measure_curve,
)
from hvpspec.experiments.ensemble import EnsembleSettings, trained_ensemble
from hvpspec.experiments.linear import LINEAR_RUNS, LinearRun, linear_grids, measure_linear
from hvpspec.experiments.points import QUICK, STANDARD, Point, Protocol
from hvpspec.experiments.protocols import CUTOFFS, ProtocolRun, measure_protocol, protocol_runs
from hvpspec.experiments.published import PUBLISHED, SOURCE, Published
from hvpspec.experiments.regularised import (
    RegularisedRun,
    draw_regularised,
    measure_regularised,
    regularised_grids,
    regularised_runs,
)
from hvpspec.experiments.results import append, finished, read
from hvpspec.experiments.scoring import Score, most_complete, score_grids, scores, with_table
from hvpspec.experiments.solutions import (
    SolutionRun,
    draw_solutions,
    measure_solution,
    solution_grids,
    solution_runs,
)
from hvpspec.experiments.spectra import (
    SpectraRun,
    draw_spectra,
    measure_spectra,
    spectra_grids,
    spectra_runs,
)
from hvpspec.experiments.statistics import Spread, spread
from hvpspec.experiments.summary import table_grids
from hvpspec.experiments.sweep import Failure, Status, sweep
from hvpspec.experiments.table import TableRun, measure_index, table_runs

__all__ = [
    "CUTOFFS",
    "LINEAR_RUNS",
    "PUBLISHED",
    "QUICK",
    "SOURCE",
    "STANDARD",
    "CurveRun",
    "EnsembleSettings",
    "Failure",
    "LinearRun",
    "Point",
    "Protocol",
    "ProtocolRun",
    "Published",
    "RegularisedRun",
    "Score",
    "SolutionRun",
    "SpectraRun",
    "Spread",
    "Status",
    "TableRun",
    "append",
    "curve_grids",
    "curve_runs",
    "draw_curves",
    "draw_regularised",
    "draw_solutions",
    "draw_spectra",
    "finished",
    "linear_grids",
    "measure_curve",
    "measure_index",
    "measure_linear",
    "measure_protocol",
    "measure_regularised",
    "measure_solution",
    "measure_spectra",
    "most_complete",
    "protocol_runs",
    "read",
    "regularised_grids",
    "regularised_runs",
    "score_grids",
    "scores",
    "solution_grids",
    "solution_runs",
    "spectra_grids",
    "spectra_runs",
    "spread",
    "sweep",
    "table_grids",
    "table_runs",
    "trained_ensemble",
    "with_table",
]
