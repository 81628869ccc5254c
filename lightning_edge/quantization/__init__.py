"""Int8 quantization: in training (`Quantize`), after training (`quantize`), and conversion (`convert`)."""

from __future__ import annotations

from lightning_edge.quantization.calibration_check import CalibrationFinding, CalibrationWarning, check_calibration
from lightning_edge.quantization.choose.mixed import MixedPlan, mixed_plan, plan_increase
from lightning_edge.quantization.choose.sensitivity import Sensitivities, sensitivity
from lightning_edge.quantization.conversion import convert
from lightning_edge.quantization.network import attach, detach, float_copy, is_quantized, quantized_forward
from lightning_edge.quantization.phase import Quantize
from lightning_edge.quantization.post_training import calibrate, quantize

__all__ = [
    "CalibrationFinding",
    "CalibrationWarning",
    "MixedPlan",
    "Quantize",
    "Sensitivities",
    "attach",
    "calibrate",
    "check_calibration",
    "convert",
    "detach",
    "float_copy",
    "is_quantized",
    "mixed_plan",
    "plan_increase",
    "quantize",
    "quantized_forward",
    "sensitivity",
]
