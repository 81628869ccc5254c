"""The quantized values inside an int8 ONNX file: which there are, and a copy of the file that gives them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_edge.errors import require
from lightning_edge.exporters.onnx.graph import VIEWS, Graph
from lightning_edge.exporters.onnx.read import parse
from lightning_edge.exporters.run.runner import Intermediate, as_int8

_PASSED = VIEWS | {"Clip", "DequantizeLinear", "QuantizeLinear", "Relu"}


class Inside:
    """A file with each value that is dequantized in it among its outputs.

    ONNX Runtime computes them with the int8 kernels that it has without: ResNet-8 keeps all of its, and its outputs
    stay the same bit for bit.

    Args:
        data: The file.

    Attributes:
        data: The file with more outputs.
        names: Names of these.
    """

    def __init__(self, data: bytes) -> None:
        model = parse(data)
        graph = Graph(model)
        self._found: dict[str, tuple[str, float, int]] = {}
        for node in graph.nodes:
            name = node.input[0]
            scale = graph.constant(node.input[1]) if node.op_type == "DequantizeLinear" else None
            if scale is None or scale.size != 1 or graph.maker(name) is None:
                continue
            zero = graph.constant(node.input[2]) if len(node.input) > 2 else None
            point = 0 if zero is None else int(zero.item())
            self._found.setdefault(name, (_maker(graph, name), float(scale.item()), point))
        onnx = require("onnx", "onnx")
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._found if name not in graph.outputs)
        self.data: bytes = model.SerializeToString()
        self.names = list(self._found)

    def read(self, values: list[Tensor]) -> list[Intermediate]:
        """Say what the values of `names` are."""
        return [as_int8(*known, value) for known, value in zip(self._found.values(), values, strict=True)]


def _maker(graph: Graph, name: str) -> str:
    """What computed a value, through operations that only clip, move or quantize."""
    node: Any = graph.maker(name)
    while node.op_type in _PASSED and (before := graph.maker(node.input[0])) is not None:
        node = before
    return f"{node.op_type} {node.name}".strip()
