"""Distill: learn from a teacher, beside the task, as a phase. Knows when; `distillation.runtime` knows how."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_edge.distillation.losses import DistillationLoss, KLDivergence, check_positive, check_within
from lightning_edge.distillation.teacher import check_teacher
from lightning_edge.quantization import is_quantized
from lightning_edge.schedule import Batch, Change, Clock, Moment, Phase, check_moment, check_order
from lightning_edge.succession import Succession


class Distill(Phase):
    """Learn from a teacher too: its losses are added to what ``training_step`` returns, between ``start`` and ``end``.

    The teacher is frozen, in eval mode, with the student's device and precision, and no part of the LightningModule:
    not of its parameters, optimizers or checkpoints. It is called once for each call of the student, with the same
    inputs.

    Moments are epochs (whole numbers from 0) or fractions of training (0.0 to 1.0).

    Args:
        teacher: A module, of which a copy is used; or ``{class_path, init_args}``; or a checkpoint of a LightningModule
            with its class, ``{checkpoint, class_path, init_args, module}``, with ``module`` the name of the submodule
            that is called, and ``init_args`` the saved hyper-parameters where left out; or ``"self"``: the float
            network as it was when `Quantize` began, for its own int8 phase.
        losses: What is compared; ``None``: logits, by `KLDivergence`.
        temperature: That of the default loss, 4.0 if left out; goes without ``losses`` only.
        task_weight: What the task's own loss is multiplied by, 0 or more.
        start: When the teacher comes in; with ``"self"`` no earlier than `Quantize`.
        end: When it leaves; ``None``: with the end of training.

    Raises:
        ValueError: If the teacher is none, a moment or weight is out of range, a loss's window lies outside the
            phase's, or both ``losses`` and ``temperature`` are given.
    """

    name = "distill"

    def __init__(
        self,
        teacher: nn.Module | dict[str, Any] | str,
        losses: list[DistillationLoss] | None = None,
        temperature: float | None = None,
        task_weight: float = 1.0,
        start: int | float = 0,
        end: int | float | None = None,
    ) -> None:
        check_teacher(teacher)
        self.teacher = teacher
        check_moment("start", start)
        if end is not None:
            check_order("start", start, "end", check_moment("end", end))
        if losses is not None and temperature is not None:
            raise ValueError(
                f"temperature={temperature!r} is that of the default loss; with losses=[...] give it to the loss, "
                "KLDivergence(temperature=...)"
            )
        if losses is not None and not losses:
            raise ValueError("losses=[] compares nothing; give at least one, or leave it out for KL on logits")
        for loss in losses or []:
            if not isinstance(loss, DistillationLoss):
                raise ValueError(
                    f"losses holds {loss!r}, which is no DistillationLoss; give KLDivergence(...) or others"
                )
            check_within(loss, start, end)
        if temperature is not None:
            check_positive("temperature", temperature)
        if not task_weight >= 0:
            raise ValueError(f"task_weight={task_weight!r} must be 0 or more")
        self.losses = losses
        self.temperature = temperature
        self.task_weight = task_weight
        self.start = start
        self.end = end

    def first_moment(self) -> Moment:
        """When the teacher comes in."""
        return self.start

    def last_moment(self) -> Moment:
        """When the teacher leaves; when it came where it stays to the end."""
        return self.start if self.end is None else self.end

    @property
    def from_self(self) -> bool:
        """Whether the teacher is the float network that quantization began with."""
        return isinstance(self.teacher, str)

    def resolved_losses(self) -> list[DistillationLoss]:
        """Give the losses, the default one too."""
        if self.losses is not None:
            return self.losses
        return [KLDivergence(4.0 if self.temperature is None else self.temperature)]

    def check_beside(self, phases: Sequence[Phase]) -> None:
        """Refuse self-distillation without a quantization to distill into.

        Args:
            phases: All phases of the training.

        Raises:
            ValueError: If the teacher is ``"self"`` and no `Quantize` begins before ``end``.
        """
        if not self.from_self:
            return
        quantize = next((phase for phase in phases if phase.name == "quantize"), None)
        if quantize is None:
            raise ValueError(
                "Distill(teacher='self') learns from the float network that Quantize began with, and there is no "
                "Quantize among the phases; add one, or give another teacher"
            )
        if self.end is not None:
            check_order("Quantize's start", quantize.first_moment(), "Distill's end", self.end)

    def open(self, clock: Clock) -> bool:
        """Whether the teacher teaches now."""
        # A fast_dev_run, which is there to go through everything, has every moment behind it at once.
        return goes_through_all(clock) or (
            clock.reached(self.start) and (self.end is None or not clock.reached(self.end))
        )

    def plan(self, network: nn.Module, clock: Clock, changes: Sequence[Change], batch: Batch) -> Change | None:
        """Say when the teacher comes and when it leaves."""
        done = {change["kind"] for change in changes}
        when = {"epoch": clock.epoch, "progress": clock.progress}
        if "begin" not in done:
            ready = self.open(clock) and not (self.from_self and not is_quantized(network))
            return {"kind": "begin", **when} if ready else None
        if "end" not in done and not self.open(clock):
            return {"kind": "end", **when}
        return None

    @classmethod
    def perform(cls, network: nn.Module, change: Change) -> Succession:
        """Leave the network as it is: a teacher changes its training."""
        return Succession()

    @classmethod
    def undo(cls, network: nn.Module, change: Change) -> None:
        """Leave the network as it is."""

    def describe(self, change: Change) -> str:
        """Say in one line what a change did."""
        if change["kind"] == "end":
            return "the teacher left"
        teacher = "the float network" if self.from_self else _words(self.teacher)
        return f"learning from {teacher} by {', '.join(type(loss).__name__ for loss in self.resolved_losses())}"

    def settings(self) -> dict[str, Any]:
        """Give the settings as plain values, with those of the losses."""
        losses = None if self.losses is None else [plain_settings(loss) for loss in self.losses]
        plain = {**super().settings(), "losses": losses}
        if isinstance(self.teacher, dict) and "checkpoint" in self.teacher:
            # The same file in another folder is the same teacher.
            plain["teacher"]["checkpoint"] = Path(self.teacher["checkpoint"]).name
        return plain


def goes_through_all(clock: Clock) -> bool:
    """Whether this is the clock of a run that goes through every phase at once (``Trainer(fast_dev_run=True)``)."""
    return clock.epoch == sys.maxsize


def plain_settings(loss: DistillationLoss) -> dict[str, Any]:
    """Give a loss's class and settings, those that are plain values."""
    plain = (bool, int, float, str, list, dict, type(None))
    return {
        name: value if isinstance(value, plain) else type(value).__qualname__
        for name, value in loss.settings().items()
        if not name.startswith("_")
    }


def _words(teacher: Any) -> str:
    if isinstance(teacher, nn.Module):
        return type(teacher).__name__
    where = f" from {teacher['checkpoint']}" if "checkpoint" in teacher else ""
    return f"{teacher['class_path']}{where}"
