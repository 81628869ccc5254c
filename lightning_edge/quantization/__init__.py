"""Int8 quantization: in training (`Quantize`), after training (`quantize`), and conversion (`convert`)."""

from __future__ import annotations

from lightning_edge.quantization.conversion import convert
from lightning_edge.quantization.network import attach, detach, float_copy, is_quantized, quantized_forward
from lightning_edge.quantization.phase import Quantize
from lightning_edge.quantization.post_training import calibrate, quantize

__all__ = [
    "Quantize",
    "attach",
    "calibrate",
    "convert",
    "detach",
    "float_copy",
    "is_quantized",
    "quantize",
    "quantized_forward",
]
