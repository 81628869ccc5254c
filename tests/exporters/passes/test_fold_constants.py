"""What is the same at every call is computed before a file is written, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_edge.exporters import deployable, export
from lightning_edge.exporters.passes.base import apply_passes
from lightning_edge.exporters.passes.fold_constants import fold_constants


class Positioned(nn.Module):
    """Adds a table of sines to what it is fed, made at every call, and spread over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("rates", torch.linspace(0.1, 1.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device).diff(prepend=x.new_zeros(1, dtype=torch.long)).cumsum(0)
        table = (steps[:, None] * self.rates).sin()
        result: Tensor = self.layer(x + table[None].expand(x.shape[0], -1, -1))
        return result


class Trained(nn.Module):
    """Computes with a parameter, and with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.exp() + torch.rand(6)


class Written(nn.Module):
    """Writes over a constant of its own, which is then another one."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(6)
        doubled = table * 2
        table.add_(1.0)
        return x + table + doubled


def traced(network: nn.Module, x: Tensor) -> fx.GraphModule:
    module = deployable(network, x).program().module()
    assert isinstance(module, fx.GraphModule)
    return module


def computed(module: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


def test_tables_are_constants_without_their_samples() -> None:
    x = torch.randn(1, 4, 6)
    module = traced(Positioned(), x)
    expected = module(x)
    assert apply_passes(module, (fold_constants,))
    assert [tuple(value.shape) for name, value in module.named_buffers() if name.startswith("computed")] == [(1, 4, 6)]
    assert computed(module) <= 3  # the expansion, the sum and the layer
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_many_times_one_number_is_no_table() -> None:
    class Filled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.zeros_like(x)], 1)

    x = torch.randn(1, 3, 32, 32)
    module = traced(Filled(), x)
    assert apply_passes(module, (fold_constants,))
    assert not list(module.buffers())
    torch.testing.assert_close(module(x), Filled()(x), rtol=0, atol=0)


@pytest.mark.parametrize("network", [Trained(), Written()], ids=["trained", "written over"])
def test_what_may_change_stays(network: nn.Module) -> None:
    module = traced(network, torch.randn(1, 6))
    before = computed(module)
    assert not apply_passes(module, (fold_constants,))
    assert computed(module) == before


def test_core_ml_takes_tables_by_operations_that_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    x = torch.randn(1, 4, 6)
    artifact = export(Positioned(), "coreml", tmp_path / "net.mlpackage", inputs=x)
    assert artifact.agreement is not None
    assert artifact.agreement.max_relative < 1e-5
    assert set(artifact.contents.ops) == {"add", "linear"}
