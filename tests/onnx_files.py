"""What an ONNX file holds, what ONNX Runtime makes of it, and what it gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_edge.exporters import load

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def kinds(path: Path) -> Counter[str]:
    """How many operations of each kind a file has."""
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def weights(path: Path) -> list[tuple[int, ...]]:
    """Shapes of the kernels that convolutions have."""
    graph = onnx.load(str(path)).graph
    stored = {value.name: tuple(value.dims) for value in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    return [stored[made[node.input[1]].input[0]] for node in graph.node if node.op_type == "Conv"]


def kernels(path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file's operations before it runs them."""
    optimized = path.with_suffix(".optimized")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return kinds(optimized)


def outputs(path: Path, samples: Tensor) -> Tensor:
    """What a file gives for each sample."""
    artifact = load(path)
    return torch.cat([artifact(sample[None])[0] for sample in samples])
