"""The worked example of a device in the documentation, over a pseudo-terminal that stands for a serial line."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import torch
from deployables import batches

from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.exporters import Artifact

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


def example(name: str, folder: Path) -> Path:
    """Write a block of the page that has a title into a file of that name."""
    found = re.search(rf'```python title="{re.escape(name)}"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert found is not None
    path = folder / name
    path.write_text(found[1])
    return path


def imported(path: Path) -> ModuleType:
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_board_on_a_serial_line_gives_the_bits_of_the_file_here(tmp_path: Path, files: dict[str, Artifact]) -> None:
    board, host = pty.openpty()
    line = os.ttyname(host)
    # The board has one end of it. What opens the other by name is this machine's.
    waiting = subprocess.Popen(
        [sys.executable, "-c", example("board.py", tmp_path).read_text().replace(
            "os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)", "int(sys.argv[1])"
        ), str(board)],
        pass_fds=(board,),
    )  # fmt: skip
    os.close(board)
    device = imported(example("serial_line.py", tmp_path)).SerialLine(line)
    device.python = (sys.executable,)
    os.close(host)
    artifact = files["tflite"]
    try:
        with RemoteRunner("board", device, "tflite", artifact.path, artifact.contents, 1, 20.0) as runner:
            for batch in batches("residual")[:1]:
                sample = artifact.ready(batch.sample().tensors)
                (here,), (there,) = artifact.runner(sample), runner(sample)
                assert torch.equal(here, there)
            assert len(runner.times(sample, 5).ns) == 5
        assert waiting.wait(30) is not None
    finally:
        waiting.kill()
        waiting.wait()
