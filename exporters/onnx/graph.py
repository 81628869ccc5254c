"""Read and edit the graph of an ONNX model; leave out of it what no runtime needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy

from lightning_edge.errors import require

_EXTRA = "onnx"
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


@final
class Graph:
    """An ONNX graph with who makes and who reads each value; `settle` after nodes were added or taken away.

    Args:
        model: A ``ModelProto``; it is edited in place.

    Attributes:
        proto: Its ``GraphProto``.
    """

    def __init__(self, model: Any) -> None:
        self._onnx = require("onnx", _EXTRA)
        self.proto = model.graph
        self._model = model
        self.int8 = self._onnx.TensorProto.INT8
        self.uint8 = self._onnx.TensorProto.UINT8
        self._added = 0
        self._names = {name for node in self.nodes for name in node.output}
        self._names.update(value.name for value in model.graph.initializer)
        self.settle()

    @property
    def nodes(self) -> list[Any]:
        """Its operations, each after those that make what it reads."""
        return list(self.proto.node)

    def settle(self, nodes: Iterable[Any] | None = None) -> None:
        """Take these nodes in place of its own, without those that nobody reads, and look again who reads what."""
        kept = self._living(self.nodes if nodes is None else list(nodes))
        del self.proto.node[:]
        self.proto.node.extend(kept)
        read = {name for node in self.nodes for name in _reads(node)} | {value.name for value in self.proto.output}
        initializers = [value for value in self.proto.initializer if value.name in read]
        del self.proto.initializer[:]
        self.proto.initializer.extend(initializers)
        self.initializers = {value.name: value for value in self.proto.initializer}
        self.makers = {name: node for node in self.proto.node for name in node.output if name}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.proto.node:
            for name in dict.fromkeys(_reads(node)):
                self.readers[name].append(node)
        self.outputs = {value.name for value in self.proto.output}

    def maker(self, name: str, *kinds: str) -> Any:
        """The operation that makes a value, if it is one of these kinds (any, if none are named), else ``None``."""
        node = self.makers.get(name)
        return node if node is not None and (not kinds or node.op_type in kinds) else None

    def only_reader(self, name: str, *kinds: str) -> Any:
        """The operation that alone reads a value, if it is one of these kinds, else ``None``."""
        readers = self.readers[name]
        if name in self.outputs or len(readers) != 1 or (kinds and readers[0].op_type not in kinds):
            return None
        return readers[0]

    def constant(self, name: str) -> Array | None:
        """The values of an initializer or of a ``Constant`` operation, else ``None``."""
        if name in self.initializers:
            array: Array = self._onnx.numpy_helper.to_array(self.initializers[name])
            return array
        node = self.maker(name, "Constant")
        if node is None or node.attribute[0].name != "value":
            return None
        array = self._onnx.numpy_helper.to_array(node.attribute[0].t)
        return array

    def add_constant(self, array: Array) -> str:
        """Store values in the file; returns their name."""
        name = self.new_name()
        self.proto.initializer.append(self._onnx.numpy_helper.from_array(numpy.asarray(array), name))
        self.initializers[name] = self.proto.initializer[-1]
        return name

    def new_name(self) -> str:
        """A name that no value has yet."""
        while (name := f"lightning_edge.{self._added}") in self._names:
            self._added += 1
        self._names.add(name)
        return name

    def make(self, kind: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, **attributes: Any) -> Any:
        """Make an operation, which is not in the graph yet; its output gets a new name unless one is given."""
        return self._onnx.helper.make_node(kind, list(inputs), list(outputs or [self.new_name()]), **attributes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the values, as far as they can be inferred; -1 for a batch of any size, the rest being fixed."""
        return {
            name: tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
            for name, kind in self.types().items()
            if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim[1:])
        }

    def types(self) -> dict[str, Any]:
        """The tensor types of the values, as far as they can be inferred."""
        inferred = self._onnx.shape_inference.infer_shapes(self._model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        return {value.name: value.type.tensor_type for value in values}

    def _living(self, nodes: list[Any]) -> list[Any]:
        wanted = {value.name for value in self.proto.output}
        living: list[Any] = []
        for node in reversed(nodes):
            if wanted.intersection(node.output):
                living.append(node)
                wanted.update(_reads(node))
        return living[::-1]


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of an operation's attribute."""
    helper = require("onnx", _EXTRA).helper
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def set_attribute(node: Any, name: str, value: Any) -> None:
    """Give an operation's attribute another value."""
    others = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend([*others, require("onnx", _EXTRA).helper.make_attribute(name, value)])


def same_quantization(graph: Graph, one: Any, other: Any) -> bool:
    """Whether two operations quantize with the same scale and zero point."""
    pairs = [(graph.constant(a), graph.constant(b)) for a, b in zip(one.input[1:], other.input[1:], strict=False)]
    return len(one.input) == len(other.input) and all(
        left is not None and right is not None and left.dtype == right.dtype and numpy.array_equal(left, right)
        for left, right in pairs
    )


def requantized(graph: Graph, name: str, kind: str) -> Any:
    """The operation of this kind that only moved a value: between its dequantization and the same quantization.

    Returns:
        The operation, which reads a dequantized value, or ``None``.
    """
    up = graph.maker(name, "DequantizeLinear")
    down = None if up is None else graph.maker(up.input[0], "QuantizeLinear")
    mover = None if down is None else graph.maker(down.input[0], kind)
    first = None if mover is None else graph.maker(mover.input[0], "DequantizeLinear")
    same = first is not None and all(same_quantization(graph, first, other) for other in (down, up))
    return mover if same else None


def name_outputs(model: Any, names: Sequence[str], inputs: Sequence[str] = ()) -> None:
    """Name the outputs of the graph; one that is an input, a constant or given twice gets an operation of its own.

    Args:
        model: A ``ModelProto``; it is edited in place.
        names: Names of the outputs.
        inputs: Names of the inputs, which keep theirs if there are none.
    """
    graph = Graph(model)
    ends = list(graph.proto.output)
    if inputs:
        _name_inputs(graph, inputs)
    given = {value.name for value in graph.proto.input}
    # Everything inside makes room first: a value may have the name that an output shall have.
    inside = {name: f"#{name}" for name in (*graph.makers, *graph.initializers) if name not in given}
    for value in graph.proto.initializer:
        value.name = inside.get(value.name, value.name)
    nodes = graph.nodes
    for node in nodes:
        _rename(node, inside)
    renamed: dict[str, str] = {}
    copies = []
    taken = set(given)
    for value, wanted in zip(ends, names, strict=True):
        source = inside.get(value.name, value.name)
        value.name = _free(wanted, taken)
        taken.add(value.name)
        if source in renamed or source in given or source[1:] in graph.initializers:
            copies.append((source, value.name))
        else:
            renamed[source] = value.name
    for node in nodes:
        _rename(node, renamed)
    nodes += [graph.make("Identity", [renamed.get(source, source)], [name]) for source, name in copies]
    graph.settle(nodes)


def _name_inputs(graph: Graph, names: Sequence[str]) -> None:
    """Name the inputs; what has one of these names inside makes room."""
    values = [value for value in graph.proto.input if value.name not in graph.initializers]
    new = dict(zip((value.name for value in values), names, strict=True))
    inside = {name: f"#{name}" for name in (*graph.makers, *graph.initializers) if name in names}
    for value in (*values, *graph.proto.initializer, *graph.proto.output):
        value.name = {**new, **inside}.get(value.name, value.name)
    for node in graph.nodes:
        _rename(node, {**new, **inside})
    graph.settle()


def set_notes(model: Any, notes: Mapping[str, str]) -> None:
    """Keep short texts in the model's metadata, by name."""
    for name, text in notes.items():
        model.metadata_props.add(key=name, value=text)


def tidy(model: Any) -> None:
    """Share equal constants, shorten names, and leave out what is only for debugging.

    The exporter writes the module path and the source lines, with paths of the machine, beside every operation.
    """
    graph = Graph(model)
    first: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for value in graph.proto.initializer:
        array = graph.constant(value.name)
        assert array is not None
        if value.data_type == graph.int8:
            continue  # weights, and their zero points: `onnx_int8.zero_points` says why two layers must not share one
        same[value.name] = first.setdefault((value.data_type, array.shape, array.tobytes()), value.name)
    for node in graph.nodes:
        _rename(node, same)
    graph.settle(_numbered(graph))
    for part in (model, graph.proto):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.proto.ClearField("value_info")
    graph.proto.ClearField("quantization_annotation")
    graph.proto.name = "network"
    for value in (*graph.proto.input, *graph.proto.output):
        for dim in value.type.tensor_type.shape.dim[:1]:
            if dim.dim_param:
                dim.dim_param = "batch"
    for number, node in enumerate(all_nodes(graph.proto)):
        for field in ("doc_string", "metadata_props"):
            node.ClearField(field)
        # ONNX Runtime names what it adds after the operation it adds it to, and stumbles over two of one name.
        node.name = f"n{number}"
        # Attributes come in whatever order the exporter met them.
        attributes = sorted(node.attribute, key=lambda entry: str(entry.name))
        del node.attribute[:]
        node.attribute.extend(attributes)
    for value in (*graph.proto.input, *graph.proto.output, *graph.proto.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    model.producer_name, model.producer_version = "lightning-edge", ""


def _numbered(graph: Graph) -> list[Any]:
    """Number the values between the ends, in the order in which they are read and made."""
    ends = {value.name for value in (*graph.proto.input, *graph.proto.output)}
    numbers: dict[str, str] = {}
    prefix = ""
    while any(name.removeprefix(prefix).isdigit() for name in ends):
        prefix += "v"
    for node in graph.nodes:
        for name in (*_reads(node), *node.output, *_made_inside(node)):
            if name and name not in ends and name not in numbers:
                numbers[name] = f"{prefix}{len(numbers)}"
    nodes = graph.nodes
    for node in nodes:
        _rename(node, numbers)
    order = {number: position for position, number in enumerate(numbers.values())}
    initializers = [value for value in graph.proto.initializer if value.name in numbers or value.name in ends]
    for value in initializers:
        value.name = numbers.get(value.name, value.name)
    initializers.sort(key=lambda value: order.get(value.name, -1))
    copies = [type(value).FromString(value.SerializeToString()) for value in initializers]
    del graph.proto.initializer[:]
    graph.proto.initializer.extend(copies)
    return nodes


def _free(wanted: str, taken: set[str]) -> str:
    name = wanted
    while name in taken:
        name += "_output"
    return name


def _subgraphs(node: Any) -> list[Any]:
    graphs = [entry.g for entry in node.attribute if entry.HasField("g")]
    return graphs + [graph for entry in node.attribute for graph in entry.graphs]


def all_nodes(graph: Any) -> list[Any]:
    """The operations of a graph and of the graphs inside them, as the branches of an ``If`` are."""
    return [found for node in graph.node for found in (node, *(n for g in _subgraphs(node) for n in all_nodes(g)))]


def _reads(node: Any) -> list[str]:
    """Names that an operation reads, those that the graphs inside it read included."""
    inside = [name for graph in _subgraphs(node) for part in graph.node for name in _reads(part)]
    ends = [value.name for graph in _subgraphs(node) for value in graph.output]
    return [name for name in (*node.input, *inside, *ends) if name]


def _made_inside(node: Any) -> list[str]:
    return [name for graph in _subgraphs(node) for part in all_nodes(graph) for name in part.output]


def _rename(node: Any, names: dict[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for graph in _subgraphs(node):
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = names.get(value.name, value.name)
        for part in graph.node:
            _rename(part, names)
