"""What a Core ML package holds: bytes of weights by kind, operations in float, inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_edge.contents import Contents, Endpoint
from lightning_edge.exporters.coreml.mil.interpreter import Constant, Operation, Program, Variable
from lightning_edge.exporters.coreml.mil.operations import MOVES
from lightning_edge.exporters.coreml.placement import by_support
from lightning_edge.exporters.run.calls import of_one_sample

_PRODUCTS = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y"}
_COMPUTE = frozenset({*_PRODUCTS, "einsum", "scaled_dot_product_attention"})
# Operations that make a weight from stored constants, and the inputs that hold those constants.
_WEIGHTS: dict[str, tuple[str, ...]] = {
    "constexpr_affine_dequantize": ("quantized_data",),
    "constexpr_blockwise_shift_scale": ("data",),
    "constexpr_lut_to_dense": ("indices",),
    "constexpr_sparse_to_dense": ("nonzero_data", "mask"),
}
# Makes the two inputs of a sparse integer weight: a mask of one bit for each place, and the integers that are not zero.
_SPARSE_INTEGERS = "constexpr_sparse_blockwise_shift_scale"
# A clip counts as part of the operation before it: the quantizer after it clips anyway.
_CLIPS = frozenset({"relu", "relu6", "clip"})
_DTYPE_NAMES = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


def contents(program: Program) -> Contents:
    """Count the weights and the float operations of a program.

    Args:
        program: The program of a package, or of a Core ML part inside another file.
    """
    makers = {output: operation for operation in program.operations for output in operation.outputs}
    weights: dict[str, dict[Any, int]] = {kind: {} for kind in ("int8", "int4", "float", "palette", "sparse")}
    float_compute: list[str] = []
    float_others: list[str] = []
    for operation in program.operations:
        for key in ("x", "y", "weight") if operation.kind in _PRODUCTS else ():
            if key in operation.inputs:
                _count_weight(_origin(operation.inputs[key], makers), makers, weights)
        if operation.kind in MOVES or operation.kind.startswith("constexpr_"):
            continue
        if operation.kind in ("quantize", "dequantize", "cast") or _is_clip_of_compute(operation, makers):
            continue
        if not _computes_float(operation, makers):
            continue
        named = operation.kind in operation.name
        label = operation.name if named else f"{operation.kind} ({operation.name})"
        (float_compute if operation.kind in _COMPUTE else float_others).append(label)
    return Contents(
        int8_weight_bytes=sum(weights["int8"].values()),
        float_weight_bytes=sum(weights["float"].values()),
        ops=Counter(operation.kind for operation in program.operations),
        float_compute_ops=tuple(float_compute),
        float_ops=tuple(float_others),
        half_weight_bytes=sum(size for weight, size in weights["float"].items() if weight.dtype == "fp16"),
        int4_weight_bytes=sum(weights["int4"].values()),
        palette_weight_bytes=sum(weights["palette"].values()),
        sparse_weight_bytes=sum(weights["sparse"].values()),
        inputs=_endpoints(program.inputs),
        outputs=_endpoints(program.outputs),
        placements=by_support(
            program, {operation for operation in program.operations if _computes_float(operation, makers)}
        ),
    )


def _endpoints(values: Iterable[Any]) -> tuple[Endpoint, ...]:
    return tuple(
        Endpoint(value.name, of_one_sample(value.shape), _DTYPE_NAMES.get(value.dtype, value.dtype))
        for value in values
        if isinstance(value, Variable)
    )


def _origin(operand: Any, makers: Mapping[Variable, Operation]) -> Variable | Constant:
    """Follow a value back through operations that only move values."""
    while isinstance(operand, Variable) and operand in makers and makers[operand].kind in MOVES:
        operand = next(iter(makers[operand].operands()))
    origin: Variable | Constant = operand
    return origin


def _count_weight(
    origin: Variable | Constant, makers: Mapping[Variable, Operation], found: Mapping[str, dict[Any, int]]
) -> None:
    if isinstance(origin, Constant):
        found["float"][origin] = origin.size_bytes
        return
    maker = makers.get(origin)
    if maker is not None and (integers := _sparse_integers(maker, makers)) is not None:
        for key, kind in (("nonzero_data", "int8"), ("data_mask", "sparse")):
            part = integers.inputs[key]
            assert isinstance(part, Constant)
            found[kind][part] = _packed_bytes(part)
        return
    for key in _WEIGHTS.get(maker.kind, ()) if maker is not None else ():
        stored = maker.inputs.get(key) if maker is not None else None
        if isinstance(stored, Constant):
            found[_kind(maker, stored)][stored] = _packed_bytes(stored)


def _sparse_integers(maker: Operation, makers: Mapping[Variable, Operation]) -> Operation | None:
    """Find the operation that holds the integers of a sparse weight; ``None`` if the weight is not one of these."""
    values = maker.inputs.get("nonzero_data") if maker.kind == "constexpr_sparse_to_dense" else None
    before = makers.get(values) if isinstance(values, Variable) else None
    return before if before is not None and before.kind == _SPARSE_INTEGERS else None


def _kind(maker: Operation | None, stored: Constant) -> str:
    special = {"constexpr_lut_to_dense": "palette", "constexpr_sparse_to_dense": "sparse"}
    plain = {"int8": "int8", "uint8": "int8", "int4": "int4", "uint4": "int4"}.get(stored.dtype, "float")
    return plain if maker is None else special.get(maker.kind, plain)


def _packed_bytes(stored: Constant) -> int:
    """Count bytes in the file; in memory an integer of fewer than eight bits takes a whole byte."""
    bits = stored.dtype.removeprefix("u").removeprefix("int")
    return (stored.size_bytes * int(bits) + 7) // 8 if bits.isdigit() and int(bits) < 8 else stored.size_bytes


def _is_clip_of_compute(operation: Operation, makers: Mapping[Variable, Operation]) -> bool:
    source = operation.inputs.get("x")
    return operation.kind in _CLIPS and isinstance(source, Variable) and source in makers


def _computes_float(operation: Operation, makers: Mapping[Variable, Operation]) -> bool:
    """Whether an operation computes float outputs from float inputs; constants count only as weights of products."""
    if all(output.dtype not in ("fp16", "fp32") for output in operation.outputs):
        return False
    weight = operation.inputs.get(_PRODUCTS.get(operation.kind, ""))
    if weight is not None and isinstance(_origin(weight, makers), Constant):
        return True
    origins = [origin for operand in operation.operands() for origin in _origins(operand, makers)]
    kinds = {makers[origin].kind if origin in makers else "" for origin in origins if isinstance(origin, Variable)}
    return not kinds <= {"dequantize", *_WEIGHTS}


def _origins(operand: Variable | Constant, makers: Mapping[Variable, Operation]) -> list[Variable | Constant]:
    """List the values that a value is assembled from by operations that only move values."""
    if not isinstance(operand, Variable) or operand not in makers or makers[operand].kind not in MOVES:
        return [operand]
    return [origin for part in makers[operand].operands() for origin in _origins(part, makers)]
