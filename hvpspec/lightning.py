"""A callback for Lightning that logs properties of the Hessian during training.

``import hvpspec`` does not load this module, which needs the package lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

import hvpspec
from hvpspec.monitoring import CurvatureMonitor, check_every


class CurvatureLogger(pl.Callback):
    """Logs sharpness, trace and certified index of the Hessian every few epochs.

    The values of :meth:`hvpspec.monitoring.CurvatureMonitor.measure` go to the trainer's logger.
    Training is not affected.

    Args:
        loss: function of outputs and targets, as for :class:`hvpspec.HessianOperator`.
        data: fixed examples to measure on, as for ``HessianOperator``.
        every_n_epochs: number of epochs between two measurements.
        options: further arguments of :class:`hvpspec.monitoring.CurvatureMonitor`.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self,
        loss: hvpspec.Loss | nn.Module | Callable[[Any, Any], Tensor],
        data: Any,
        *,
        every_n_epochs: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self._every = check_every("every_n_epochs", every_n_epochs)
        self._monitor = CurvatureMonitor(loss, data, **options)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log, if it is due."""
        if (trainer.current_epoch + 1) % self._every == 0:
            pl_module.log_dict(self._monitor.measure_if_finite(pl_module))
