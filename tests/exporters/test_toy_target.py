"""A target and a pass are added from outside: one module and one line in `TARGETS`; one function and one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import toy_target
from torch import nn

from lightning_edge.exporters import export, load
from lightning_edge.exporters.target import TARGETS


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "toy", "toy_target")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")


@pytest.mark.parametrize("isolated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_toy_target_is_exported_and_loaded(isolated: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.ReLU()).eval(), torch.randn(5, 3)
    path = tmp_path / "net.toy"
    artifact = export(network, "toy", path, inputs=x[:1], batches=[x], isolated=isolated)
    assert artifact.agreement is not None
    assert "dropout" not in artifact.contents.ops
    loaded = load(path, isolated=isolated)
    assert loaded.target == "toy"
    assert loaded.runner.runtime == "Toy 1.0"
    torch.testing.assert_close(loaded(x)[0], network(x))
    assert "toy_target" in sys.modules


def test_the_toy_pass_changes_a_graph_once() -> None:
    graph = torch.export.export(nn.Sequential(nn.Dropout(), nn.ReLU()).eval(), (torch.ones(1, 3),)).module()
    assert toy_target.drop_dropouts(graph)
    assert not toy_target.drop_dropouts(graph)
    torch.testing.assert_close(graph(torch.ones(1, 3)), torch.ones(1, 3))
