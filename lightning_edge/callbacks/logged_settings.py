"""What was asked of a training, as hyper-parameters in the Trainer's loggers: phases, targets, budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_edge.user_warnings import warn

KEY = "edge"


@runtime_checkable
class Logged(Protocol):
    """A callback whose settings are logged."""

    def logged_settings(self) -> dict[str, Any]:
        """Give its settings by name, as plain values."""


def log_settings(trainer: Trainer, pl_module: LightningModule, callback: Logged) -> None:
    """Give every logger the settings of all callbacks that have some, once; the first of them does it for all.

    They go together with the hyper-parameters of module and data module, before Lightning logs those by themselves:
    TensorBoard shows the first that it is given, and keeps only those in its ``hparams.yaml``. A logger that fails is
    warned of and passed over.

    Args:
        trainer: The Trainer, in ``setup``.
        pl_module: The LightningModule.
        callback: Who asks.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = [other for other in callbacks if isinstance(other, Logged)]
    if not trainer.is_global_zero or ours[0] is not callback:
        return
    settings: dict[str, Any] = {}
    for part in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
        if getattr(part, "_log_hyperparams", False):
            settings |= {name: value for name, value in part.hparams_initial.items() if name != "_class_path"}
    settings[KEY] = {name: value for other in ours for name, value in other.logged_settings().items()}
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(settings)
        except Exception as error:
            warn(f"{type(logger).__name__} did not take the settings ({type(error).__name__}: {error})")


def plain(value: Any) -> Any:
    """Make plain values of settings: dicts, lists, texts and numbers; of a dataclass what differs from ``None``."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(entry) for name, entry in asdict(value).items() if entry is not None}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
