"""What a manifest says of a file on a device. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_edge.plain_values import as_numbers, as_object, as_optional, as_typed, check_keys
from lightning_edge.reporting.devices import DeviceRow


@dataclass(frozen=True)
class DeviceEntry:
    """What was found of a file on one device.

    Attributes:
        device: Name of the device.
        about: What it says it is; ``None`` where it was not reached.
        runtime: What ran the file there.
        verdict: What its agreement there comes to, as in a `DeviceRow`.
        error: Why nothing more was measured.
        figures: Every number by the last part of its name in loggers: metrics, changes, latency, energy.
    """

    device: str
    about: str | None
    runtime: str | None
    verdict: str | None
    error: str | None
    figures: Mapping[str, float | None]

    @classmethod
    def of(cls, row: DeviceRow) -> DeviceEntry:
        """Take over what was found."""
        about = None if row.about is None else str(row.about)
        return cls(row.device, about, row.runtime, row.verdict, row.error, row.figures())

    @classmethod
    def read(cls, value: Any, where: str) -> DeviceEntry:
        """Build it from parsed JSON.

        Raises:
            ValueError: If it says more or less, or anything is of another type.
        """
        given = as_object(value, where)
        check_keys(given, [entry.name for entry in fields(cls)], where, "a manifest of this schema")
        names = ("about", "runtime", "verdict", "error")
        return cls(
            device=as_typed(given["device"], str, f"{where}.device"),
            figures=as_numbers(given["figures"], f"{where}.figures"),
            **{name: as_optional(given[name], str, f"{where}.{name}") for name in names},
        )
