"""Bring an ONNX model into the one form of every file: names of inputs and outputs, numbered values, nothing unread."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from lightning_edge.exporters.onnx.graph import make


def name_ends(graph: ir.Graph, outputs: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Name outputs and inputs; an output that is an input, a constant or given twice gets an operation of its own.

    Args:
        graph: The graph; it is edited in place.
        outputs: Names of the outputs; one that is taken gets ``_output`` behind it.
        inputs: Names of the inputs, which keep theirs if there are none.
    """
    if inputs:
        for value, name in zip(graph.inputs, inputs, strict=True):
            value.name = name
    used = {value.name for value in graph.inputs}
    seen: set[ir.Value] = set()
    for position, (value, name) in enumerate(zip(list(graph.outputs), outputs, strict=True)):
        result = value
        if value.producer() is None or value in seen:
            copy = make("Identity", [value])
            graph.append(copy)
            result = copy.outputs[0]
            result.shape, result.type = value.shape, value.type
            graph.outputs[position] = result
        seen.add(value)
        free = name
        while free in used:
            free += "_output"
        used.add(free)
        result.name = free


def remove_unread(model: ir.Model) -> None:
    """Remove operations and constants that nothing reads."""
    RemoveUnusedNodesPass()(model)


def tidy(model: ir.Model) -> None:
    """Share equal constants, number what is between inputs and outputs, and leave out what is only for debugging.

    The exporter writes the module path and the source lines, with paths of the machine, beside every operation.
    """
    graph = model.graph
    _share_constants(graph)
    remove_unread(model)
    _number_values(graph)
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "lightning-edge", "", None
    graph.name = "network"
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape and isinstance(value.shape[0], ir.SymbolicDim) and value.shape[0].value is not None:
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    for number, node in enumerate(graph.all_nodes()):
        # ONNX Runtime names what it adds after the operation it adds it to, and stumbles over two of one name.
        node.name = f"n{number}"
        # Attributes come in whatever order the exporter met them.
        attributes = sorted(node.attributes.items())
        node.attributes.clear()
        node.attributes.update(attributes)


def _share_constants(graph: ir.Graph) -> None:
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == ir.DataType.INT8:
            continue  # weights, and their zero points: `qdq.zero_points` says why two layers must not share one
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)


def _number_values(graph: ir.Graph) -> None:
    """Number the values between inputs and outputs in the order in which they are read and made."""
    ends = {*graph.inputs, *graph.outputs}
    prefix = ""
    while any(str(value.name).removeprefix(prefix).isdigit() for value in ends):
        prefix += "v"
    values = (value for node in graph.all_nodes() for value in (*node.inputs, *node.outputs))
    inside = dict.fromkeys(value for value in values if value is not None and value.name and value not in ends)
    graph.initializers.clear()
    for number, value in enumerate(inside):
        value.name = f"{prefix}{number}"
        value.metadata_props.clear()
        value.shape = value.type = None
        if value.const_value is not None:
            graph.register_initializer(value)
