"""Arm's Vela compiler for Ethos-U, in a process of its own: the compiled file, and what Vela estimates of it."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_edge.errors import ExportError, check_installed
from lightning_edge.exporters import micro_ops, tflite_graph

_EXTRA = "ethosu"
CONFIGS = (
    *(f"ethos-u55-{macs}" for macs in (32, 64, 128, 256)),
    *(f"ethos-u65-{macs}" for macs in (256, 512)),
    *(f"ethos-u85-{macs}" for macs in (128, 256, 512, 1024, 2048)),
)
_KIBIBYTE = 1024
_NPU_OPS = re.compile(r"^NPU operators = (\d+)", re.MULTILINE)
_COLUMNS = (
    "inference_time",
    "cycles_total",
    "sram_memory_used",
    "dram_memory_used",
    "on_chip_flash_memory_used",
    "off_chip_flash_memory_used",
    "system_config",
    "memory_mode",
)


@dataclass(frozen=True)
class Estimate:
    """What Vela estimates: a model of the NPU and its memories, no measurement, and nothing of what the CPU runs.

    Attributes:
        config: The accelerator.
        system_config: Clock and memories that Vela took, its default for the accelerator.
        memory_mode: Where it put what, its default.
        inference_time_ms: Time of the NPU for one input.
        cycles: Cycles of the NPU for one input.
        sram_bytes: Activations and what is buffered, in SRAM.
        dram_bytes: The same in DRAM, where the memory mode has it.
        flash_bytes: Weights and commands, on chip and off.
        npu_ops: Vela's own operations on the NPU; one of the file may be several.
        cpu_ops: Operations left to the CPU, by name, with their count.
        compiled: The compiled ``.tflite``, for TensorFlow Lite Micro with the Ethos-U kernel.
    """

    config: str
    system_config: str
    memory_mode: str
    inference_time_ms: float
    cycles: int
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    npu_ops: int
    cpu_ops: Mapping[str, int]
    compiled: bytes


def check(config: str) -> None:
    """Make sure that Vela is installed and knows the accelerator.

    Raises:
        MissingExtraError: If it is not installed.
        ValueError: If there is no such accelerator.
    """
    if config not in CONFIGS:
        raise ValueError(f"ethosu={config!r} is not one of {', '.join(CONFIGS)}")
    check_installed("ethosu", _EXTRA)


def estimate(path: Path, config: str, *, max_cpu_ops: int | None = None, timeout_s: float = 600) -> Estimate:
    """Compile an int8 file for an Ethos-U.

    Args:
        path: The ``.tflite`` file.
        config: One of `CONFIGS`.
        max_cpu_ops: Operations that may be left to the CPU; any number if not given.
        timeout_s: How long Vela may take, in seconds.

    Raises:
        ExportError: If the file computes in float or is compiled already, if Vela refuses it or takes too long, or if
            more operations are left to the CPU than allowed, naming them.
        MissingExtraError: If Vela is not installed.
        RunnerError: If the file is none.
        ValueError: If there is no such accelerator.
    """
    check(config)
    names = {tflite_graph.op_name(model, op) for model in [micro_ops.read(path)] for op in model.subgraphs[0].operators}
    if micro_ops.ETHOS_U in names:
        raise ExportError(f"{path.name} is compiled for Ethos-U already; give the file it was compiled from")
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder, "network.tflite")
        network.write_bytes(path.read_bytes())
        told = _run(network, config, timeout_s, path.name)
        found = _read(Path(folder), told, config, path.name)
    left = sum(found.cpu_ops.values())
    if max_cpu_ops is not None and left > max_cpu_ops:
        listed = ", ".join(f"{count} {name}" for name, count in found.cpu_ops.items())
        raise ExportError(
            f"{path.name}: operations left to the CPU: {left} ({listed}); allowed are max_cpu_ops={max_cpu_ops}. "
            "Replace the layers they come from or allow more"
        )
    return found


def _run(network: Path, config: str, timeout_s: float, name: str) -> str:
    command = [sys.executable, "-m", "ethosu.vela", str(network), "--accelerator-config", config]
    command += ["--output-dir", str(network.parent)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"Vela took longer than timeout_s={timeout_s:g} seconds for {name} and was stopped; allow more"
        ) from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        cause = next((line for line in lines if line.startswith("Error")), lines[-1] if lines else "it told nothing")
        raise ExportError(f"Vela does not compile {name} for {config}: {cause.strip()}")
    return done.stdout


def _read(folder: Path, told: str, config: str, name: str) -> Estimate:
    summaries, compiled = list(folder.glob("*_summary_*.csv")), folder / "network_vela.tflite"
    npu_ops = _NPU_OPS.search(told)
    if len(summaries) != 1 or not compiled.is_file() or npu_ops is None:
        raise ExportError(f"Vela told nothing of {name} that can be read; is ethos-u-vela 5.2 installed?")
    with summaries[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    missing = [column for column in _COLUMNS if len(rows) != 1 or column not in rows[0]]
    if missing:
        raise ExportError(f"Vela's summary of {name} lacks {', '.join(missing)}; is ethos-u-vela 5.2 installed?")
    row, data = rows[0], compiled.read_bytes()
    model = tflite_graph.parse(data)
    ops = Counter(tflite_graph.op_name(model, op) for graph in model.subgraphs for op in graph.operators)
    ops.pop(micro_ops.ETHOS_U, None)
    flash = float(row["on_chip_flash_memory_used"]) + float(row["off_chip_flash_memory_used"])
    return Estimate(
        config=config,
        system_config=row["system_config"],
        memory_mode=row["memory_mode"],
        inference_time_ms=float(row["inference_time"]) * 1000,
        cycles=round(float(row["cycles_total"])),
        sram_bytes=round(float(row["sram_memory_used"]) * _KIBIBYTE),
        dram_bytes=round(float(row["dram_memory_used"]) * _KIBIBYTE),
        flash_bytes=round(flash * _KIBIBYTE),
        npu_ops=int(npu_ops[1]),
        cpu_ops=dict(sorted(ops.items())),
        compiled=data,
    )
