"""Where the operations of a Core ML program run: by its compute plan on macOS, by the types of its values elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from lightning_edge import macs
from lightning_edge.contents import Place, Placements
from lightning_edge.errors import require
from lightning_edge.exporters.coreml.mil.interpreter import Constant, Operation, Program, Variable
from lightning_edge.exporters.run.calls import of_one_sample

_EXTRA = "coreml"
# The classes by which a compute plan names what an operation would run on.
_DEVICES: dict[str, Place] = {
    "MLNeuralEngineComputeDevice": "neural engine",
    "MLGPUComputeDevice": "gpu",
    "MLCPUComputeDevice": "cpu",
}


def by_support(program: Program, floats: Set[Operation]) -> Placements:
    """Tell from the types of values: the Neural Engine has no float32, for the rest Core ML chooses on the device.

    Args:
        program: The program.
        floats: Those of its operations that compute in a float type.
    """
    ops: list[tuple[str, Place, int]] = [
        (operation.kind, "cpu or gpu" if operation in floats and _is_single(operation) else "any unit", cost)
        for operation, cost in _costs(program)
    ]
    return Placements.of("op support", ops)


def by_plan(path: Path, program: Program) -> Placements | None:
    """Ask Core ML's compute plan, which needs macOS 14.4; ``None`` elsewhere.

    Args:
        path: The package.
        program: The program in it.
    """
    if not _is_macos():
        return None
    plans = require("coremltools.models.compute_plan", _EXTRA)
    models = require("coremltools.models.utils", _EXTRA)
    try:
        plan = plans.MLComputePlan.load_from_path(models.compile_model(str(path)))
        planned = plan.model_structure.program.functions["main"].block.operations
        devices = {operation.outputs[0].name: _device(plan, operation) for operation in planned if operation.outputs}
    except (AttributeError, RuntimeError, OSError):  # an older macOS, or a package it cannot compile
        return None
    ops: list[tuple[str, Place, int]] = [
        (operation.kind, devices.get(operation.outputs[0].name, "any unit"), cost)
        for operation, cost in _costs(program)
        if operation.outputs
    ]
    return Placements.of("compute plan", ops)


def _is_macos() -> bool:
    return sys.platform == "darwin"


def _device(plan: Any, operation: Any) -> Place:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    return "any unit" if usage is None else _DEVICES.get(type(usage.preferred_compute_device).__name__, "any unit")


def _is_single(operation: Operation) -> bool:
    return any(output.dtype == "fp32" for output in operation.outputs)


def _costs(program: Program) -> Iterator[tuple[Operation, int]]:
    """Every operation but those that only unpack weights, with its multiply-accumulates."""
    for operation in program.operations:
        if not operation.kind.startswith("constexpr_"):
            yield operation, _macs(operation)


def _macs(operation: Operation) -> int:
    shapes = {name: _shape(operand) for name, operand in operation.inputs.items()}
    output = of_one_sample(operation.outputs[0].shape) if operation.outputs else ()
    if operation.kind == "conv":
        return macs.convolution(output, shapes["weight"], shapes["weight"][0])
    if operation.kind == "conv_transpose":
        return macs.transposed_convolution(shapes["x"], shapes["weight"], shapes["weight"][0])
    if operation.kind == "linear":
        return macs.product(output, shapes["weight"][-1])
    if operation.kind == "matmul":
        turned = operation.inputs.get("transpose_x")
        is_turned = isinstance(turned, Constant) and bool(turned.value)
        return macs.product(output, shapes["x"][-2 if is_turned else -1])
    if operation.kind == "scaled_dot_product_attention":
        return macs.attention(shapes["query"], shapes["key"], shapes["value"])
    return 0


def _shape(operand: Any) -> tuple[int, ...]:
    if isinstance(operand, Variable):
        return of_one_sample(operand.shape)
    return () if isinstance(operand, tuple) or isinstance(operand.value, str) else tuple(operand.value.shape)
