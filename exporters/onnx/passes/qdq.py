"""Quantizations in an int8 ONNX graph in the one form in which ONNX Runtime finds its int8 kernels.

ONNX keeps an operation in float between a DequantizeLinear of each input and a QuantizeLinear of its output; a runtime
that finds all of them puts its int8 kernel there. ONNX Runtime finds them only in some forms: what torch.onnx writes of
ResNet-8 makes 5 of 9 convolutions int8. No pass here changes a value.
"""

from __future__ import annotations

import numpy
import onnx_ir as ir

from lightning_edge.exporters.onnx.graph import (
    Array,
    add_constant,
    attribute,
    constant,
    make,
    maker,
    only_reader,
    operand,
    put_behind,
    raised,
    read_instead,
    requantized,
    same_quantization,
)

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def repeats(graph: ir.Graph) -> None:
    """Quantize no value twice.

    Given: a dequantization and a quantization behind it that undo each other.

    Result: the value in front of them.

    Why: later passes look at what made a value, and find the other quantization.
    """
    for node in graph:
        up = maker(node.inputs[0], _DEQUANTIZE) if node.op_type == _QUANTIZE else None
        if up is not None and maker(up.inputs[0], _QUANTIZE) is not None and same_quantization(up, node):
            read_instead(node.outputs[0], up.inputs[0])


def paddings(graph: ir.Graph) -> None:
    """Pad with zeros in the convolution itself.

    Given: Pad with zeros of height and width, quantized or not, in front of Conv.

    Result: Conv that pads as much more.

    Why: ONNX Runtime 1.31 has no int8 kernel for Pad.
    """
    for node in graph:
        if node.op_type != "Conv" or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
            continue
        pad = maker(node.inputs[0], "Pad") or requantized(node.inputs[0], "Pad")
        if pad is None or attribute(pad, "mode", "constant") != "constant" or operand(pad, 3) is not None:
            continue
        amounts = constant(pad.inputs[1])
        value = numpy.zeros(1) if operand(pad, 2) is None else constant(pad.inputs[2])
        if amounts is None or value is None or value.any() or (amounts < 0).any():
            continue
        before, after = amounts.reshape(2, -1)
        own = attribute(node, "pads") or [0] * (2 * (len(before) - 2))
        if not before[:2].any() and not after[:2].any():
            added = zip(own, (*before[2:], *after[2:]), strict=True)
            node.attributes["pads"] = ir.AttrInt64s("pads", [int(one) + int(more) for one, more in added])
            node.replace_input_with(0, pad.inputs[0])


def activations(graph: ir.Graph) -> None:
    """Leave a ReLU or a clip to the quantization behind it.

    Given: Relu or Clip that a quantization alone reads.

    Result: the quantization, which cuts at the same values; with a Clip of the integers behind it where a limit is
    inside its range. Quantization keeps the order of values, so that the result is the same.

    Why: ONNX Runtime finds its int8 kernels for layers only right in front of a quantization (1.31).
    """
    for node in graph:
        clip = maker(node.inputs[0], "Relu", "Clip") if node.op_type == _QUANTIZE else None
        limits = None if clip is None else _limits(clip)
        if clip is None or limits is None or only_reader(clip.outputs[0]) is None:
            continue
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        assert scale is not None
        assert zero is not None
        if scale.size != 1:
            continue
        kind = numpy.iinfo(zero.dtype)
        steps = (numpy.rint(limit / scale) + int(zero.item()) for limit in limits)
        low, high = (int(numpy.clip(step, kind.min, kind.max).item()) for step in steps)
        node.replace_input_with(0, clip.inputs[0])
        if (low, high) != (kind.min, kind.max):
            ends = [add_constant(graph, numpy.array(end, zero.dtype)) for end in (low, high)]
            put_behind(node, make("Clip", [node.outputs[0], *ends]))


def unsigned(graph: ir.Graph) -> None:
    """Write activations as uint8, 128 higher; weights stay int8.

    Given: int8 activations, and constants in one scale that are no weights.

    Result: uint8 with a zero point 128 higher.

    Why: ONNX Runtime turns int8 activations into uint8 by itself, which its x86 kernels need, but only those with one
    reader. A layer with int8 on one side and uint8 on the other has no kernel: 4 of the 9 convolutions of ResNet-8
    were left in float (1.31).
    """
    lifted: dict[ir.Value | None, ir.Value] = {}
    for node in graph:
        if node.op_type == _QUANTIZE and _is_signed(node):
            chain = _integer_readers(node.outputs[0])
            for reader in () if chain is None else (node, *chain):
                _lift(graph, reader)
        elif node.op_type == _DEQUANTIZE and _is_signed(node):
            array, scale = constant(node.inputs[0]), constant(node.inputs[1])
            is_factor = any(reader.op_type in _PRODUCTS for reader in node.outputs[0].consumers())
            if array is not None and scale is not None and scale.size == 1 and not is_factor:
                if node.inputs[0] not in lifted:
                    lifted[node.inputs[0]] = add_constant(graph, raised(array))
                node.replace_input_with(0, lifted[node.inputs[0]])
                _lift(graph, node)


def zero_points(graph: ir.Graph) -> None:
    """Write zero points of weights where they are needed, and only there.

    Given: int8 weights with a zero point.

    Result: a weight that two layers share as uint8; one of a convolution without a zero point that is zero; any other
    with a zero point of its own.

    Why: on x86, asked for exact sums, ONNX Runtime copies int8 weights and zero points into uint8 under a name made of
    theirs, and fails at the second layer that has the same. QGemm's kernel is found only where a zero point is written
    (1.31).
    """
    shared: dict[ir.Value | None, list[ir.Value]] = {}
    for node in graph:
        zero = constant(operand(node, 2)) if node.op_type == _DEQUANTIZE else None
        weight = node.inputs[0]
        stored = None if zero is None else constant(weight)
        if weight is None or zero is None or stored is None or zero.dtype != numpy.int8:
            continue
        readers = [reader.op_type for same in weight.consumers() for reader in same.outputs[0].consumers()]
        if weight in shared or len(readers) > 1:
            if weight not in shared:
                shared[weight] = [add_constant(graph, raised(array)) for array in (stored, zero)]
            for position, value in zip((0, 2), shared[weight], strict=True):
                node.replace_input_with(position, value)
        elif readers[0] in ("Conv", "ConvTranspose") and not zero.any():
            node.resize_inputs(2)
        else:
            node.replace_input_with(2, add_constant(graph, zero))


def _integer_readers(value: ir.Value) -> list[ir.Node] | None:
    """What reads a quantized value, up to where it is dequantized; ``None`` if it goes elsewhere too."""
    found: list[ir.Node] = []
    if value.is_graph_output():
        return None
    for reader in value.consumers():
        found.append(reader)
        if reader.op_type == "Clip":
            more = _integer_readers(reader.outputs[0])
            if more is None:
                return None
            found += more
        elif reader.op_type != _DEQUANTIZE:
            return None
    return found


def _lift(graph: ir.Graph, node: ir.Node) -> None:
    """Write an operation's int8 constants as uint8, 128 higher."""
    for position in (1, 2) if node.op_type == "Clip" else (2,):
        stored: Array | None = constant(node.inputs[position])
        assert stored is not None
        if stored.dtype == numpy.int8:
            node.replace_input_with(position, add_constant(graph, raised(stored)))


def _is_signed(node: ir.Node) -> bool:
    zero = constant(operand(node, 2))
    return zero is not None and zero.dtype == numpy.int8 and zero.size == 1


def _limits(clip: ir.Node) -> tuple[float, float] | None:
    """Where a ReLU or a clip cuts, if that is constant."""
    if clip.op_type == "Relu":
        return 0.0, float("inf")
    found = []
    for position, missing in ((1, -float("inf")), (2, float("inf"))):
        value = numpy.array(missing) if operand(clip, position) is None else constant(clip.inputs[position])
        if value is None:
            return None
        found.append(float(value.item()))
    return found[0], found[1]
