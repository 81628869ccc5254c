"""What is measured on devices, and of how much data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Measure = Literal["latency", "accuracy", "energy"]


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
class Cool:
    """How cool a device has to be before calls are timed.

    Attributes:
        below_c: Its temperature, degrees Celsius.
        minutes: How long that is waited for at most.

    Raises:
        ValueError: If a value is not above 0, or ``minutes`` more than a day.
    """

    below_c: float
    minutes: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.below_c < 200:
            raise ValueError(f"cool: below_c={self.below_c!r} is not allowed; give degrees Celsius above 0")
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"cool: minutes={self.minutes!r} is not allowed; give more than 0, and 1440 at most")


@dataclass(frozen=True)
class DeviceSettings:
    """How files are measured on devices.

    Attributes:
        file: The file that describes devices by name.
        measure: ``"latency"``: how long a call takes there. ``"accuracy"``: the metrics of the user's own loop with
            the device in the network's place, and how far its values lie from the network's. ``"energy"``: what an
            inference takes, by a counter that the device or the user's meter has.
        limit_samples: So many samples of the split at least, in whole batches, for ``"accuracy"``; all if not given.
        sustained: How long each file is called without a pause, to see whether the device slows down; not if not given.
        cool: How cool the device has to be before calls of a file are timed; it is not looked at if not given.
        energy_seconds: How long a device waits, and then makes calls, while its energy is counted. A coarse counter
            needs longer.

    Raises:
        ValueError: If a value is not allowed.
    """

    file: str = "devices.yaml"
    measure: Sequence[Measure] = ("latency", "accuracy")
    limit_samples: int | None = None
    sustained: Sustained | None = None
    cool: Cool | None = None
    energy_seconds: float = 10.0

    def __post_init__(self) -> None:
        allowed = get_args(Measure)
        if isinstance(self.measure, str) or not self.measure or not {*self.measure} <= {*allowed}:
            raise ValueError(f"measure={self.measure!r} is not allowed; give a list of one or more of {list(allowed)}")
        if self.sustained is not None and not isinstance(self.sustained, Sustained):
            raise ValueError(f"sustained={self.sustained!r} is not allowed; give Sustained(minutes=...)")
        if self.cool is not None and not isinstance(self.cool, Cool):
            raise ValueError(f"cool={self.cool!r} is not allowed; give Cool(below_c=...)")
        if not 1 <= self.energy_seconds <= 24 * 3600:
            raise ValueError(f"energy_seconds={self.energy_seconds!r} is not allowed; give 1 to 86400")
        limit = self.limit_samples
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(
                f"limit_samples={limit!r} is not allowed; give a whole number of 1 or more, or leave it out"
            )
