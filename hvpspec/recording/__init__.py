"""Operators whose products are kept, so that a run that was killed goes on where it was."""

from hvpspec.recording.recorded import RecordedOperator

__all__ = ["RecordedOperator"]
