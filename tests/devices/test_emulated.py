"""ARM64 under QEMU: what is lacking is told; where it is all there, files give the values that they give here.

Name the folder in LIGHTNING_EDGE_ARM64_ROOT; docs/devices.md says how it is made.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from deployables import batches, network

from lightning_edge.devices import Emulated
from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.errors import DeviceError
from lightning_edge.exporters import export

ROOT = os.environ.get("LIGHTNING_EDGE_ARM64_ROOT")


def test_it_is_a_program_before_the_python_of_a_folder(tmp_path: Path) -> None:
    device = Emulated(str(tmp_path), packages=str(tmp_path / "wheels"), cpu="max", qemu=sys.executable)
    assert device.python == [
        sys.executable,
        "-cpu",
        "max",
        "-L",
        str(tmp_path),
        str(tmp_path / "usr/bin/python3.11"),
    ]
    assert not device.times
    for name, what in (("usr/bin/python3.11", "the Python"), ("proc/cpuinfo", "a description of an ARM CPU")):
        with pytest.raises(DeviceError, match=f"there is no {tmp_path / name}: {what} of the emulated machine"):
            device.check()
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    with pytest.raises(DeviceError, match=f"there is no {tmp_path / 'wheels'}: packages"):
        device.check()
    (tmp_path / "wheels").mkdir()
    device.check()


def test_without_qemu(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"there is no program .qemu-none.\. Install QEMU's user-mode emulation"):
        Emulated(str(tmp_path), qemu="qemu-none").check()
    with pytest.raises(ValueError, match="it may not be empty"):
        Emulated("")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="needs qemu-aarch64-static")
@pytest.mark.skipif(ROOT is None, reason="needs an ARM64 Linux in LIGHTNING_EDGE_ARM64_ROOT")
@pytest.mark.parametrize("target", ["tflite", "onnx"])
def test_arm64_gives_the_values_of_this_machine(target: str, tmp_path: Path, place: Path) -> None:
    pytest.importorskip("litert_torch" if target == "tflite" else "onnxruntime")
    suffix = {"tflite": ".tflite", "onnx": ".onnx"}[target]
    artifact = export(network("plain", "int8"), target, tmp_path / f"net{suffix}", batches=batches("plain"))
    device = Emulated(str(ROOT), folder=str(place))
    with RemoteRunner("arm64", device, target, artifact.path, artifact.contents, 1, 120.0) as there:
        assert there.about.machine == "aarch64"
        for sample in torch.randn(64, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)):
            assert torch.equal(there([sample])[0], artifact.runner([sample])[0])
