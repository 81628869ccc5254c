"""Constants as LiteRT's converter takes them: floats that are quantized, to the same integers."""

from __future__ import annotations

import torch
from deployables import batches, network
from torch import fx

from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.tflite.passes.unfold_weights import unfold_weights


def test_constants_become_floats_and_quantize_to_the_same_integers() -> None:
    made = network("residual", "int8")
    unfolded = run_passes(made.graph, (unfold_weights,))
    assert isinstance(unfolded, fx.GraphModule)
    quantizations = [
        node
        for node in unfolded.graph.nodes
        if operation(node).startswith("quantize") and node.args[0].op == "get_attr"
    ]
    assert quantizations
    for node in quantizations:
        arguments = fx.node.map_arg(node.args, lambda part: getattr(unfolded, str(part.target)).detach())
        assert arguments[0].dtype == torch.float32
        stored = node.target(*arguments)
        originals = [
            value for value in (*made.graph.buffers(), *made.graph.parameters()) if value.dtype == stored.dtype
        ]
        assert any(value.shape == stored.shape and torch.equal(value, stored) for value in originals)
    inputs = batches("residual")[0]
    assert torch.equal(unfolded(*inputs.args), made.graph(*inputs.args))


def test_a_second_run_finds_nothing_and_a_float_network_is_left_alone() -> None:
    unfolded = run_passes(network("residual", "int8").graph, (unfold_weights,))
    assert run_passes(unfolded, (unfold_weights,)) is unfolded
    plain = network("residual", "fp32").graph
    assert run_passes(plain, (unfold_weights,)) is plain
