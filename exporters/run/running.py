"""`Running`: how a file is run here: threads, process, time limit and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_edge.exporters.run.isolated import DEFAULT_TIME_LIMIT_S

Kernels = Literal["delegate", "reference"]


@dataclass(frozen=True)
class Running:
    """How a file is run.

    Attributes:
        threads: Threads of the runtime.
        isolated: Whether the runtime has a process of its own.
        time_limit_s: Seconds that reading, loading, or running one sample may take, each.
        kernels: ``"delegate"``: those that the runtime chooses on this machine. ``"reference"``: the plain ones that a
            microcontroller's runtime computes as. Only ``.tflite`` files have them.

    Raises:
        ValueError: If a value is not allowed.
    """

    threads: int = 1
    isolated: bool = True
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    kernels: Kernels = "delegate"

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads!r} is not allowed; give 1 or more")
        if not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s={self.time_limit_s!r} is not allowed; give more than 0 seconds")
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"kernels={self.kernels!r} is not one of {', '.join(map(repr, get_args(Kernels)))}")
