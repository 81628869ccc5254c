"""The worked example of a device in the documentation, over a pseudo-terminal that stands for a serial line."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
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


@pytest.fixture
def board(tmp_path: Path) -> Iterator[tuple[str, int, subprocess.Popen[bytes]]]:
    """A board that waits on its end of a line: the name of the other end, which is held open, and its process."""
    end, host = pty.openpty()
    # The board has one end of it. What opens the other by name is this machine's.
    program = example("board.py", tmp_path).read_text()
    program = program.replace("os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)", "int(sys.argv[1])")
    waiting = subprocess.Popen([sys.executable, "-c", program, str(end)], pass_fds=(end,))
    os.close(end)
    try:
        yield os.ttyname(host), host, waiting
    finally:
        with suppress(OSError):
            os.close(host)
        waiting.kill()
        waiting.wait(30)


def test_a_board_on_a_serial_line_gives_the_bits_of_the_file_here(
    tmp_path: Path, files: dict[str, Artifact], board: tuple[str, int, subprocess.Popen[bytes]]
) -> None:
    line, host, waiting = board
    device = imported(example("serial_line.py", tmp_path)).SerialLine(line)
    device.python = (sys.executable,)
    artifact = files["tflite"]
    with RemoteRunner("board", device, "tflite", artifact.path, artifact.contents, 1, 20.0) as runner:
        os.close(host)  # not before: a line that nobody holds has hung up
        for batch in batches("residual")[:1]:
            sample = artifact.ready(batch.sample().tensors)
            (here,), (there,) = artifact.runner(sample), runner(sample)
            assert torch.equal(here, there)
        assert len(runner.times(sample, 5).ns) == 5
    assert waiting.wait(30) is not None


def test_a_board_that_is_gone_is_an_error_and_no_wait(
    tmp_path: Path, board: tuple[str, int, subprocess.Popen[bytes]]
) -> None:
    line, _, waiting = board
    device = imported(example("serial_line.py", tmp_path)).SerialLine(line)
    with device.start([sys.executable, "-c", "pass"]) as channel:
        waiting.kill()
        waiting.wait(30)
        with pytest.raises((EOFError, TimeoutError)):
            channel.read(1, 2.0)
        with pytest.raises((EOFError, TimeoutError)):
            channel.write(bytes(1 << 20), 2.0)
