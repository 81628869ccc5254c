"""Read a ``.pte`` file: its execution plan, and the graphs of its XNNPACK delegates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_edge import macs
from lightning_edge.contents import Contents, Endpoint, Placements
from lightning_edge.errors import require
from lightning_edge.exporters.executorch.read import coreml as pte_coreml
from lightning_edge.exporters.executorch.read import vulkan as pte_vulkan
from lightning_edge.exporters.executorch.read.tally import MOVES, Tally, decode
from lightning_edge.exporters.run.calls import of_one_sample
from lightning_edge.interface import Interface

# The one method that computes.
METHOD = "forward"
# Names of delegates in files and runtimes.
XNNPACK, CORE_ML, VULKAN = "XnnpackBackend", "CoreMLBackend", "VulkanBackend"
_NODE = "XNN"
# XNNPACK nodes that multiply by weights or matrices, with the fields of their two factors.
_PRODUCTS = {
    "Conv2d": ("input1_id", "filter_id"),
    "DepthwiseConv2d": ("input1_id", "filter_id"),
    "ConvTranspose2d": ("input1_id", "filter_id"),
    "FullyConnected": ("input1_id", "filter_id"),
    "BatchMatrixMultiply": ("input1_id", "input2_id"),
    "ScaledDotProductAttention": ("query_id", "key_id"),
}
# Nodes that only move or convert values. They are no computation, whatever the dtype.
_MOVES = frozenset({"Convert", "Copy", "StaticTranspose", "StaticReshape", "StaticSlice", "StaticConstantPad"})
_FLOATS = frozenset({"fp32", "fp16", "bf16", "pfp32"})
_INT8 = frozenset({"qint8", "quint8", "qcint8"})
_INT4 = frozenset({"qcint4", "qbint4"})
# ExecuTorch's names of dtypes that PyTorch names differently.
_DTYPES = {
    "BYTE": "uint8",
    "CHAR": "int8",
    "SHORT": "int16",
    "INT": "int32",
    "LONG": "int64",
    "HALF": "float16",
    "FLOAT": "float32",
    "DOUBLE": "float64",
}
_KERNEL_PRODUCTS = re.compile(r"aten::(convolution|linear|addmm|mm|bmm|baddbmm|matmul)\b")
# The weights of a linear layer are transposed by a kernel of their own before the product.
_KERNEL_TURNS = re.compile(r"aten::(permute|transpose|t)_copy\b")


def read(path: Path) -> Contents:
    """Read a ``.pte`` file.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is cut short, is no ExecuTorch program, or has a delegate that is not read here.
    """
    program = _program(path.read_bytes())
    interface = Interface.of_notes(_notes(program))
    main = next((plan for plan in program.execution_plan if plan.name == METHOD), program.execution_plan[0])
    tally = Tally()
    delegates: list[str] = []
    planned = 0
    for plan in program.execution_plan:
        planned += sum(plan.non_const_buffer_sizes)
        for index, delegate in enumerate(plan.delegates):
            if delegate.id not in _READERS:
                known = ", ".join(map(repr, _READERS))
                raise ValueError(f"delegate {delegate.id!r} is not one that this version reads: {known}")
            payload = bytes(program.backend_delegate_data[delegate.processed.index].data)
            _READERS[delegate.id](payload, f"{index}", tally)
            delegates.append(delegate.id)
        for chain in plan.chains:
            for instruction in chain.instructions:
                _count_kernel(plan, program, instruction.instr_args, tally)
    return Contents(
        int8_weight_bytes=sum(tally.int8_weights.values()),
        float_weight_bytes=sum(tally.float_weights.values()),
        ops=dict(sorted(tally.ops.items())),
        float_compute_ops=tuple(tally.float_compute),
        float_ops=tuple(tally.float_other),
        delegated_ops=tally.delegated,
        undelegated_ops=tuple(tally.undelegated),
        planned_memory_bytes=planned,
        half_weight_bytes=sum(tally.half_weights.values()),
        int4_weight_bytes=sum(tally.int4_weights.values()),
        inputs=_named(_endpoints(main, "inputs"), interface.inputs),
        outputs=_named(_endpoints(main, "outputs"), interface.outputs),
        placements=Placements.of("the file", tally.places),
        interface=interface,
        delegates=tuple(dict.fromkeys(delegates)),
    )


def _notes(program: Any) -> dict[str, str]:
    """Return the constant strings of the program by method name; ExecuTorch stores metadata as such methods."""
    values = {plan.name: [plan.values[index].val for index in plan.outputs] for plan in program.execution_plan}
    return {
        name: found[0].string_val
        for name, found in values.items()
        if len(found) == 1 and type(found[0]).__name__ == "String"
    }


def _named(endpoints: tuple[Endpoint, ...], names: tuple[str, ...]) -> tuple[Endpoint, ...]:
    """Name the endpoints after the interface; a program has no names of its own."""
    if len(names) != len(endpoints):
        return endpoints
    return tuple(replace(end, name=name) for end, name in zip(endpoints, names, strict=True))


def _endpoints(plan: Any, side: str) -> tuple[Endpoint, ...]:
    """Return the inputs or outputs of a method. They are float: XNNPACK quantizes inside its graphs."""
    tensors = [plan.values[index].val for index in getattr(plan, side)]
    return tuple(
        Endpoint(None, _sizes(tensor), _DTYPES.get(tensor.scalar_type.name, tensor.scalar_type.name.lower()))
        for tensor in tensors
        if type(tensor).__name__ == "Tensor"
    )


def _sizes(tensor: Any) -> tuple[int, ...]:
    """Its shape for one sample: where the first dimension is free, a program holds the most that it may be."""
    is_free = tensor.shape_dynamism.name != "STATIC"
    return of_one_sample([None, *tensor.sizes[1:]] if is_free else tensor.sizes)


def _program(data: bytes) -> Any:
    serialize = require("executorch.exir._serialize._program", "executorch")
    if data[4:6] != b"ET":
        raise ValueError("it does not start as an ExecuTorch program does")
    header = serialize._get_extended_header(data)
    if header is not None:
        needed = max(header.program_size, header.segment_base_offset + header.segment_data_size)
        if len(data) < needed:
            raise ValueError(f"it is cut short: {len(data)} bytes of {needed}")
    return serialize.deserialize_pte_binary(data).program


def _graph(payload: bytes) -> dict[str, Any]:
    """Decode one XNNPACK payload: a header, a flatbuffer, and the constants that are not stored by name."""
    xnnpack = require("executorch.backends.xnnpack.serialization.xnnpack_graph_serialize", "executorch")
    header = xnnpack.XNNHeader.from_bytes(payload[: xnnpack.XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    return decode(xnnpack._get_schema_bytes(), payload[start : start + header.flatbuffer_size])


def _count_graph(graph: dict[str, Any], name: str, tally: Tally) -> None:
    values: dict[int, tuple[str, int]] = {}
    shapes: dict[int, list[int]] = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        values[tensor["id_out"]] = (tensor["datatype"].removeprefix("xnn_datatype_"), tensor["constant_buffer_idx"])
        shapes[tensor["id_out"]] = tensor["dims"]
    for node in graph["xnodes"]:
        kind = node["xnode_union_type"].removeprefix(_NODE)
        fields = node["xnode_union"]
        tally.ops[kind] += 1
        tally.delegated += 1
        tally.places.append((kind, "delegate", _node_macs(kind, fields, shapes)))
        if kind in _PRODUCTS:
            left, right = _PRODUCTS[kind]
            if values[fields[left]][0] in _FLOATS or values[fields[right]][0] in _FLOATS:
                tally.float_compute.append(kind)
            datatype, constant = values[fields[right]]
            if constant:
                entry = graph["constant_data"][constant]
                key = entry["named_key"] or f"{name}:{constant}"
                integers = {**dict.fromkeys(_INT8, tally.int8_weights), **dict.fromkeys(_INT4, tally.int4_weights)}
                integers.get(datatype, tally.float_weights)[key] = entry["size"]
                if datatype == "fp16":
                    tally.half_weights[key] = entry["size"]
        elif kind not in _MOVES and not kind.startswith("Concatenate") and values[fields["output_id"]][0] in _FLOATS:
            tally.float_other.append(kind)


def _count_kernel(plan: Any, program: Any, call: Any, tally: Tally) -> None:
    if type(call).__name__ != "KernelCall":
        return
    operator = plan.operators[call.op_index]
    name = str(operator.name)
    tally.ops[name] += 1
    tally.undelegated.append(name)
    tensors = [tensor for index in call.args for tensor in _tensors(plan, index)]
    tally.places.append((name, "cpu", _kernel_macs(name, plan, call.args)))
    is_float = any(tensor.scalar_type.name in ("FLOAT", "HALF", "DOUBLE", "BFLOAT16") for tensor in tensors)
    if not is_float:
        return
    if _KERNEL_PRODUCTS.match(name):
        tally.float_compute.append(name)
    elif not MOVES.match(name):
        tally.float_other.append(name)
    if _KERNEL_PRODUCTS.match(name) or _KERNEL_TURNS.match(name):
        for tensor in tensors:
            if tensor.data_buffer_idx and tensor.allocation_info is None and len(tensor.sizes) > 1:
                size = len(program.constant_buffer[tensor.data_buffer_idx].storage)
                tally.float_weights[f"constant:{tensor.data_buffer_idx}"] = size


def _tensors(plan: Any, index: int) -> Iterator[Any]:
    value = plan.values[index].val
    if type(value).__name__ == "Tensor":
        yield value
    elif type(value).__name__ == "TensorList":
        for item in value.items:
            yield from _tensors(plan, item)


def _node_macs(kind: str, fields: dict[str, Any], shapes: dict[int, list[int]]) -> int:
    """Return the multiply-accumulates of an XNNPACK node."""
    if kind not in _PRODUCTS:
        return 0
    left, right = (shapes[fields[name]] for name in _PRODUCTS[kind])
    if kind == "ScaledDotProductAttention":
        return macs.attention(left, right, shapes[fields["value_id"]])
    output = shapes[fields["output_id"]]
    if kind == "ConvTranspose2d":
        channels = fields["groups"] * fields["group_input_channels"]
        return macs.transposed_convolution(left, right, channels)
    if kind.endswith("Conv2d"):
        return macs.convolution(output, right, fields["groups"] * fields["group_output_channels"])
    if kind == "FullyConnected":
        return macs.convolution(output, right, output[-1])
    return macs.product(output, left[-1])


def _kernel_macs(name: str, plan: Any, arguments: Any) -> int:
    """Return the multiply-accumulates of a call of a portable kernel; its last argument is the output."""
    if not (found := _KERNEL_PRODUCTS.match(name)):
        return 0
    values = [plan.values[index].val for index in arguments]
    shapes = [value.sizes if type(value).__name__ == "Tensor" else [] for value in values]
    kind = found.group(1)
    if kind == "convolution":
        data, weight, output = shapes[0], shapes[1], shapes[-1]
        if getattr(values[6], "bool_val", False):
            return macs.transposed_convolution(data, weight, weight[0])
        return macs.convolution(output, weight, weight[0])
    factor = shapes[1] if kind in ("addmm", "baddbmm") else shapes[0]
    return macs.product(shapes[-1], factor[-1])


_READERS: dict[str, Callable[[bytes, str, Tally], None]] = {
    XNNPACK: lambda payload, name, tally: _count_graph(_graph(payload), name, tally),
    VULKAN: lambda payload, name, tally: pte_vulkan.count(payload, tally),
    CORE_ML: pte_coreml.count,
}
