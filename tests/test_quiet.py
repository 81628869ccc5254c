"""Lines of other libraries that are left out, and all others that stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_edge.errors import CompressionError
from lightning_edge.quantization import quantize
from lightning_edge.quiet import without_graph_dumps

SAID = """
import logging, warnings
from lightning_edge.quiet import quiet_libraries
quiet_libraries()
quiet_libraries()
logging.basicConfig(format="%(message)s")
ours = [len(logging.getLogger(name).filters) for name in (None, "torchao", "torch.utils._pytree")]
assert ours == [1, 1, 1], ours
logging.getLogger("torchao").warning("Failed to load x.so: Could not load this library: x.so")
logging.getLogger("torchao").warning("torchao stays")
logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and is now", "Kind")
logging.warning("Your model is converted in training mode.")
logging.warning("root stays")
warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning)
warnings.warn("a warning stays", FutureWarning)
"""


def test_lines_are_left_out_by_their_words_and_all_others_stay() -> None:
    run = subprocess.run([sys.executable, "-c", SAID], capture_output=True, text=True, check=True)
    lines = run.stderr.splitlines()
    assert [line for line in lines if line in ("torchao stays", "root stays")] == ["torchao stays", "root stays"]
    assert "a warning stays" in run.stderr
    assert not [line for line in lines if "library" in line or "Enum" in line or "training" in line or "Leaf" in line]


EXPORTED = """
import os, sys, torch
from lightning_edge import export, quantize
network = quantize(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()), [torch.rand(8, 4)])
export(network, sys.argv[1], sys.argv[2], strict=False)
assert "TF_ENABLE_ONEDNN_OPTS" not in os.environ
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "needs", "suffix"), [("tflite", "litert_torch", ".tflite"), ("onnx", "onnxruntime", ".onnx")]
)
def test_quantize_and_export_print_nothing(tmp_path: Path, target: str, needs: str, suffix: str) -> None:
    pytest.importorskip(needs)
    ours = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")  # other tests import JAX, which sets one
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", EXPORTED, target, str(tmp_path / f"net{suffix}")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (run.stdout, run.stderr) == ("", "")


def test_a_graph_that_torch_prints_is_left_out_and_what_else_is_printed_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with without_graph_dumps():
        print("before", file=sys.stderr)
        print('\n\ndef forward(self, arg0_1: "f32[8]"):\n    linear = 1\n', file=sys.stderr)
        print("after\n", file=sys.stderr)
    print("outside", file=sys.stderr)
    assert capsys.readouterr().err == "before\nafter\n\noutside\n"


def test_a_network_that_cannot_be_captured_is_told_by_its_error_alone(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(CompressionError, match="must not branch on values"):
        quantize(Branching(), [torch.rand(4, 8)])
    assert capfd.readouterr().err == ""
