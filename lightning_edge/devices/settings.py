"""What is measured on devices, and of how much data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Measure = Literal["latency", "accuracy"]


@dataclass(frozen=True)
class DeviceSettings:
    """How files are measured on devices.

    Attributes:
        file: The file that describes devices by name.
        measure: ``"latency"``: how long a call takes there. ``"accuracy"``: the metrics of the user's own loop with
            the device in the network's place, and how far its values lie from the network's.
        limit_samples: So many samples of the split at least, in whole batches, for ``"accuracy"``; all if not given.

    Raises:
        ValueError: If a value is not allowed.
    """

    file: str = "devices.yaml"
    measure: Sequence[Measure] = ("latency", "accuracy")
    limit_samples: int | None = None

    def __post_init__(self) -> None:
        allowed = get_args(Measure)
        if isinstance(self.measure, str) or not self.measure or not {*self.measure} <= {*allowed}:
            raise ValueError(f"measure={self.measure!r} is not allowed; give a list of one or more of {list(allowed)}")
        limit = self.limit_samples
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(
                f"limit_samples={limit!r} is not allowed; give a whole number of 1 or more, or leave it out"
            )
