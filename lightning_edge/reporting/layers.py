"""What was found of a network layer by layer: rows of the report. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerRow:
    """One layer with weights, by the name it had before anything was compressed.

    Attributes:
        name: Its name.
        precision: How its weights are stored in the network to ship.
        bytes: Bytes of its weights and biases there.
        float_bytes: Bytes of its parameters in float, before anything was cut; ``None`` where that is not known.
        increase: What it costs when it alone is int8: mean squared difference of the float network's outputs. ``None``
            where that was not measured.
    """

    name: str
    precision: Literal["int8", "float"]
    bytes: int
    float_bytes: int | None = None
    increase: float | None = None
