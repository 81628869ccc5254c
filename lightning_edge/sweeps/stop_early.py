"""When a trial is ended before its time: a validation metric so bad that its files are of no use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_edge.condition import Condition, read_condition
from lightning_edge.errors import SweepError

_KEYS = ("when", "after_epochs")


@dataclass(frozen=True)
class StopEarly:
    """When a trial is ended.

    Attributes:
        when: What its validation metric then is.
        after_epochs: Epochs that are trained before it counts.
    """

    when: Condition
    after_epochs: int


def read_stop_early(given: Any) -> StopEarly:
    """Read ``stop_early`` of a sweep file.

    Raises:
        SweepError: With what was given and what is allowed.
    """
    if not isinstance(given, dict) or not {"when"} <= set(given) <= set(_KEYS) or not isinstance(given["when"], str):
        raise SweepError(f"stop_early: given {given!r}; allowed: {{when: val_acc < 0.6, after_epochs: 5}}")
    epochs = given.get("after_epochs", 1)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise SweepError(f"stop_early.after_epochs: given {epochs!r}; allowed: a whole number from 1 on")
    try:
        return StopEarly(read_condition(given["when"]), epochs)
    except ValueError as error:
        raise SweepError(f"stop_early.when: {error}") from None


def with_stop(config: Mapping[str, Any], stop_early: StopEarly | None) -> dict[str, Any]:
    """Give a configuration whose training ends then; as it is without ``stop_early``."""
    found: dict[str, Any] = copy.deepcopy(dict(config))
    if stop_early is None:
        return found
    given = found["trainer"].get("callbacks") or []
    stop = {
        "class_path": "lightning_edge.callbacks.stop_trial.StopTrial",
        "init_args": {"when": str(stop_early.when), "after_epochs": stop_early.after_epochs},
    }
    found["trainer"]["callbacks"] = [*(given if isinstance(given, list) else [given]), stop]
    return found
