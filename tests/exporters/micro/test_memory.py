"""What TensorFlow Lite Micro needs in RAM: what kernels ask for, what is kept, and an arena that is enough."""

from __future__ import annotations

from typing import Any

import pytest
from flat_files import layers, quickstart

from lightning_edge.exporters.micro.arena import Buffer
from lightning_edge.exporters.micro.interpreter import persistent_bytes, setup_bytes
from lightning_edge.exporters.micro.memory import memory
from lightning_edge.exporters.micro.scratch import scratch

# What MicroInterpreter::arena_used_bytes() told on an emulated Cortex-M4 with CMSIS-NN.
QUICKSTART_USED_BYTES = 5540


def test_the_arena_holds_what_was_used_on_a_processor_of_32_bits() -> None:
    found = memory(quickstart())
    assert found.activation_bytes == found.lower_bound_bytes == 3072
    assert QUICKSTART_USED_BYTES <= found.arena_bytes <= 1.15 * QUICKSTART_USED_BYTES


def test_columns_of_a_convolution_lie_beside_its_activations() -> None:
    model = quickstart()
    # 3 x 3 places of 16 and of 32 channels, twice, two bytes each; the depthwise layer makes 16 channels of one.
    assert [buffer.size_bytes for buffer in scratch(model, "cmsis-nn")] == [576, 1152]
    assert scratch(model) == []
    assert memory(model).arena_bytes == 3072 + 576 + persistent_bytes(model, 2)


@pytest.mark.parametrize(
    ("operation", "reference", "optimized"),
    [
        (("CONV_2D", [1, 8, 8, 6], [[6, 1, 1, 5], [6]]), [], [32]),  # 5 channels, up to 8
        (("DEPTHWISE_CONV_2D", [1, 8, 8, 5], [[1, 5, 5, 5], [5]]), [], [250]),
        (("FULLY_CONNECTED", [1, 8, 8, 6], [[6, 8], [6]]), [], [32]),
        (("FULLY_CONNECTED", [1, 6], [[6, 320], [6]]), [], []),
        (("AVERAGE_POOL_2D", [1, 4, 4, 5], []), [], [20]),
        (("MEAN", [1, 5], [[2]]), [20], [20]),
        (("RELU", [1, 8, 8, 5], []), [], []),
    ],
)
def test_what_kernels_ask_for(operation: Any, reference: list[int], optimized: list[int]) -> None:
    model = layers(("", [1, 8, 8, 5], []), operation)
    assert scratch(model) == [Buffer(size, 1, 1, f"scratch of {operation[0]}") for size in reference]
    assert [buffer.size_bytes for buffer in scratch(model, "cmsis-nn")] == optimized


@pytest.mark.parametrize(
    ("channels", "stride", "optimized"),
    [(5, 2, [4 * 3 * (7 * 2 + 3) * 6]), (20, 2, [4 * 180, 6 * 180]), (20, 3, [4 * 3 * (7 * 3 + 3) * 6])],
)
def test_transposed_convolutions_ask_for_sums_or_reversed_weights(
    channels: int, stride: int, optimized: list[int]
) -> None:
    from ai_edge_litert import schema_py_generated as schema

    layer = ("TRANSPOSE_CONV", [1, 16, 16, 6], [[6, 3, 3, channels], [4]])
    model = layers(("", [1, 8, 8, channels], []), layer)
    model.subgraphs[0].operators[0].builtinOptions = schema.TransposeConvOptionsT(strideH=stride, strideW=stride)
    assert [buffer.size_bytes for buffer in scratch(model)] == [4 * 16 * 16 * 6]
    assert [buffer.size_bytes for buffer in scratch(model, "cmsis-nn")] == optimized


def test_int4_weights_are_unpacked() -> None:
    from ai_edge_litert import schema_py_generated as schema

    model = layers(("", [1, 8], []), ("FULLY_CONNECTED", [1, 6], [[6, 8], [6]]))
    model.subgraphs[0].tensors[1].type = schema.TensorType.INT4
    assert [buffer.size_bytes for buffer in scratch(model)] == [48]


def test_what_is_kept_grows_with_channels_operations_and_variables() -> None:
    model = quickstart()
    graph = model.subgraphs[0]
    before = persistent_bytes(model)
    pool = graph.operators.pop(3)
    assert before - persistent_bytes(model) == 80 + 48  # its node and options, up to 16, and what its kernel keeps
    graph.operators.insert(3, pool)
    graph.tensors[graph.operators[2].outputs[0]].shape = [1, 8, 8, 64]
    assert persistent_bytes(model) - before == 2 * 4 * 32  # a multiplier and a shift for each channel more
    graph.tensors[0].isVariable = True
    assert persistent_bytes(model) - before == 2 * 4 * 32 + 64
    assert before < persistent_bytes(quickstart(), pointer_bytes=8)


def test_setting_up_counts_the_zero_points_of_channels() -> None:
    model = layers(("", [1, 8], []), ("FULLY_CONNECTED", [1, 1000], [[1000, 8], [1000]]))
    wide = setup_bytes(model, 2)
    model.subgraphs[0].tensors[1].quantization.scale = [0.1]
    assert wide - setup_bytes(model, 2) > 0.8 * 4 * 1000
    # A network of small activations and many channels needs an arena for that alone.
    assert memory(layers(("", [1, 8], []), ("FULLY_CONNECTED", [1, 2], [[2, 8], [2]]))).arena_bytes > 500
