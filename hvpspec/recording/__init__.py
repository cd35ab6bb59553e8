"""Operators that save their products, so that an interrupted run can be resumed."""

from hvpspec.recording.recorded import RecordedOperator

__all__ = ["RecordedOperator"]
