"""Which of the user's metrics decides, and in which direction it is better. Knows no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["min", "max"]

_HIGHER = {"acc", "accuracy", "top1", "top5", "f1", "auc", "auroc", "precision", "recall", "iou", "miou", "dice", "map"}
_HIGHER |= {"r2", "psnr", "ssim", "correct", "score"}
_LOWER = {"loss", "error", "err", "mae", "mse", "rmse", "nll", "perplexity", "ppl", "wer", "cer"}


@dataclass(frozen=True)
class Monitor:
    """A metric and where it is better.

    Attributes:
        metric: Name as it was logged.
        mode: ``"max"`` if higher is better.

    Raises:
        ValueError: If ``mode`` is not one of the two.
    """

    metric: str
    mode: Mode

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} for {self.metric!r} is not one of {get_args(Mode)}")

    def worse(self, value: float, than: float) -> bool:
        """Whether ``value`` is worse than another; not a number is worse than a number."""
        if value != value or than != than:
            return value != value and than == than
        return value < than if self.mode == "max" else value > than


def direction(metric: str) -> Mode | None:
    """Tell from a metric's name where it is better: ``val_acc`` up, ``val_loss`` down, ``None`` if it does not say."""
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", metric).lower()))
    if words & _LOWER:
        return "min"
    return "max" if words & _HIGHER else None


def choose(names: Sequence[str], watched: Iterable[Monitor] = ()) -> Monitor | None:
    """Choose the metric that decides: one that the training watches, else one whose name tells, higher-is-better first.

    Args:
        names: The metrics there are.
        watched: What the trainer's checkpoints and early stopping watch, in order.
    """
    for monitor in watched:
        if monitor.metric in names:
            return monitor
    known = [Monitor(name, mode) for name in names if (mode := direction(name)) is not None]
    return min(known, key=lambda monitor: monitor.mode != "max", default=None)
