"""A target of a few lines: a saved program, run by torch.

A module of its own, because the process that a runtime lives in imports it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, fx

from lightning_edge.contents import Contents
from lightning_edge.exporters.passes.base import run_passes
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target
from lightning_edge.network import Deployable


def drop_dropouts(graph: fx.GraphModule) -> bool:
    """Remove dropout, a no-op in a file."""
    found = [node for node in graph.graph.nodes if node.target is torch.ops.aten.dropout.default]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()
    return bool(found)


PASSES = (drop_dropouts,)  # the runtime has no dropout


class Toy(Target):
    suffix = ".toy"
    extra = "toy"
    needs = ()

    def write(self, network: Deployable, path: Path) -> None:
        module = run_passes(network.program().module(check_guards=False), PASSES)
        program = torch.export.export(module, network.inputs.args)
        with path.open("wb") as file:
            torch.export.save(program, file)

    def inspect(self, path: Path) -> Contents:
        program = _program(path)
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        weights = sum(value.numel() * value.element_size() for value in program.state_dict.values())
        return Contents(0, weights, Counter(str(node.target).split(".")[1] for node in nodes))

    def open(self, path: Path, threads: int) -> Runner:
        return ToyRunner(_program(path))


class ToyRunner(Runner):
    runtime = "Toy 1.0"

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._network = program.module()
        values = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
        self.inputs = tuple(TensorSpec(tuple(value.shape), value.dtype) for value in values)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._network(*tensors)]


def _program(path: Path) -> torch.export.ExportedProgram:
    with path.open("rb") as file:
        return torch.export.load(file)


TARGET = Toy()
