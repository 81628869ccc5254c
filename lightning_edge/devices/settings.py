"""What is measured on devices, and of how much data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Measure = Literal["latency", "accuracy"]


@dataclass(frozen=True)
class Sustained:
    """A long run of calls, for boards that slow down when they are warm.

    Attributes:
        minutes: How long each file is called without a pause.

    Raises:
        ValueError: If it is not above 0, or more than a day.
    """

    minutes: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"sustained: minutes={self.minutes!r} is not allowed; give more than 0, and 1440 at most")


@dataclass(frozen=True)
class DeviceSettings:
    """How files are measured on devices.

    Attributes:
        file: The file that describes devices by name.
        measure: ``"latency"``: how long a call takes there. ``"accuracy"``: the metrics of the user's own loop with
            the device in the network's place, and how far its values lie from the network's.
        limit_samples: So many samples of the split at least, in whole batches, for ``"accuracy"``; all if not given.
        sustained: How long each file is called without a pause, to see whether the device slows down; not if not given.

    Raises:
        ValueError: If a value is not allowed.
    """

    file: str = "devices.yaml"
    measure: Sequence[Measure] = ("latency", "accuracy")
    limit_samples: int | None = None
    sustained: Sustained | None = None

    def __post_init__(self) -> None:
        allowed = get_args(Measure)
        if isinstance(self.measure, str) or not self.measure or not {*self.measure} <= {*allowed}:
            raise ValueError(f"measure={self.measure!r} is not allowed; give a list of one or more of {list(allowed)}")
        if self.sustained is not None and not isinstance(self.sustained, Sustained):
            raise ValueError(f"sustained={self.sustained!r} is not allowed; give Sustained(minutes=...)")
        limit = self.limit_samples
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(
                f"limit_samples={limit!r} is not allowed; give a whole number of 1 or more, or leave it out"
            )
