"""Sharpness, trace and index of the Hessian, measured repeatedly during training."""

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

    A measurement changes nothing of the model: neither gradients nor modes nor random numbers.

    Args:
        loss: function of outputs and targets, as for :class:`hvpspec.HessianOperator`.
        data: fixed examples to measure on, as for ``HessianOperator``; a few hundred suffice to see
            changes.
        rtau: the index counts the eigenvalues below ``-rtau`` times the sharpness.
        max_matvecs: maximal number of products for each of the three.
        seed: seed of the random vectors, which are the same in every measurement.
        options: further arguments of ``HessianOperator``, such as ``params``.

    Raises:
        InputError: a number is out of range, or an option is unknown.
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
        """Measure a model, which may be in training mode; it is evaluated in eval mode.

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

            # The same random vectors every time, so that changes come from training alone.
            def seeded() -> torch.Generator:
                return torch.Generator().manual_seed(self._seed)

            budget = self._max_matvecs
            # Three digits are enough for a curve over training, and cost few products.
            top = hvpspec.eigsh(H, 1, "LA", tol=1e-3, max_matvecs=budget, generator=seeded())
            sharpness = float(top.values[-1])
            found = hvpspec.trace(H, budget, generator=seeded())
            tau = self._rtau * abs(sharpness) or None  # None, the noise floor, if all is zero
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
        """Return what :meth:`measure` does; if training has diverged, warn and return nothing.

        Raises:
            HvpspecError: see :class:`hvpspec.HessianOperator`.
        """
        try:
            return self.measure(model)
        except NonFiniteError as error:
            warnings.warn(f"no curvature is logged: {error}", UserWarning, stacklevel=2)
            return {}


def check_every(name: str, every: int) -> int:
    """Return the number of steps or epochs between two measurements, if it is valid.

    Raises:
        InputError: it is less than 1.
    """
    if every < 1:
        raise InputError(f"{name} must be at least 1, got {every}")
    return every
