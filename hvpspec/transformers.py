"""A callback for the Trainer of transformers that logs what the loss landscape looks like.

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
    """Logs the Hessian's sharpness, trace and certified index after some of the steps.

    What :meth:`hvpspec.monitoring.CurvatureMonitor.measure` returns goes where the trainer's own
    logs go. Training goes on as it would without. Where it computes in half precision, the
    landscape is that of the parameters as they are, usually in single precision.

    Args:
        trainer: to whose logs it is added, by ``trainer.add_callback``.
        loss: of outputs (the logits) and targets, as for :class:`hvpspec.HessianOperator`.
        data: fixed examples on which the landscape is looked at, as for ``HessianOperator``: a
            mapping of the model's arguments and ``labels``, or several.
        every_n_steps: how often.
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
        """Measure and log, if it is time to."""
        if state.global_step % self._every == 0:
            due = control.should_log
            with _without_autocast(kwargs["model"]) as model:
                self._trainer.log(self._monitor.measure_if_finite(model))
            control.should_log = due  # logging takes it back, and the loss would be left out


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[nn.Module]:
    """Take off what accelerate puts around a model's forward pass to compute in half precision."""
    own = vars(model).get("_original_forward")
    if own is None:
        yield model
        return
    wrapped, model.forward = model.forward, own
    try:
        yield model
    finally:
        model.forward = wrapped
