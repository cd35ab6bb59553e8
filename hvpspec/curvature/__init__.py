"""Symmetric operators made from a network, a loss and data.

The empirical risk knows how losses over batches of any size combine and leaves the network as
found; parameter selection says which entries span the space. ``HessianOperator`` and
``GGNOperator`` multiply by the exact Hessian and the Gauss-Newton matrix the fastest way there is,
and the structural bound reads off a network's graph how many directions can go down at most.
"""

from hvpspec.curvature.adam import adam_preconditioner
from hvpspec.curvature.gauss_newton import GGNOperator
from hvpspec.curvature.hessian import HessianOperator, structural_upper_bound
from hvpspec.curvature.losses import Loss
from hvpspec.curvature.parameters import ParameterSpace, select_parameters
from hvpspec.curvature.planning import Plan

__all__ = [
    "GGNOperator",
    "HessianOperator",
    "Loss",
    "ParameterSpace",
    "Plan",
    "adam_preconditioner",
    "select_parameters",
    "structural_upper_bound",
]
