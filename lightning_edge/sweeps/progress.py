"""One line that says how far a sweep is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from lightning_edge.sweeps.front import Front


def progress_line(front: Front, trials: int, last: int, workers: int) -> str:
    """Say how many trials are done, run and failed, which is best so far, and how long the others take.

    Args:
        front: What is known.
        trials: How many there will be.
        last: The trial that has just ended.
        workers: How many this process trains at once.
    """
    by_status = {
        status: [t for t in front.trials if t.status == status]
        for status in ("complete", "running", "ended early", "failed")
    }
    ended = [*by_status["complete"], *by_status["ended early"], *by_status["failed"]]
    running = len(by_status["running"])
    parts = [
        f"{len(by_status['complete'])} of {trials} done",
        f"{running} running",
        *([f"{len(by_status['ended early'])} ended early"] if by_status["ended early"] else []),
        f"{len(by_status['failed'])} failed",
    ]
    if any(trial.feasible for trial in front.trials):
        best = front.best()
        name = next(iter(front.objectives))
        parts.append(f"best {name} {best.values[name]:.5g} (trial {best.number})")
    elif by_status["complete"]:
        parts.append("none keeps the constraints yet")
    if left := trials - len(ended):
        # Those that failed at once say nothing of how long one takes.
        seconds = statistics.fmean(trial.seconds for trial in by_status["complete"] or ended)
        parts.append(f"about {duration(seconds * left / max(running, workers))} left")
    return f"trial {last} ended; {', '.join(parts)}"


def settings_line(settings: Mapping[str, Any]) -> str:
    """Give settings in one line, numbers shortened."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def duration(seconds: float) -> str:
    """Give seconds in the unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
