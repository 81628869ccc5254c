"""End a training whose validation metric says that it is not worth the rest: a sweep's ``stop_early``."""

from __future__ import annotations

import math
from typing import final

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_edge.condition import read_condition
from lightning_edge.errors import HopelessError, SweepError
from lightning_edge.wording import counted


@final
class StopTrial(Callback):
    """Ends the training, without files, as soon as a validation metric keeps a condition or is no number.

    Args:
        when: The condition, such as ``val_acc < 0.6``.
        after_epochs: Epochs that are trained before it counts.

    Raises:
        ValueError: If ``when`` is no condition, or ``after_epochs`` is below 1.
        HopelessError: After a validation, if the training shall end.
        SweepError: After the first validation, if it logs no such metric.
    """

    def __init__(self, when: str, after_epochs: int = 1) -> None:
        self.when = read_condition(when)
        if after_epochs < 1:
            raise ValueError(f"after_epochs={after_epochs} must be at least 1")
        self.after_epochs = after_epochs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric; in every process, so that all of them end."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        known = trainer.callback_metrics
        if self.when.name not in known:
            logged = ", ".join(sorted(known)) or "nothing"
            raise SweepError(f"stop_early: the validation logs no {self.when.name!r}; it logs: {logged}")
        value = float(known[self.when.name])
        epochs = trainer.current_epoch + 1
        if epochs >= self.after_epochs and (not math.isfinite(value) or self.when.holds(value)):
            raise HopelessError(
                f"{self.when.name} is {value:.4g} after {counted(epochs, 'epoch')}, and {self.when} ends a trial"
            )
