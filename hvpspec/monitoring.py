"""What a landscape looks like in a few numbers, again and again as training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

import hvpspec
from hvpspec.errors import InputError, NonFiniteError
from hvpspec.zoo.training import eval_mode


class CurvatureMonitor:
    """Measures the Hessian's sharpness, trace and certified index on fixed examples.

    A model that it looks at stays as it was: gradients, modes and random numbers.

    Args:
        loss: of outputs and targets, as for :class:`hvpspec.HessianOperator`.
        data: fixed examples on which the landscape is looked at, as for ``HessianOperator``; some
            hundred are enough to see it change.
        rtau: the index counts below ``-rtau`` times the sharpness; at least the noise floor.
        max_matvecs: the most products for each of the three.
        seed: of the random vectors, which are the same each time.
        options: further arguments of ``HessianOperator``, such as ``params``.

    Raises:
        InputError: a number is out of range, or an option unknown.
    """

    def __init__(
        self,
        loss: hvpspec.Loss | nn.Module | Callable[[Any, Any], Tensor],
        data: Any,
        *,
        rtau: float = 1e-2,
        max_matvecs: int = 200,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(max_matvecs, int) or max_matvecs < 10:
            raise InputError(f"max_matvecs must be a whole number, 10 or more, got {max_matvecs}")
        if not 0 < rtau < 1:
            raise InputError(f"rtau must be between 0 and 1, got {rtau}")
        known = signature(hvpspec.HessianOperator).parameters
        for name in options.keys() - known.keys():
            raise InputError(f"{name!r} is not an argument of CurvatureMonitor or HessianOperator")
        self._arguments, self._options = (loss, data), options
        self._rtau, self._max_matvecs, self._seed = rtau, max_matvecs, seed

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Look at a model, which may stand in training mode.

        Returns:
            ``sharpness`` (the largest eigenvalue) with the norm of its residual
            ``sharpness_error``, within which an eigenvalue lies; ``hessian_trace`` with its
            standard error ``hessian_trace_sem``; and ``index_lower`` and ``index_upper``, between
            which the number of eigenvalues below ``-tau`` lies.

        Raises:
            HvpspecError: see :class:`hvpspec.HessianOperator`.
        """
        with eval_mode(model):
            loss, data = self._arguments
            H = hvpspec.HessianOperator(model, loss, data, **self._options)

            def seeded() -> torch.Generator:
                return torch.Generator().manual_seed(self._seed)

            budget = self._max_matvecs
            top = hvpspec.eigsh(H, 1, "LA", tol=1e-3, max_matvecs=budget, generator=seeded())
            sharpness = float(top.values[-1])
            found = hvpspec.trace(H, budget, generator=seeded())
            tau = self._rtau * abs(sharpness) or None  # the noise floor, where all is flat
            down = hvpspec.index(H, tau, method="certified", max_matvecs=budget, generator=seeded())
        return {
            "sharpness": sharpness,
            "sharpness_error": float(top.residual_norms[-1]),
            "hessian_trace": found.value,
            "hessian_trace_sem": found.sem,
            "index_lower": float(down.lower),
            "index_upper": float(down.upper),
        }

    def measure_if_finite(self, model: nn.Module) -> dict[str, float]:
        """What :meth:`measure` returns; nothing, and a warning, where training has diverged.

        Raises:
            HvpspecError: see :class:`hvpspec.HessianOperator`.
        """
        try:
            return self.measure(model)
        except NonFiniteError as error:
            warnings.warn(f"no curvature is logged: {error}", UserWarning, stacklevel=2)
            return {}


def check_every(name: str, every: int) -> int:
    """Return how often a callback looks, if that makes sense.

    Raises:
        InputError: it is less than 1.
    """
    if every < 1:
        raise InputError(f"{name} must be at least 1, got {every}")
    return every
