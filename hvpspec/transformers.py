"""A callback for the Trainer of transformers that logs properties of the Hessian.

``import hvpspec`` does not load this module, which needs the packages transformers and accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hvpspec
from hvpspec.monitoring import CurvatureMonitor, check_every


class CurvatureCallback(TrainerCallback):
    """Logs sharpness, trace and certified index of the Hessian every few steps.

    The values of :meth:`hvpspec.monitoring.CurvatureMonitor.measure` go to the trainer's logs.
    Training is not affected. If it uses mixed precision, the measurement is made in the precision
    of the parameters, usually float32.

    Args:
        trainer: the trainer that logs; add the callback to it by ``trainer.add_callback``.
        loss: function of outputs (the logits) and targets, as for :class:`hvpspec.HessianOperator`.
        data: fixed examples to measure on, as for ``HessianOperator``: a
            mapping of the model's arguments and ``labels``, or several.
        every_n_steps: number of steps between two measurements.
        options: further arguments of :class:`hvpspec.monitoring.CurvatureMonitor`.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self,
        trainer: Trainer,
        loss: hvpspec.Loss | nn.Module | Callable[[Any, Any], Tensor],
        data: Any,
        *,
        every_n_steps: int = 100,
        **options: Any,
    ) -> None:
        self._trainer = trainer
        self._every = check_every("every_n_steps", every_n_steps)
        self._monitor = CurvatureMonitor(loss, data, **options)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure and log, if it is due."""
        if state.global_step % self._every == 0:
            due = control.should_log
            with _without_autocast(kwargs["model"]) as model:
                self._trainer.log(self._monitor.measure_if_finite(model))
            # Logging resets this flag, and the trainer would then not log its loss.
            control.should_log = due


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[nn.Module]:
    """Undo the wrapper for mixed precision that accelerate puts around a model's forward pass."""
    own = vars(model).get("_original_forward")
    if own is None:
        yield model
        return
    wrapped, model.forward = model.forward, own
    try:
        yield model
    finally:
        model.forward = wrapped
