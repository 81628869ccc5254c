"""A target whose runtime does what goes wrong in real ones. Its file says what happens at loading, its input what then.

A module of its own, because the process that a runtime lives in imports it.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.target import Target
from lightning_edge.network import Deployable

# First value of the input, and what it leads to; any other value is doubled.
ABORT, SEGFAULT, HANG, CHATTER, RAISE, EXIT, ALLOCATE, SLEEP = (-float(code) for code in range(1, 9))
# Calls after which a file that says "tired" is done for.
CALLS = 3


class Doubled(torch.nn.Module):
    """The network that a file computes when nothing goes wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Faulty(Target):
    suffix = ".faulty"
    extra = "faulty"
    needs = ()

    def write(self, network: Deployable, path: Path, *, loading: str = "", writing: str = "") -> None:
        path.write_text(loading)
        if writing == "segfault":
            ctypes.string_at(0)
        if writing == "hang":
            time.sleep(600)
        if writing == "refuse":
            raise ExportError("faulty refuses the network")

    def inspect(self, path: Path) -> Contents:
        path.read_text()
        return Contents(0, 4, {"mul": 1})

    def open(self, path: Path, threads: int) -> Runner:
        return FaultyRunner(path.read_text())


TARGET = Faulty()


class FaultyRunner(Runner):
    runtime = "Faulty 1.0"
    inputs = (TensorSpec((1, 3), torch.float32),)

    def __init__(self, loading: str) -> None:
        if loading == "segfault":
            ctypes.string_at(0)
        if loading == "hang":
            time.sleep(600)
        if loading == "refuse":
            raise ValueError("version 7 is not known\nand more")
        if loading == "lacking":  # as ExecuTorch: the name is in its log only
            os.write(2, b"[method.cpp:819] Missing operator: [0] aten::sort.values\n")
            raise RuntimeError("Failed to load method forward, error: 0x:14")
        self.calls_left = CALLS if loading == "tired" else None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        code = float(tensors[0][0, 0])
        if self.calls_left is not None:
            self.calls_left -= 1
        if code == ABORT or self.calls_left == 0:
            os.write(2, b"double free or corruption (!prev)\n")
            os.abort()
        if code == SEGFAULT:
            ctypes.string_at(0)
        if code == HANG:
            time.sleep(600)
        if code == CHATTER:
            print("garbage " * 20_000, flush=True)
            os.write(1, b'{"tensors": []}\n')
        if code == RAISE:
            raise RuntimeError("no kernel for this")
        if code == EXIT:
            os._exit(3)
        if code == ALLOCATE:
            torch.ones(2**25, dtype=torch.uint8)
        if code == SLEEP:
            time.sleep(0.05)
        return [tensors[0] * 2]
