"""The diagonal by which Adam divides its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvpspec.curvature.sharding import whole
from hvpspec.errors import InputError

if TYPE_CHECKING:
    from hvpspec.curvature.operator import CurvatureOperator


def adam_preconditioner(optimizer: torch.optim.Optimizer, operator: CurvatureOperator) -> Tensor:
    """``D = sqrt(v / (1 - beta2^t)) + eps``, by which Adam or AdamW divides its next steps.

    The largest eigenvalue of the preconditioned Hessian ``D^-1/2 H D^-1/2``, see
    :class:`hvpspec.PreconditionedOperator`, hovers about ``(2 + 2 beta1) / ((1 - beta1) lr)`` when
    Adam trains at the edge of stability.

    Args:
        optimizer: has taken steps with all parameters of the operator.
        operator: a Hessian or Gauss-Newton matrix of the model that is trained.

    Returns:
        D, float64, shape (n,), in the order of the operator's vectors.

    Raises:
        InputError: the optimizer is neither of these, or has not moved a parameter yet.

    Reference:
        Cohen et al., Adaptive gradient methods at the edge of stability (2022), section 3.

    Example:
        >>> from hvpspec import HessianOperator
        >>> net, x, y = torch.nn.Linear(2, 1), torch.ones(3, 2), torch.ones(3, 1)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> torch.nn.functional.mse_loss(net(x), y).backward()
        >>> adam.step()
        >>> D = adam_preconditioner(adam, HessianOperator(net, torch.nn.MSELoss(), (x, y)))
        >>> gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        >>> torch.allclose(D, gradient.double().abs(), atol=1e-6)  # after one step
        True
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):  # not Adam's relatives
        raise InputError(
            f"{type(optimizer).__name__} divides its steps in another way; pass an Adam or AdamW"
        )
    parameters = dict(operator.model.named_parameters())
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    pieces = []
    for name in operator.space.names:
        p = parameters[name]
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            raise InputError(
                f"{type(optimizer).__name__} has not moved {name} yet; take a step with it first, "
                "or leave it out with params="
            )
        group = groups[p]
        # With amsgrad the largest so far takes the place of the mean.
        second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
        corrected = whole(second).double() / (1 - group["betas"][1] ** float(state["step"]))
        pieces.append((corrected.sqrt() + group["eps"]).flatten())
    return torch.cat(pieces)
