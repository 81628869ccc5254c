"""What a file may cost, and whether it does: limits, and a verdict for each row of a report. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from lightning_edge.boards import Board, read_board

Status = Literal["within", "exceeded", "not measurable"]

# The limit that a file in a form that the device does not run is 1 above.
DEVICE = "device"


@dataclass(frozen=True)
class Excess:
    """A limit that is not kept.

    Attributes:
        name: Which one, an attribute of `Budget`.
        limit: What was allowed.
        value: What it is.
    """

    name: str
    limit: float
    value: float

    def __str__(self) -> str:
        """Say which limit, and by how much."""
        if self.name == DEVICE:
            return "the device does not run files of this form"
        return f"{self.name} {_plain(self.value)} is {_plain(self.value - self.limit)} above {_plain(self.limit)}"


@dataclass(frozen=True)
class Verdict:
    """Whether a file keeps its budget.

    Attributes:
        status: ``"exceeded"`` if any limit is; else ``"not measurable"`` if one of them could not be looked at here;
            else ``"within"``.
        exceeded: The limits that are not kept.
        not_measurable: Names of limits that could not be looked at, such as the latency of a reference interpreter.
    """

    status: Status
    exceeded: tuple[Excess, ...] = ()
    not_measurable: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [str(excess) for excess in self.exceeded]
        if self.not_measurable:
            parts.append(f"not measurable here: {', '.join(self.not_measurable)}")
        return "; ".join(parts) or self.status


@dataclass(frozen=True)
class Budget:
    """Limits of an exported file, each optional.

    Attributes:
        size_bytes: Bytes on disk.
        compressed_bytes: Bytes of a zip of it.
        latency_p50_ms: Median latency of one sample, milliseconds, on the machine that evaluates.
        latency_p95_ms: 95th percentile of it.
        latency_p99_ms: 99th percentile of it.
        load_ms: Milliseconds from the path to a runner that is ready.
        peak_memory_bytes: Memory that its runtime's process takes for it, at its peak. Where that is not measured, what
            the file plans for its activations is a part of it, which can exceed this limit and never keeps it.
        accuracy_drop: By how much the deciding metric may be worse than the float network's in torch, in the unit of
            the metric.
        flash_bytes: Bytes of the file where it lies in a microcontroller's flash, without the firmware.
        arena_bytes: Arena of TensorFlow Lite Micro, the upper bound of `exporters.micro.memory`. Int8 ``.tflite`` files
            have one.
        energy_mj: Millijoules of one inference on the device where it takes most, by ``measure: [energy]`` of
            `DeviceSettings`.
        fallback_share: Share of the multiply-accumulates, 0 to 1, on the runtime's own CPU kernels.
        device: Name of a board's profile (`boards.board_names`). Its flash, arena and memory are limits where none are
            given here, and only files that it runs are judged.

    Raises:
        ValueError: If none is given, one is negative or no number, or there is no such device.
    """

    size_bytes: int | None = None
    compressed_bytes: int | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    load_ms: float | None = None
    peak_memory_bytes: int | None = None
    accuracy_drop: float | None = None
    flash_bytes: int | None = None
    arena_bytes: int | None = None
    energy_mj: float | None = None
    fallback_share: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < math.inf:
                raise ValueError(f"Budget({name}={limit!r}) is not allowed; give a number of 0 or more")
        if self.device is None and not self.limits():
            names = ", ".join(entry.name for entry in fields(self))
            raise ValueError(f"Budget() limits nothing; give one or more of {names}")

    def limits(self) -> dict[str, float]:
        """The limits that are given, by name, and those of the device."""
        given = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "device"}
        board = self.board()
        return {
            **({} if board is None else board.limits),
            **{name: limit for name, limit in given.items() if limit is not None},
        }

    def board(self) -> Board | None:
        """The profile of the device, if one is given."""
        return None if self.device is None else read_board(self.device)

    def judge(
        self, measured: Mapping[str, float | None], at_least: Mapping[str, float | None] | None = None
    ) -> Verdict:
        """Compare what was measured with the limits.

        Args:
            measured: Values by the names of the limits; what is missing, ``None`` or no number was not measurable.
            at_least: Values that are known to be too low, for names that were not measured: they can exceed a limit but
                never keep it.
        """
        exceeded, unknown = [], []
        for name, limit in self.limits().items():
            value = measured.get(name)
            known = value is not None and not math.isnan(value)
            if not known:
                value = (at_least or {}).get(name)
            if value is not None and value > limit:
                exceeded.append(Excess(name, limit, value))
            elif not known:
                unknown.append(name)
        status: Status = "exceeded" if exceeded else "not measurable" if unknown else "within"
        return Verdict(status, tuple(exceeded), tuple(unknown))


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
