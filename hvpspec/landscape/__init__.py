"""The landscape between points: critical points with a proof that they are there.

A landscape is a function of a point: a formula, or a network's loss over data. ``critical_point``
walks to where its gradient vanishes, counts the directions that go down there, and proves that a
critical point is near, by the theorem of Newton and Kantorovich. ``lower_index`` goes down past
saddles, and ``critical_points`` finds all that many starts lead to.
"""

from hvpspec.landscape.critical import CriticalPoint, certify, critical_point
from hvpspec.landscape.descent import Descent, lower_index
from hvpspec.landscape.landscapes import FunctionLandscape, Landscape, NetworkLandscape
from hvpspec.landscape.search import MorseCheck, critical_points, morse_check
from hvpspec.landscape.symmetry import Symmetries, symmetries

__all__ = [
    "CriticalPoint",
    "Descent",
    "FunctionLandscape",
    "Landscape",
    "MorseCheck",
    "NetworkLandscape",
    "Symmetries",
    "certify",
    "critical_point",
    "critical_points",
    "lower_index",
    "morse_check",
    "symmetries",
]
