"""Write an int8 ONNX graph in the one form whose convolutions and linear layers ONNX Runtime runs on int8 kernels.

ONNX keeps an operation in float between a DequantizeLinear of each input and a QuantizeLinear of its output; a runtime
that finds all of them puts its int8 kernel there. ONNX Runtime finds them only in some forms: what torch.onnx writes of
ResNet-8 makes 5 of 9 convolutions int8, for the reasons that each function here states. No function changes a value.
"""

from __future__ import annotations

from typing import Any

import numpy

from lightning_edge.exporters.onnx.graph import Array, Graph, attribute, requantized, same_quantization, set_attribute

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_PRODUCTS = frozenset({*_LAYERS, "MatMul"})


def paddings(graph: Graph) -> None:
    """Put a padding with zeros into the convolution behind it: ONNX Runtime has no int8 kernel for it."""
    for node in graph.nodes:
        if node.op_type != "Conv" or attribute(node, "auto_pad", b"NOTSET") != b"NOTSET":
            continue
        pad = graph.maker(node.input[0], "Pad") or requantized(graph, node.input[0], "Pad")
        if pad is None or attribute(pad, "mode", b"constant") != b"constant":
            continue
        amounts = graph.constant(pad.input[1])
        value = graph.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else numpy.zeros(1)
        given_axes = len(pad.input) > 3 and pad.input[3]
        if amounts is None or value is None or value.any() or given_axes or (amounts < 0).any():
            continue
        before, after = amounts.reshape(2, -1)
        own = attribute(node, "pads") or [0] * (2 * (len(before) - 2))
        if not before[:2].any() and not after[:2].any():
            added = (*before[2:], *after[2:])
            set_attribute(node, "pads", [int(one) + int(more) for one, more in zip(own, added, strict=True)])
            node.input[0] = pad.input[0]


def averages(graph: Graph) -> None:
    """Write a mean over the whole image as GlobalAveragePool, which has an int8 kernel: ReduceMean has none."""
    shapes = graph.shapes()
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        axes = graph.constant(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        rank = len(shapes.get(node.input[0], ())) if axes is not None else 0
        if axes is None or rank < 3 or sorted(int(axis) % rank for axis in axes) != list(range(2, rank)):
            continue
        pool = graph.make("GlobalAveragePool", node.input[:1], node.output)
        nodes[-1:] = [pool]
        if not attribute(node, "keepdims", 1):
            quantize = graph.only_reader(node.output[0], _QUANTIZE)
            flat = graph.make("Flatten", [graph.new_name()], node.output)
            pool.output[0] = flat.input[0]
            if quantize is not None:  # between two of its own, or the pool is no int8 operation
                down = graph.make(_QUANTIZE, [pool.output[0], *quantize.input[1:]])
                up = graph.make(_DEQUANTIZE, [down.output[0], *quantize.input[1:]])
                flat.input[0] = up.output[0]
                nodes += [down, up]
            nodes.append(flat)
    graph.settle(nodes)


def activations(graph: Graph) -> None:
    """Leave a ReLU or a clip to the quantization behind it, which cuts at the same values.

    Where its limit is inside the quantized range, the integers are clipped instead: quantization keeps the order of
    values, so the result is the same, and the layer before can be int8.
    """
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op_type != _QUANTIZE:
            continue
        clip = graph.maker(node.input[0], "Relu", "Clip")
        limits = None if clip is None else _limits(graph, clip)
        if limits is None or graph.only_reader(clip.output[0]) is None:
            continue
        scale, zero, info = _quantization(graph, node)
        if scale.size != 1:
            continue
        low, high = (int(numpy.clip(numpy.rint(limit / scale) + zero, info.min, info.max).item()) for limit in limits)
        node.input[0] = clip.input[0]
        if (low, high) != (info.min, info.max):
            result = node.output[0]
            node.output[0] = graph.new_name()
            ends = [graph.add_constant(numpy.array(value, info.dtype)) for value in (low, high)]
            nodes.append(graph.make("Clip", [node.output[0], *ends], [result]))
    graph.settle(nodes)


def integer_biases(graph: Graph) -> None:
    """Store biases as int32 in steps of input scale times weight scale, as the kernels add them.

    Where a bias does not fit, as that of a channel whose weights are all but zero, the channel's weights get a larger
    step: they are then too small beside the bias to matter.
    """
    nodes = []
    for node in graph.nodes:
        if node.op_type in _LAYERS and len(node.input) > 2 and node.input[2]:
            data, weight = (graph.maker(name, _DEQUANTIZE) for name in node.input[:2])
            bias = graph.constant(node.input[2])
            step = None if data is None else graph.constant(data.input[1])
            scale = None if weight is None else graph.constant(weight.input[1])
            stored = None if weight is None else graph.constant(weight.input[0])
            if step is None or scale is None or stored is None or bias is None:
                nodes.append(node)
                continue
            if step.size == 1 and scale.size in (1, bias.size) and bias.dtype == numpy.float32:
                nodes += _integer_bias(graph, node, weight, step, scale, stored, bias)
        nodes.append(node)
    graph.settle(nodes)


def unsigned(graph: Graph) -> None:
    """Write activations as uint8 where they were int8, 128 higher; weights stay int8.

    ONNX Runtime turns int8 activations into uint8 by itself, which its x86 kernels need, but only those with one
    reader. A value that two branches read stays int8, and a layer with int8 on one side and uint8 on the other has no
    kernel: so 4 of the 9 convolutions of ResNet-8 were left in float.
    """
    lifted: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type == _QUANTIZE and _is_signed(graph, node):
            chain = _integer_readers(graph, node.output[0])
            if chain is not None:
                for reader in [node, *chain]:
                    _lift(graph, reader)
        elif node.op_type == _DEQUANTIZE and _is_signed(graph, node):
            array = graph.constant(node.input[0])
            scale = graph.constant(node.input[1])
            readers = graph.readers[node.output[0]]
            factor = any(reader.op_type in _PRODUCTS for reader in readers)
            if array is not None and scale is not None and scale.size == 1 and not factor:
                name = node.input[0]
                if name not in lifted:
                    lifted[name] = graph.add_constant((array.astype(numpy.int16) + 128).astype(numpy.uint8))
                node.input[0] = lifted[name]
                _lift(graph, node)


def zero_points(graph: Graph) -> None:
    """Write a weight that two layers share as uint8, and a zero point of its own for each that needs one.

    On x86, asked for exact sums, ONNX Runtime copies int8 weights and zero points into uint8 under a name made of
    theirs, and fails at the second layer that has the same. QGemm's kernel is found only where a zero point is written;
    convolutions do without.
    """
    shared: dict[str, tuple[str, str]] = {}
    for node in graph.nodes:
        zero = graph.constant(node.input[2]) if node.op_type == _DEQUANTIZE and len(node.input) > 2 else None
        stored = None if zero is None else graph.constant(node.input[0])
        if zero is None or stored is None or zero.dtype != numpy.int8:
            continue
        dequantized = [reader.output[0] for reader in graph.readers[node.input[0]]]
        readers = [reader.op_type for name in dequantized for reader in graph.readers[name]]
        if len(readers) > 1:
            if node.input[0] not in shared:
                lifted = [(array.astype(numpy.int16) + 128).astype(numpy.uint8) for array in (stored, zero)]
                shared[node.input[0]] = (graph.add_constant(lifted[0]), graph.add_constant(lifted[1]))
            node.input[0], node.input[2] = shared[node.input[0]]
        elif readers[0] in ("Conv", "ConvTranspose") and not zero.any():
            del node.input[2]
        else:
            node.input[2] = graph.add_constant(zero)


def repeats(graph: Graph) -> None:
    """Leave out a dequantization and a quantization that undo each other."""
    for node in graph.nodes:
        up = graph.maker(node.input[0], _DEQUANTIZE) if node.op_type == _QUANTIZE else None
        if up is not None and graph.maker(up.input[0], _QUANTIZE) is not None and same_quantization(graph, up, node):
            for reader in graph.readers[node.output[0]]:
                reader.input[:] = [up.input[0] if name == node.output[0] else name for name in reader.input]


def linears(graph: Graph) -> None:
    """Write a linear layer of more than two dimensions as Gemm on two: MatMul and Add have no int8 kernel together."""
    shapes = graph.shapes()
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        turned = graph.maker(node.input[1], "Transpose") if node.op_type == "MatMul" else None
        weight = None if turned is None else graph.maker(turned.input[0], _DEQUANTIZE)
        data = None if weight is None else graph.maker(node.input[0], _DEQUANTIZE)
        if turned is None or weight is None or data is None:
            continue
        stored = graph.constant(weight.input[0])
        add = graph.only_reader(node.output[0], "Add")
        bias = None if add is None else next((name for name in add.input if name != node.output[0]), "")
        last = node if add is None else add
        quantize = graph.only_reader(last.output[0], _QUANTIZE)
        bias_values = None if bias is None else graph.constant(bias)
        plain = stored is not None and stored.ndim == 2 and list(attribute(turned, "perm", [1, 0])) == [1, 0]
        if not plain or stored is None or quantize is None or node.output[0] not in shapes:
            continue
        if add is not None and (bias_values is None or bias_values.shape != stored.shape[:1]):
            continue
        flat = graph.make(
            "Reshape", [node.input[0], graph.add_constant(numpy.array([-1, stored.shape[1]], numpy.int64))]
        )
        down = graph.make(_QUANTIZE, [flat.output[0], *data.input[1:]])
        up = graph.make(_DEQUANTIZE, [down.output[0], *data.input[1:]])
        layer = graph.make("Gemm", [up.output[0], turned.input[0], *([bias] if bias else [])], transB=1)
        out = graph.make(_QUANTIZE, [layer.output[0], *quantize.input[1:]])
        back = graph.make(_DEQUANTIZE, [out.output[0], *quantize.input[1:]])
        shape = graph.add_constant(numpy.array(shapes[node.output[0]], numpy.int64))
        whole = graph.make("Reshape", [back.output[0], shape], last.output)
        nodes[-1:] = [flat, down, up, layer, out, back, whole]
        last.output[0] = graph.new_name()  # nobody reads the old one
        if add is not None:
            nodes.append(node)
    graph.settle(nodes)


def _integer_readers(graph: Graph, name: str) -> list[Any] | None:
    """What reads a quantized value, up to where it is dequantized; ``None`` if it goes elsewhere too."""
    found: list[Any] = []
    if name in graph.outputs:
        return None
    for reader in graph.readers[name]:
        found.append(reader)
        if reader.op_type == "Clip":
            more = _integer_readers(graph, reader.output[0])
            if more is None:
                return None
            found += more
        elif reader.op_type != _DEQUANTIZE:
            return None
    return found


def _lift(graph: Graph, node: Any) -> None:
    """Write an operation's int8 constants as uint8, 128 higher."""
    for position in (1, 2) if node.op_type == "Clip" else (2,):
        constant = graph.constant(node.input[position])
        assert constant is not None
        if constant.dtype == numpy.int8:
            node.input[position] = graph.add_constant((constant.astype(numpy.int16) + 128).astype(numpy.uint8))


def _is_signed(graph: Graph, node: Any) -> bool:
    zero = graph.constant(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and zero.dtype == numpy.int8 and zero.size == 1


def _integer_bias(
    graph: Graph, node: Any, weight: Any, step: Array, scale: Array, stored: Array, bias: Array
) -> list[Any]:
    """Put int32 in the place of a bias; returns the operations that must come before the layer."""
    before = []
    largest = float(numpy.iinfo(numpy.int32).max - 128)  # the largest that float32 scales cannot push over the end
    flat = bias.reshape(-1).astype(numpy.float64)
    steps = numpy.broadcast_to(step.reshape(-1) * scale.reshape(-1), flat.shape).astype(numpy.float32)
    too_small = numpy.abs(flat) > largest * steps.astype(numpy.float64)
    if too_small.any():
        wide = scale.reshape(-1).astype(numpy.float64)
        wide = numpy.broadcast_to(wide, flat.shape).copy() if scale.size > 1 else wide
        needed = numpy.abs(flat) / (largest * float(step.item())) * 1.001
        wide = numpy.maximum(wide, needed if scale.size > 1 else needed.max()).astype(numpy.float32)
        axis = attribute(weight, "axis", 1)
        shape = [-1 if position == axis else 1 for position in range(stored.ndim)] if scale.size > 1 else [1]
        ratio = (scale.reshape(-1) / wide).reshape(shape)
        rounded = graph.add_constant(numpy.rint(stored * ratio).astype(numpy.int8))
        own = graph.make(
            _DEQUANTIZE, [rounded, graph.add_constant(wide.reshape(scale.shape)), *weight.input[2:]], axis=axis
        )
        before.append(own)
        node.input[1] = own.output[0]
        steps = numpy.broadcast_to(step.reshape(-1) * wide, flat.shape).astype(numpy.float32)
    values = numpy.rint(flat / steps).astype(numpy.int32)
    steps = steps[:1].reshape(()) if scale.size == 1 else steps
    inputs = [graph.add_constant(values.reshape(bias.shape)), graph.add_constant(steps)]
    dequantize = graph.make(_DEQUANTIZE, inputs, axis=0)
    node.input[2] = dequantize.output[0]
    return [*before, dequantize]


def _limits(graph: Graph, clip: Any) -> tuple[float, float] | None:
    """Where a ReLU or a clip cuts, if that is constant."""
    if clip.op_type == "Relu":
        return 0.0, float("inf")
    found = []
    for position, missing in ((1, -float("inf")), (2, float("inf"))):
        given = len(clip.input) > position and clip.input[position]
        value = graph.constant(clip.input[position]) if given else numpy.array(missing)
        if value is None:
            return None
        found.append(float(value.item()))
    return found[0], found[1]


def _quantization(graph: Graph, node: Any) -> tuple[Array, int, Any]:
    """Scale, zero point and limits of the integers of a quantization."""
    scale = graph.constant(node.input[1])
    zero = graph.constant(node.input[2])
    assert scale is not None
    assert zero is not None
    return scale, int(zero.reshape(-1)[0]), numpy.iinfo(zero.dtype)
