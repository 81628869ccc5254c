"""The quantized values inside an int8 ONNX file: which there are, and a copy of the file that gives them."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from lightning_edge.exporters.onnx.graph import VIEWS, constant, maker, operand
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
        self._found: dict[str, tuple[str, float, int]] = {}
        for node in model.graph:
            value = operand(node, 0)
            scale = constant(node.inputs[1]) if node.op_type == "DequantizeLinear" else None
            if scale is None or scale.size != 1 or value is None or value.producer() is None or not value.name:
                continue
            zero = constant(operand(node, 2))
            point = 0 if zero is None else int(zero.item())
            if value.name not in self._found and not value.is_graph_output():
                model.graph.outputs.append(value)
            self._found.setdefault(value.name, (_maker(value), float(scale.item()), point))
        self.data: bytes = ir.to_proto(model).SerializeToString()
        self.names = list(self._found)

    def read(self, values: list[Tensor]) -> list[Intermediate]:
        """Say what the values of `names` are."""
        return [as_int8(*known, value) for known, value in zip(self._found.values(), values, strict=True)]


def _maker(value: ir.Value) -> str:
    """What computed a value, through operations that only clip, move or quantize."""
    node = maker(value)
    while node is not None and node.op_type in _PASSED and (before := maker(operand(node, 0))) is not None:
        node = before
    return "" if node is None else f"{node.op_type} {node.name or ''}".strip()
