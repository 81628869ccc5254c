"""How large a network is: rows of the report. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkSize:
    """A float network's size.

    Attributes:
        parameters: Elements of its parameters.
        size_bytes: Bytes of its parameters and buffers in float32.
        macs: Multiply-accumulates of its layers with weights, for one sample; ``None`` where that is not known.
    """

    parameters: int
    size_bytes: int
    macs: int | None = None

    def __str__(self) -> str:
        """Say it in a line."""
        macs = "" if self.macs is None else f", {self.macs:,} multiply-accumulates a sample"
        return f"{self.parameters:,} parameters{macs}, {self.size_bytes:,} bytes"
