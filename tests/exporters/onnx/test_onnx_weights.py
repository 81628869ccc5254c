"""What counts as the weights of a file's operations."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize(("first", "expected"), [("gate_0", 4 * (6 * 3 + 6 * 2)), ("fed", 4 * 6 * 2)])
def test_weights_that_are_joined_in_the_file_are_weights(first: str, expected: int, tmp_path: Path) -> None:
    """torch.onnx joins the gates of a large recurrent layer in the file; what is partly computed is no weight."""
    from lightning_edge.exporters.onnx.read import contents

    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    sizes = {"gate_0": (1, 2, 3), "gate_1": (1, 2, 3), "gate_2": (1, 2, 3), "recurrent": (1, 6, 2)}
    stored = [onnx.numpy_helper.from_array(numpy.ones(size, "f"), name) for name, size in sizes.items()]
    shapes = {"x": [4, 1, 3], "fed": [1, 2, 3]}
    fed = [helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Concat", [first, "gate_1", "gate_2"], ["weight"], axis=1),
        helper.make_node("GRU", ["x", "weight", "recurrent"], ["y"], hidden_size=2),
    ]
    graph = helper.make_graph(nodes, "g", fed, [helper.make_tensor_value_info("y", floats, [4, 1, 1, 2])], stored)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    assert contents(path).float_weight_bytes == expected
