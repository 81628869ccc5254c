"""Let a TensorFlow Lite file that was written for two samples take any number of them.

LiteRT's converter fails where the batch is free (litert-torch 0.10). Its runtime has no need of that: an app resizes
the inputs, and all shapes behind them follow, but for those that stand in the file as numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_edge.errors import ExportError
from lightning_edge.exporters.tflite import edit as tflite_edit
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.graph import dtype_name, op_name, schema_module

# How many the file is written for: of one sample, the converter loses the axis.
SAMPLES = 2

# What has the whole shape of its output in the file, and cannot leave a part of it open.
_FIXED = {
    "BROADCAST_TO": "an expansion",
    "CONV_3D_TRANSPOSE": "a transposed convolution",
    "FILL": "a value of a fixed shape",
    "TRANSPOSE_CONV": "a transposed convolution",
}
# What takes operands of one shape together.
_TOGETHER = {"ADD", "CONCATENATION", "DIV", "MAXIMUM", "MINIMUM", "MUL", "PACK", "SQUARED_DIFFERENCE", "SUB"}
# Of them, what takes none of one sample for all.
_SIDE_BY_SIDE = {"CONCATENATION", "PACK"}
_RESHAPES = {"EXPAND_DIMS", "RESHAPE", "SQUEEZE"}
_REDUCTIONS = {"ARG_MAX", "ARG_MIN", "MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "SUM"}


class _Place(NamedTuple):
    """Where the samples are in a tensor: the axis, and how much of that axis counts slower than they do."""

    axis: int
    slower: int = 1


def free_batch(model: Any) -> None:
    """Leave the axis of the samples free in all that is computed from an input with a batch, in place.

    Args:
        model: A file for `SAMPLES` of them; a file for one afterwards, until the inputs are resized.

    Raises:
        ExportError: If an operation has the whole shape of what it gives in the file, joins samples with a constant
            that is not the same for each, or puts them where this does not know.
    """
    graph = model.subgraphs[0]
    places = {int(index): _Place(0) for index in graph.inputs if _shape(graph, index)[:1] == [SAMPLES]}
    operators, graph.operators = graph.operators, []
    for op in operators:
        given = [int(index) for index in op.inputs if index >= 0]
        carrier = next((index for index in given if index in places), None)
        if carrier is None:
            graph.operators.append(op)
            continue
        name, place = op_name(model, op), places[carrier]
        if name in _FIXED:
            raise _refusal(_FIXED[name])
        if name in _TOGETHER:
            _meet_constants(model, graph, op, carrier, places)
        graph.operators.append(op)
        places.update({int(index): _place_behind(model, graph, op, carrier, place, index) for index in op.outputs})
        if name == "RESHAPE":
            _open_shape(model, graph, op, places[int(op.outputs[0])].axis)
        elif name == "SLICE":
            _open_size(model, graph, op, place.axis)
        elif name == "STRIDED_SLICE":
            op.builtinOptions.endMask |= 1 << place.axis  # to the end, whatever it is
    for index, (axis, _) in places.items():
        tensor, shape = graph.tensors[index], _shape(graph, index)
        tensor.shape = [*shape[:axis], shape[axis] // SAMPLES, *shape[axis + 1 :]]
        tensor.shapeSignature = [*shape[:axis], -1, *shape[axis + 1 :]]
    tflite_edit.drop_unread(model)


def _meet_constants(model: Any, graph: Any, op: Any, carrier: int, places: dict[int, _Place]) -> None:
    """Have an operation take constants that were written for each sample, such as class tokens, for any number."""
    place, rank = places[carrier], len(_shape(graph, carrier))
    inputs = [int(index) for index in op.inputs]
    for position, index in enumerate(inputs):
        shape = _shape(graph, index)
        if index in places or len(shape) != rank or shape[place.axis] == 1:
            continue
        one = _one_for_all(model, graph, index, place)
        if op_name(model, op) in _SIDE_BY_SIDE:
            one = _spread(model, graph, one, carrier, places)
        inputs[position] = one
    op.inputs = inputs


def _one_for_all(model: Any, graph: Any, index: int, place: _Place) -> int:
    """Give a constant without what it repeats for each sample."""
    import numpy

    tensor, maker = graph.tensors[index], tflite_edit.makers(graph).get(index)
    if maker is not None and op_name(model, maker) == "BROADCAST_TO":
        source, spread = _shape(graph, maker.inputs[0]), _shape(graph, index)
        if source == [*spread[: place.axis], 1, *spread[place.axis + 1 :]]:
            return int(maker.inputs[0])
    values = tflite_edit.constant(model, graph, index, dtype_name(tensor.type))
    if values is None or place.slower > 1 or values.shape[place.axis] != SAMPLES:
        raise _refusal("a constant that is joined to the samples")
    first, *others = numpy.split(values, SAMPLES, place.axis)
    if any(not numpy.array_equal(first, other) for other in others):
        raise _refusal("a constant that is another one for each sample")
    one = tflite_edit.add_constant(model, graph, first, first.dtype.name)
    graph.tensors[one].quantization = tensor.quantization
    return one


def _spread(model: Any, graph: Any, one: int, carrier: int, places: dict[int, _Place]) -> int:
    """Compute a constant for each of the samples there are: what is largest of it and what is smallest of it and them.

    The operations that spread a value do so to a shape, and a shape that is computed ends LiteRT's delegate.
    """
    schema = schema_module()
    source, tensor, size, axis = graph.tensors[carrier], graph.tensors[one], _shape(graph, one), places[carrier].axis
    fits = all(part <= whole for part, whole in zip(size, _shape(graph, carrier), strict=True))
    if not fits or source.type != tensor.type or not tflite_edit.same_scale(source, tensor):
        raise _refusal("a constant that is joined to each sample and larger than that, or in another scale,")
    size[axis] = SAMPLES

    def computed(name: str, *inputs: int) -> int:
        made = schema.TensorT(shape=size, type=tensor.type, hasRank=True, name=name.encode())
        made.quantization = tensor.quantization
        graph.tensors.append(made)
        outputs = [len(graph.tensors) - 1]
        code = tflite_graph.op_code(model, name)
        graph.operators.append(schema.OperatorT(opcodeIndex=code, inputs=list(inputs), outputs=outputs))
        places[outputs[0]] = places[carrier]
        return outputs[0]

    begin, reach = [0] * len(size), [-1 if other == axis else part for other, part in enumerate(size)]
    part = computed("SLICE", carrier, *(tflite_edit.add_constant(model, graph, numbers) for numbers in (begin, reach)))
    return computed("MAXIMUM", computed("MINIMUM", part, one), one)


def _place_behind(model: Any, graph: Any, op: Any, carrier: int, place: _Place, output: Any) -> _Place:
    """Where the samples are in an output of an operation, by where they are in one of its inputs."""
    name, before, after = op_name(model, op), _shape(graph, carrier), _shape(graph, output)
    axis, slower = place
    if name == "TRANSPOSE":
        return _Place(_numbers(model, graph, op.inputs[1]).index(axis), slower)
    if name in _RESHAPES or (name == "FULLY_CONNECTED" and len(before) != len(after)):
        # The order in memory stays; a linear layer takes all but the features as one axis.
        outside = math.prod(before[:axis]) * slower
        for other, size in enumerate(after):
            within, rest = divmod(outside, math.prod(after[:other]))
            if within and not rest and size % (within * SAMPLES) == 0:
                return _Place(other, within)
    elif name in ("SLICE", "STRIDED_SLICE") and len(before) == len(after):
        if before[axis] == after[axis]:
            return place
    elif name == "CONCATENATION" and op.builtinOptions.axis % len(after) == axis:
        if slower == 1 and after[axis] == before[axis] * len(op.inputs):
            return _Place(axis, len(op.inputs))  # parts of all samples, one after the other
    elif len(before) == len(after):
        return place
    elif name in _REDUCTIONS:
        over = [other % len(before) for other in _numbers(model, graph, op.inputs[1])]
        if axis not in over:
            return _Place(axis - sum(other < axis for other in over), slower)
    elif name == "PACK":
        return _Place(axis + (op.builtinOptions.axis % len(after) <= axis), slower)
    elif name == "UNPACK":
        if op.builtinOptions.axis % len(before) != axis:
            return _Place(axis - (op.builtinOptions.axis % len(before) < axis), slower)
    elif name == "EMBEDDING_LOOKUP" or (name == "GATHER" and carrier == int(op.inputs[1])):
        return _Place(axis + (op.builtinOptions.axis if name == "GATHER" else 0), slower)
    elif name in _TOGETHER:
        return _Place(axis + len(after) - len(before), slower)  # spread over operands with more axes in front
    raise _refusal(f"the operation {name}")


def _open_shape(model: Any, graph: Any, op: Any, axis: int) -> None:
    shape = _shape(graph, op.outputs[0])
    shape[axis] = -1
    if len(op.inputs) > 1:
        op.inputs = [op.inputs[0], tflite_edit.add_constant(model, graph, shape)]
    if op.builtinOptions is not None:
        op.builtinOptions.newShape = shape


def _open_size(model: Any, graph: Any, op: Any, axis: int) -> None:
    size = _numbers(model, graph, op.inputs[2])
    size[axis] = -1
    op.inputs = [*op.inputs[:2], tflite_edit.add_constant(model, graph, size)]


def _numbers(model: Any, graph: Any, index: Any) -> list[int]:
    """The numbers of an argument, which the converter writes as a constant."""
    found = tflite_edit.constant(model, graph, index)
    return [] if found is None else [int(number) for number in found.ravel()]


def _shape(graph: Any, index: Any) -> list[int]:
    shape = graph.tensors[int(index)].shape
    return [] if shape is None else [int(size) for size in shape]


def _refusal(what: str) -> ExportError:
    return ExportError(
        f"tflite: {what} has a batch of one sample written into the file, which max_batch cannot change. Leave "
        "max_batch out of the Interface, or the target; onnx and coreml take several samples of such a network."
    )
