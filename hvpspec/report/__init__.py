"""Results as JSON and as tables for people, and files written whole or not at all."""

from hvpspec.report.checkpoint import checkpoint_tables, checkpoint_to_dict
from hvpspec.report.grids import Grid, grid_markdown, grid_table
from hvpspec.report.index import (
    CRITICAL_BELOW,
    NEARLY_CRITICAL_BELOW,
    comparison_table,
    describe_gradient,
    index_table,
    index_to_dict,
    relative_decrease,
)
from hvpspec.report.reading import read_json
from hvpspec.report.spectrum import (
    density_to_dict,
    eigenpairs_to_dict,
    eigenvalue_table,
    measure_table,
    measure_to_dict,
    trace_table,
    trace_to_dict,
)
from hvpspec.report.tables import Subject, facts_table, network_text, write_json

__all__ = [
    "CRITICAL_BELOW",
    "NEARLY_CRITICAL_BELOW",
    "Grid",
    "Subject",
    "checkpoint_tables",
    "checkpoint_to_dict",
    "comparison_table",
    "density_to_dict",
    "describe_gradient",
    "eigenpairs_to_dict",
    "eigenvalue_table",
    "facts_table",
    "grid_markdown",
    "grid_table",
    "index_table",
    "index_to_dict",
    "measure_table",
    "measure_to_dict",
    "network_text",
    "read_json",
    "relative_decrease",
    "trace_table",
    "trace_to_dict",
    "write_json",
]
