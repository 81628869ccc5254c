"""Torchao's histogram observer with a faster search: the same range of least error, to the same bits.

Torchao walks along the histogram with comparisons of tensors of one element, of which a search takes thousands. Here
the same steps are taken on Python numbers. The error of a range is torchao's own function, of values that are scaled by
a power of two: it cubes them, and beyond 1e12 every range had the same error, infinity. Ranges are searched anew for
every batch of calibration, because what follows is calibrated on the rounded values.

Import this module only where torchao may be imported.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, bisect_right

import numpy as np
import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import HistogramObserver

# Share of all values that a step of the search leaves out at one end; torchao's.
_STEP = 1e-5


class FastHistogramObserver(HistogramObserver):  # type: ignore[misc]
    """Torchao's observer of post-training quantization, whose search for the range of least error is faster."""

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """Narrow the range from both ends while the squared error of rounding falls.

        Returns:
            The smallest and the largest value of the range, each of no dimension.
        """
        bin_width = (self.max_val - self.min_val) / self.bins
        total = torch.sum(self.histogram).item()
        below: list[float] = torch.cumsum(self.histogram, dim=0).tolist()
        scaled = self._scaled()
        low, high = 0.0, 1.0  # shares of the values
        start, end = 0, self.bins - 1
        least = float("inf")
        while low < high and start < end:
            next_low, next_high = low + _STEP, high - _STEP
            first, last = start, end
            # Rounding keeps order: a share that does not pass a bin in double does not in float32 either.
            if below[start] < next_low * total:
                first = bisect_left(below, float(np.float32(next_low * total)), start, end)
            if below[end] > next_high * total:
                last = bisect_right(below, float(np.float32(next_high * total)), start + 1, end + 1) - 1
            next_start, next_end = start, end
            if first - start > end - last:
                next_start, low = first, next_low
            else:
                next_end, high = last, next_high
            if (next_start, next_end) == (start, end):
                continue
            error = scaled._compute_quantization_error(next_start, next_end)
            if error > least:
                break
            least, start, end = error, next_start, next_end
        return self.min_val + bin_width * start, self.min_val + bin_width * (end + 1)

    def _scaled(self) -> FastHistogramObserver:
        """The same histogram of values between whose ends lies 0.5 to 1, so that their cubes do not overflow."""
        smallest, largest = self.min_val.item(), self.max_val.item()
        factor = 2.0 ** -math.frexp(largest - smallest)[1]
        ends = {"min_val": smallest * factor, "max_val": largest * factor}
        scaled = copy.copy(self)
        scaled._buffers = {
            **self._buffers,
            **{name: torch.full_like(self._buffers[name], end) for name, end in ends.items()},
        }
        return scaled
