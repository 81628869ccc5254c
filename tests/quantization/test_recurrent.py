"""Files with recurrent layers: int8 step by step, or float as in the network, and no excuse for other layers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_edge import exporters, quantize
from lightning_edge.errors import ExportError
from lightning_edge.exporters import ExportWarning
from lightning_edge.exporters.verify import contents as checks
from lightning_edge.network import Deployable

# Int8 weights of the convolution and of the head, and of a GRU and an LSTM, however many steps these make.
HELD = 4 * 8 * 3 + 6 * 3
IN_STEPS = {nn.GRU: 3 * 6 * (8 + 6), nn.LSTM: 4 * 6 * (8 + 6)}


class Sequence(nn.Module):
    """A convolution over time, a recurrent layer, and a linear one on its last step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 8, 3, padding=1)
        self.memory = kind(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, sounds: Tensor) -> Tensor:
        logits: Tensor = self.head(self.memory(torch.relu(self.layer(sounds)).transpose(1, 2))[0][:, -1])
        return logits


@cache
def sounds() -> Tensor:
    return torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))


@cache
def network(kind: type[nn.RNNBase]) -> Deployable:
    torch.manual_seed(0)
    return exporters.deployable(quantize(Sequence(kind).eval(), [sounds()], skip=["memory"]))


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("onnx", nn.GRU),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in ("tflite", "executorch", "coreml")
            for kind in (nn.GRU, nn.LSTM)
        ),
    ],
)
def test_files_hold_the_steps_in_int8(target: str, kind: type[nn.RNNBase], tmp_path: Path) -> None:
    module = exporters.target(target)
    pytest.importorskip(module.needs[0])
    torch.manual_seed(0)
    quantized = quantize(Sequence(kind).eval(), [sounds()])
    path = tmp_path / f"net{module.suffix}"
    with pytest.warns(ExportWarning, match="compute in float"):  # gates and states, and no product
        artifact = exporters.export(quantized, target, path, batches=[sounds()], isolated=False)
    assert artifact.agreement is not None
    assert artifact.agreement.outputs[0].max_steps is not None
    assert artifact.agreement.outputs[0].max_steps <= 1.01
    # Core ML and TFLite count the first state as a weight: six constant zeros.
    assert artifact.contents.int8_weight_bytes - HELD - IN_STEPS[kind] in (0, 6)
    assert not artifact.contents.float_compute_ops


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("onnx", nn.GRU),
        pytest.param("coreml", nn.LSTM, marks=pytest.mark.slow),
        *(pytest.param(name, nn.GRU, marks=pytest.mark.slow) for name in ("tflite", "executorch", "coreml")),
    ],
)
def test_files_hold_the_rest_in_int8(target: str, kind: type[nn.RNNBase], tmp_path: Path) -> None:
    module = exporters.target(target)
    pytest.importorskip(module.needs[0])
    path = tmp_path / f"net{module.suffix}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        artifact = exporters.export(network(kind), target, path, batches=[sounds()], isolated=False)
    assert artifact.agreement is not None
    assert artifact.agreement.outputs[0].max_steps is not None
    assert artifact.agreement.outputs[0].max_steps <= 1.01
    assert artifact.contents.int8_weight_bytes == HELD
    assert any("compute in float" in str(warning.message) for warning in caught)


def test_a_layer_that_should_be_int8_is_missed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with (
        pytest.warns(ExportWarning, match="compute in float: GRU"),
        exporters.stage(network(nn.GRU), "onnx", tmp_path / "net.onnx", isolated=False) as staged,
    ):
        contents = replace(staged.artifact.contents, float_compute_ops=("GRU", "Conv"))
    with pytest.warns(ExportWarning, match="compute in float: Conv, GRU"):
        checks.check_contents(network(nn.GRU), contents, "onnx")
    with pytest.raises(ExportError, match=r"the file computes in float: Conv, GRU\. The target's converter made"):
        checks.check_contents(network(nn.GRU), replace(contents, int8_weight_bytes=HELD - 1), "onnx")
