"""The questions a user asks of an operator, each answered by a frozen result.

The Morse index counts the directions that go down, at a resolution. Results carry their error, what
they cost and how they were found. Everything here rests on ``linalg`` alone.
"""

from hvpspec.spectrum.morse import IndexCurve, IndexResult, index

__all__ = ["IndexCurve", "IndexResult", "index"]
