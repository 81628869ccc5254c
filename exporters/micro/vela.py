"""Arm's compiler Vela: what an int8 ``.tflite`` file would cost on an Ethos-U NPU, as the compiler estimates it."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lightning_edge.errors import ExportError, check_installed
from lightning_edge.exporters.tflite.graph import op_name, parse
from lightning_edge.exporters.tflite.read import contents
from lightning_edge.files import StagedPath, writing

EXTRA = "ethosu"
CONFIGURATIONS = (
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
)
_TIMEOUT_S = 300.0
_PACKAGE = "ethosu"
# By its module, for there are other programs of the name.
_COMMAND = (sys.executable, "-m", "ethosu.vela")
_KIB = 1024
_CUSTOM = "ethos-u"
_FLASH = ("on_chip_flash_memory_used", "off_chip_flash_memory_used")


@dataclass(frozen=True)
class Estimate:
    """What Vela estimates of a file on one NPU. Nothing of it is measured.

    The system (clock, memories and their bandwidth) is Vela's own default for the NPU, and a real one differs.
    Operations on the CPU count for nothing in time and cycles.

    Attributes:
        configuration: The NPU.
        system: The system configuration that Vela has taken.
        memory_mode: Where it lays weights and activations.
        clock_hz: The clock of that system.
        inference_time_ms: Time of one inference, operations on the NPU only.
        cycles: The same in cycles.
        sram_bytes: SRAM in use: activations, and weights that are copied in.
        dram_bytes: DRAM in use, where the default system of the NPU has weights and commands there and not in flash.
        flash_bytes: Flash in use: weights as the NPU reads them, compressed, and its commands.
        npu_operators: How many of the file's operations run on the NPU.
        cpu_operators: Operations that are left to the CPU, as the compiled file names them.
    """

    configuration: str
    system: str
    memory_mode: str
    clock_hz: float
    inference_time_ms: float
    cycles: int
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    npu_operators: int
    cpu_operators: tuple[str, ...]


def estimate(
    path: str | Path, configuration: str, *, compiled: str | Path | None = None, timeout_s: float = _TIMEOUT_S
) -> Estimate:
    """Compile a file with Vela, in a process of its own, and read its estimate.

    Args:
        path: The ``.tflite`` file, int8 or int16.
        configuration: One of `CONFIGURATIONS`.
        compiled: Where to put the compiled file, which runs on that NPU alone; it is not kept if not given.
        timeout_s: Seconds that it may take.

    Raises:
        ValueError: If there is no such configuration.
        ExportError: If the file is none, computes in float, or Vela fails; if ``compiled`` cannot be written.
        MissingExtraError: If Vela is not installed.
    """
    path = Path(path)
    if configuration not in CONFIGURATIONS:
        raise ValueError(f"configuration: given {configuration!r}, allowed: {', '.join(CONFIGURATIONS)}")
    check_installed(_PACKAGE, EXTRA)
    _check(path)
    with tempfile.TemporaryDirectory(prefix="vela-") as folder:
        output = _run([*_COMMAND, str(path.resolve()), "--accelerator-config", configuration], Path(folder), timeout_s)
        try:
            found = _read(path, Path(folder), configuration)
            data = _compiled(Path(folder)).read_bytes()
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ExportError(f"Vela's answer for {path} is not understood ({error!r}): {_tail(output)}") from error
    if compiled is not None:
        place = StagedPath(Path(compiled))
        try:
            with writing(place.path):
                place.staged.write_bytes(data)
            place.accept()
        finally:
            place.discard()
    return found


def _check(path: Path) -> None:
    try:
        held = contents(path)
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}; give a .tflite file") from error
    except ValueError as error:
        raise ExportError(f"{path}: {error}. Give an int8 .tflite file") from error
    floats = sorted({*held.float_compute_ops, *held.float_ops})
    if floats:
        raise ExportError(
            f"{path}: it computes in float ({', '.join(floats)}), which no Ethos-U does; give an int8 one"
        )


def _run(command: list[str], folder: Path, timeout_s: float) -> str:
    command = [*command, "--output-dir", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=folder)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"Vela was not done in {timeout_s:g} s; give it more (timeout_s), or a smaller file"
        ) from error
    except OSError as error:
        raise ExportError(f"Vela does not start: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode:
        raise ExportError(f"Vela failed with status {done.returncode}: {_tail(output)}")
    return output


def _read(path: Path, folder: Path, configuration: str) -> Estimate:
    """Read the one-line summary and what is left in the compiled file.

    Raises:
        ValueError: If something is not there, or no number.
    """
    summaries = list(folder.glob("*_summary_*.csv"))
    if len(summaries) != 1:
        raise ValueError(f"expected one summary, found {len(summaries)}")
    with summaries[0].open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream), None)
    if row is None:
        raise ValueError("a summary without figures")
    left = _operators(_compiled(folder))
    return Estimate(
        configuration=configuration,
        system=row["system_config"],
        memory_mode=row["memory_mode"],
        clock_hz=_number(row["core_clock"]),
        inference_time_ms=_number(row["inference_time"]) * 1000,
        cycles=round(_number(row["cycles_total"])),
        sram_bytes=round(_number(row["sram_memory_used"]) * _KIB),
        dram_bytes=round(_number(row["dram_memory_used"]) * _KIB),
        flash_bytes=round(sum(_number(row[name]) for name in _FLASH) * _KIB),
        npu_operators=len(_operators(path)) - len(left),
        cpu_operators=left,
    )


def _compiled(folder: Path) -> Path:
    found = list(folder.glob("*_vela.tflite"))
    if len(found) != 1:
        raise ValueError(f"expected one compiled file, found {len(found)}")
    return found[0]


def _operators(path: Path) -> tuple[str, ...]:
    """Every operation of a file, but those that stand for a whole part that the NPU runs."""
    model = parse(path.read_bytes())
    names = [op_name(model, op) for graph in model.subgraphs for op in graph.operators]
    return tuple(name for name in names if name != _CUSTOM)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is no figure")
    return value


def _tail(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return " / ".join((errors or lines)[-3:]) or "nothing"
