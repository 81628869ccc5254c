"""What a report says of how its figures came about."""

from __future__ import annotations

from lightning_edge.evaluation.validation import Validation


def metrics_note(validation: Validation) -> str:
    """Say where the metrics of a validation come from."""
    if validation.own_step:
        return f"The metrics are what {validation.step} logs with each candidate in its place."
    if validation.metrics:
        return "The metrics were given with metrics=... and updated with (outputs, target)."
    return f"There are no task metrics: the LightningModule has no {validation.step}, and metrics=... was not given."
