"""Queries and edits of ONNX graphs: who makes and who reads a value, constants, operations put in. All on onnx_ir."""

from __future__ import annotations

from typing import Any

import numpy
import onnx_ir as ir

# Operations that hand the values of their first input on, only moved, repeated or left out.
VIEWS = frozenset(
    {
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)

Array = numpy.ndarray[Any, Any]


def maker(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """Give the operation that makes a value, if it is one of these kinds (any, if none are named), else ``None``."""
    node = None if value is None else value.producer()
    return node if node is not None and (not kinds or node.op_type in kinds) else None


def only_reader(value: ir.Value, *kinds: str) -> ir.Node | None:
    """Give the operation that alone reads a value, if it is one of these kinds, else ``None``."""
    readers = value.consumers()
    if value.is_graph_output() or len(readers) != 1 or (kinds and readers[0].op_type not in kinds):
        return None
    return readers[0]


def operand(node: ir.Node, position: int) -> ir.Value | None:
    """Give an input of an operation; ``None`` where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Give the value of an operation's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> Array | None:
    """Give the values of a constant; ``None`` for a value that is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """Give a shape, -1 for a batch of any size; nothing where it is unknown or another dimension is of any size."""
    sizes = [] if value is None or value.shape is None else list(value.shape)
    if not all(isinstance(size, int) for size in sizes[1:]):
        return ()
    return tuple(size if isinstance(size, int) else -1 for size in sizes)


def add_constant(graph: ir.Graph, array: Array) -> ir.Value:
    """Store a constant in the graph."""
    number = len(graph.initializers)
    while f"constant.{number}" in graph.initializers:
        number += 1
    value = ir.val(f"constant.{number}", const_value=ir.tensor(array))
    graph.register_initializer(value)
    return value


def make(kind: str, inputs: Any, outputs: int = 1, **attributes: Any) -> ir.Node:
    """Make an operation that is in no graph yet."""
    return ir.node(kind, list(inputs), attributes or None, num_outputs=outputs)


def replace(value: ir.Value, other: ir.Value) -> None:
    """Let all that reads a value read another one, the outputs of the graph included."""
    other.shape, other.type = value.shape, value.type
    if value.is_graph_output():
        other.name, value.name = value.name, None
    value.replace_all_uses_with(other, replace_graph_outputs=True)


def put_in_place(node: ir.Node, *added: ir.Node) -> None:
    """Insert operations in front of one; what read its output reads the output of the last."""
    node.prepend(added)
    replace(node.outputs[0], added[-1].outputs[0])


def put_behind(node: ir.Node, *added: ir.Node) -> None:
    """Insert operations behind one, whose output the first reads; what else read that reads the output of the last."""
    node.append(added)
    replace(node.outputs[0], added[-1].outputs[0])
    added[0].replace_input_with(0, node.outputs[0])


def read_instead(value: ir.Value, other: ir.Value | None) -> None:
    """Let all operations that read a value read another one; an output of the graph stays."""
    for reader, position in value.uses():
        reader.replace_input_with(position, other)


def same_quantization(one: ir.Node, other: ir.Node) -> bool:
    """Whether two operations quantize with the same scale and zero point."""
    pairs = [(constant(a), constant(b)) for a, b in zip(one.inputs[1:], other.inputs[1:], strict=False)]
    return len(one.inputs) == len(other.inputs) and all(
        left is not None and right is not None and left.dtype == right.dtype and numpy.array_equal(left, right)
        for left, right in pairs
    )


def requantized(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Give the operation of this kind that moved a value, between its dequantization and the same quantization.

    Returns:
        The operation, which reads a dequantized value, or ``None``.
    """
    up = maker(value, "DequantizeLinear")
    down = None if up is None else maker(up.inputs[0], "QuantizeLinear")
    mover = None if down is None else maker(down.inputs[0], kind)
    first = None if mover is None else maker(mover.inputs[0], "DequantizeLinear")
    if first is None or up is None or down is None:
        return None
    return mover if same_quantization(first, down) and same_quantization(first, up) else None


def raised(values: Array) -> Array:
    """Give int8 as uint8, 128 higher."""
    return (values.astype(numpy.int16) + 128).astype(numpy.uint8)
