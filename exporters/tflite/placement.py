"""Where the operations of a TensorFlow Lite file run: in LiteRT's XNNPACK delegate, or on its own kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_edge import macs
from lightning_edge.contents import Place, Placements
from lightning_edge.exporters.tflite import graph as tflite_graph

_TIMEOUT_S = 120
_DELEGATE = "DELEGATE"
# In a process of its own, since a file that LiteRT cannot prepare may end the process that tries.
_ASK = """
import json, sys
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
nodes = interpreter._get_ops_details()
print(json.dumps([[node["op_name"], node["inputs"].tolist(), node["outputs"].tolist()] for node in nodes]))
"""
# What the delegate's documentation lists; whether it takes a single operation also depends on types and shapes.
_SUPPORTED = frozenset(
    [
        "ABS",
        "ADD",
        "AVERAGE_POOL_2D",
        "BATCH_MATMUL",
        "CEIL",
        "CONCATENATION",
        "CONV_2D",
        "DEPTH_TO_SPACE",
        "DEPTHWISE_CONV_2D",
        "DEQUANTIZE",
        "DIV",
        "ELU",
        "EXPAND_DIMS",
        "FLOOR",
        "FULLY_CONNECTED",
        "GELU",
        "HARD_SWISH",
        "LEAKY_RELU",
        "LOGISTIC",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MEAN",
        "MINIMUM",
        "MUL",
        "NEG",
        "PAD",
        "PRELU",
        "QUANTIZE",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "ROUND",
        "RSQRT",
        "SLICE",
        "SOFTMAX",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SQRT",
        "SQUARE",
        "SQUARED_DIFFERENCE",
        "STRIDED_SLICE",
        "SUB",
        "TANH",
        "TRANSPOSE",
        "TRANSPOSE_CONV",
    ]
)


def by_support(path: Path) -> Placements:
    """Tell by what the delegate's documentation lists, operation by operation."""
    model = tflite_graph.parse(path.read_bytes())
    ops: list[tuple[str, Place, int]] = []
    for graph in model.subgraphs:
        for op in graph.operators:
            name = tflite_graph.op_name(model, op)
            delegated = name in _SUPPORTED and not _is_wide(graph, op)
            ops.append((name, "delegate" if delegated else "cpu", _macs(name, graph, op)))
    return Placements.of("op support", ops)


def by_runtime(path: Path) -> Placements | None:
    """Ask LiteRT after it has loaded the file, in a process of its own; ``None`` if it does not tell."""
    model = tflite_graph.parse(path.read_bytes())
    if len(model.subgraphs) != 1:
        return None
    graph = model.subgraphs[0]
    try:
        command = [sys.executable, "-c", _ASK, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        nodes = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    if [name for name, _, _ in nodes[: len(graph.operators)]] != [
        tflite_graph.op_name(model, op) for op in graph.operators
    ]:
        return None
    delegated = _delegated(graph, nodes[len(graph.operators) :])
    ops: list[tuple[str, Place, int]] = [
        (name, "delegate" if index in delegated else "cpu", _macs(name, graph, op))
        for index, ((name, _, _), op) in enumerate(zip(nodes, graph.operators, strict=False))
    ]
    return Placements.of("the runtime", ops)


def _delegated(graph: Any, nodes: list[tuple[str, list[int], list[int]]]) -> set[int]:
    """Operations that the delegate's nodes have replaced: all that leads from what each reads to what it gives."""
    makers = {int(index): at for at, op in enumerate(graph.operators) for index in op.outputs}
    delegated: set[int] = set()
    for name, inputs, outputs in nodes:
        todo = [*outputs] if name == _DELEGATE else []
        while todo:
            maker = makers.get(todo.pop())
            if maker is not None and maker not in delegated:
                delegated.add(maker)
                todo += [int(index) for index in graph.operators[maker].inputs if index not in inputs]
    return delegated


def _is_wide(graph: Any, op: Any) -> bool:
    """Whether it computes with 16-bit activations, for which the delegate has no kernels."""
    types = {tflite_graph.dtype_name(graph.tensors[index].type) for index in (*op.inputs, *op.outputs) if index >= 0}
    return "int16" in types


def _macs(name: str, graph: Any, op: Any) -> int:
    """Multiply-accumulates of one operation; weights lie as its kernel wants them."""
    if name not in tflite_graph.PRODUCTS:
        return 0
    data, weight = (_shape(graph, op.inputs[position]) for position in tflite_graph.PRODUCTS[name])
    output = _shape(graph, op.outputs[0])
    if name == "FULLY_CONNECTED":
        return macs.product(output, weight[-1])
    if name == "BATCH_MATMUL":
        return macs.product(output, data[-2 if op.builtinOptions.adjX else -1])
    if name in ("TRANSPOSE_CONV", "CONV_3D_TRANSPOSE"):
        return macs.transposed_convolution(data, weight, weight[-1])
    return macs.convolution(output, weight, weight[0] if name == "CONV_2D" else weight[-1])


def _shape(graph: Any, index: int) -> list[int]:
    return [int(size) for size in graph.tensors[index].shape]
