"""What a device costs on top of the file: per file, and per sample.

    python benchmarks/devices.py [--devices board] [--file devices.yaml] [--samples 300]

For each way to run a file (in this process, in a process of its own, in `Local`, and on each named device): seconds
until a runner is ready, and how long a call takes as seen from here less what the file itself takes there, medians. The
network is an int8 ResNet-8 at 32x32 with random weights: how fast it is says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lightning_edge.devices.named import named
from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.exporters import Artifact, export, load
from lightning_edge.network import Inputs
from lightning_edge.quantization import quantize
from lightning_edge.zoo.networks import ResNet8

_TARGETS = {"tflite": ".tflite", "onnx": ".onnx"}


def main() -> None:
    """Measure and print one line for each way and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="", help="names of devices, with commas")
    parser.add_argument("--file", default="devices.yaml")
    parser.add_argument("--samples", type=int, default=300)
    given = parser.parse_args()
    devices = named(["local", *filter(None, given.devices.split(","))], given.file)
    torch.manual_seed(0)
    network = quantize(ResNet8().eval(), [Inputs.of(torch.randn(8, 3, 32, 32)) for _ in range(2)])
    sample = [torch.randn(1, 3, 32, 32)]
    print(f"{'target':8}{'way':20}{'ready s':>10}{'call ms':>10}{'of it the file':>16}{'on top ms':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for target, suffix in _TARGETS.items():
            artifact = export(network, target, Path(folder) / f"model{suffix}")
            for way, isolated in (("this process", False), ("own process", True)):
                start = time.perf_counter()
                loaded = load(artifact.path, isolated=isolated)
                ready = time.perf_counter() - start
                _tell(target, way, ready, _calls(loaded.runner, sample, given.samples), _here(loaded, sample))
            for name, device in devices.items():
                start = time.perf_counter()
                with RemoteRunner(name, device, target, artifact.path, artifact.contents, 1, 60.0) as runner:
                    ready = time.perf_counter() - start
                    call = _calls(runner, sample, given.samples)
                    _tell(target, name, ready, call, statistics.median(runner.times(sample, 200).ns[20:]) / 1e6)


def _calls(runner: Callable[[list[Tensor]], list[Tensor]], sample: list[Tensor], samples: int) -> float:
    """Median of single calls as seen from here, milliseconds."""
    times = []
    with torch.no_grad():
        for _ in range(samples):
            start = time.perf_counter()
            runner(sample)
            times.append(time.perf_counter() - start)
    return statistics.median(times[samples // 10 :]) * 1000


def _here(artifact: Artifact, sample: list[Tensor]) -> float:
    """Median of calls as the file's process times them, milliseconds."""
    timed = artifact.timed_call(sample)
    return statistics.median([timed() for _ in range(200)][20:]) / 1e6


def _tell(target: str, way: str, ready_s: float, call_ms: float, file_ms: float) -> None:
    print(f"{target:8}{way:20}{ready_s:10.2f}{call_ms:10.3f}{file_ms:16.3f}{call_ms - file_ms:11.3f}", flush=True)


if __name__ == "__main__":
    main()
