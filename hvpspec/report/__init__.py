"""Files and pages around results: JSON written and read back, checkpoints, grids of text."""

from hvpspec.report.checkpoint import checkpoint_text, checkpoint_to_dict
from hvpspec.report.files import network_text, write_json
from hvpspec.report.grids import Grid, grid_markdown, grid_table
from hvpspec.report.reading import read_json

__all__ = [
    "Grid",
    "checkpoint_text",
    "checkpoint_to_dict",
    "grid_markdown",
    "grid_table",
    "network_text",
    "read_json",
    "write_json",
]
