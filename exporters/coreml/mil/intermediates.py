"""The quantized values inside a MIL program, with the scales that the network has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_edge.exporters.coreml.mil.interpreter import Constant, Interpreter, Operation, Program, Variable
from lightning_edge.exporters.coreml.mil.operations import MOVES
from lightning_edge.exporters.run.runner import Intermediate, as_int8

_Makers = Mapping[Variable, Operation]


def intermediates(program: Program, tensors: list[Tensor]) -> list[Intermediate]:
    """Run a program on one sample and give what its ``quantize`` operations make.

    Args:
        program: The program.
        tensors: Its inputs, in its order.
    """
    makers = {output: operation for operation in program.operations for output in operation.outputs}
    scales: dict[Variable, float] = {}
    for operation in program.operations:
        scale = _number(operation, "scale") if operation.kind == "quantize" else None
        if scale is not None:
            scales[operation.outputs[0]] = scale * _unit(_source(operation, makers), makers, scales)
    values = Interpreter(replace(program, outputs=tuple(scales)))(tensors)
    found = []
    for (output, scale), value in zip(scales.items(), values, strict=True):
        source = _source(makers[output], makers)
        name = makers[output].name if source is None else source.name
        found.append(as_int8(name, scale, int(_number(makers[output], "zero_point") or 0), value))
    return found


def _unit(source: Operation | None, makers: _Makers, scales: Mapping[Variable, float]) -> float:
    """What 1 stands for in the result of an operation.

    coremltools divides both inputs and the output of a quantized sum or difference by the scale of one input
    (`distributive_quantized_binary_op_scale_normalization`): the integers stay, the scales are others.
    """
    for operand in source.operands() if source is not None and source.kind in ("add", "sub") else ():
        dequantize = makers.get(operand) if isinstance(operand, Variable) else None
        if dequantize is None or dequantize.kind != "dequantize":
            continue
        stored: Any = dequantize.inputs["input"]
        while stored in makers and makers[stored].kind in MOVES:
            stored = next(iter(makers[stored].operands()))
        scale = _number(dequantize, "scale")
        if stored in scales and scale:
            return scales[stored] / scale
    return 1.0


def _source(operation: Operation, makers: _Makers) -> Operation | None:
    """What computes the value that an operation quantizes, through operations that only clip or move."""
    source = makers.get(next(operation.operands()))  # type: ignore[arg-type]
    while source is not None and (source.kind in MOVES or source.kind in ("relu", "relu6", "clip")):
        before = makers.get(next(source.operands()))  # type: ignore[arg-type]
        if before is None:
            break
        source = before
    return source


def _number(operation: Operation, key: str) -> float | None:
    """A constant input of one number; ``None`` if it is anything else."""
    given = operation.inputs.get(key)
    if not isinstance(given, Constant) or isinstance(given.value, str) or given.value.size != 1:
        return None
    return float(given.value.item())
