"""When a trial is ended before its time: a validation metric so bad that its files are of no use."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_edge.condition import Condition, read_condition
from lightning_edge.errors import SweepError
from lightning_edge.sweeps.base import with_callback
from lightning_edge.sweeps.strict_yaml import whole

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
    epochs = whole("stop_early.after_epochs", given.get("after_epochs", 1))
    try:
        return StopEarly(read_condition(given["when"]), epochs)
    except ValueError as error:
        raise SweepError(f"stop_early.when: {error}") from None


def with_stop(config: Mapping[str, Any], stop_early: StopEarly | None) -> dict[str, Any]:
    """Give a configuration whose training ends then; as it is without ``stop_early``."""
    if stop_early is None:
        return copy.deepcopy(dict(config))
    arguments = {"when": str(stop_early.when), "after_epochs": stop_early.after_epochs}
    return with_callback(config, "lightning_edge.callbacks.stop_trial.StopTrial", arguments)
