"""Numbers: how far two networks' outputs lie apart. (To be completed: parameters, MACs, bytes, latency percentiles.)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """How far an exported file may lie from the network it came from.

    Attributes:
        max_steps: int8: largest difference of any output value, in quantization steps of that output.
        mean_steps: int8: mean difference, in quantization steps.
        top1: Smallest share of samples whose largest output is the same class.
        max_relative: fp32: largest difference over the largest absolute output.
    """

    max_steps: float = 4.0
    mean_steps: float = 1.0
    top1: float = 0.98
    max_relative: float = 1e-3


@dataclass(frozen=True)
class Agreement:
    """How far two networks' outputs lay apart over a set of samples.

    Attributes:
        samples: Number of samples compared.
        top1: Share of samples with the same largest output; ``None`` if no output is a row of class scores.
        max_steps: Largest difference in quantization steps of the output, ``None`` for float outputs.
        mean_steps: Mean difference in quantization steps, ``None`` for float outputs.
        max_abs: Largest absolute difference.
        max_relative: ``max_abs`` over the largest absolute reference output.
    """

    samples: int
    top1: float | None
    max_steps: float | None
    mean_steps: float | None
    max_abs: float
    max_relative: float
