"""Lines of other libraries that are left out, and all others that stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
from lightning_edge.quiet import quiet_libraries
quiet_libraries()
import os, sys, torch, warnings
warnings.simplefilter("ignore")
from lightning_edge.exporters import export
export(torch.nn.Linear(4, 2), "tflite", sys.argv[1], inputs=torch.rand(1, 4))
assert "TF_ENABLE_ONEDNN_OPTS" not in os.environ
"""


@pytest.mark.slow
def test_a_converter_prints_nothing(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    ours = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")  # other tests import JAX, which sets one
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", EXPORTED, str(tmp_path / "net.tflite")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (run.stdout, run.stderr) == ("", "")
