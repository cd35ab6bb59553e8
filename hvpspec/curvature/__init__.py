"""Symmetric operators made from a network, a loss and data.

An objective is a network's loss over data as a function of its parameters, at any point; a guard
checks what its answers stand on. Parameter selection says which entries span the space.
``HessianOperator`` and ``GGNOperator`` multiply by the exact Hessian and the Gauss-Newton matrix,
and the structural bound reads off a network's graph how many directions can go down at most.
"""

from hvpspec.curvature.adam import adam_preconditioner
from hvpspec.curvature.choice import Plan
from hvpspec.curvature.losses import Loss, next_token_loss
from hvpspec.curvature.objective import Objective
from hvpspec.curvature.operator import GGNOperator, HessianOperator, structural_upper_bound
from hvpspec.curvature.parameters import ParameterSpace, select_parameters

__all__ = [
    "GGNOperator",
    "HessianOperator",
    "Loss",
    "Objective",
    "ParameterSpace",
    "Plan",
    "adam_preconditioner",
    "next_token_loss",
    "select_parameters",
    "structural_upper_bound",
]
