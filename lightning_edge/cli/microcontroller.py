"""The command that writes an int8 ``.tflite`` file as C++ sources, and tells what it needs of a microcontroller."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edge.errors import EdgeError
from lightning_edge.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_edge.exporters.micro.sources import Footprint
    from lightning_edge.exporters.micro.vela import Estimate

# Those of `exporters.micro.vela`, which imports torch: --help shall not wait for that.
_ETHOSU = (
    *("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512"),
    *("ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048"),
)


def table(name: str, found: Footprint, estimate: Estimate | None = None) -> Table:
    """Lay out what a file needs.

    Args:
        name: What the table is of.
        found: What the file says.
        estimate: What Vela says, if it was asked.
    """
    from rich.table import Table
    from rich.text import Text

    laid = Table(title=name)
    for heading in ("", "value", "how it is known"):
        laid.add_column(heading, overflow="fold")
    rows = [
        ("operators", ", ".join(found.operators), "read from the file"),
        ("file", counted(found.size_bytes, "byte"), "read from the file; lies in flash"),
        ("weights", counted(found.weight_bytes, "byte"), "read from the file; a part of it"),
        ("activations", counted(found.activation_bytes, "byte"), "planned as TensorFlow Lite Micro does"),
        ("lower bound", counted(found.lower_bound_bytes, "byte"), "what lives at one step"),
        (
            "arena",
            counted(found.arena_bytes, "byte"),
            "upper bound: activations, what kernels ask for, the interpreter's own",
        ),
    ]
    if estimate is not None:
        by = f"Vela's estimate for {estimate.configuration}"
        fallback = ", ".join(dict.fromkeys(estimate.cpu_operators)) or "none"
        rows += [
            ("inference", f"{estimate.inference_time_ms:.3f} ms", f"{by} at {estimate.clock_hz / 1e6:g} MHz"),
            ("cycles", f"{estimate.cycles}", by),
            ("SRAM", counted(estimate.sram_bytes, "byte"), by),
            ("DRAM", counted(estimate.dram_bytes, "byte"), by),
            ("flash", counted(estimate.flash_bytes, "byte"), by),
            ("on the NPU", counted(estimate.npu_operators, "operation"), by),
            (
                "on the CPU",
                f"{counted(len(estimate.cpu_operators), 'operation')}: {fallback}",
                f"{by}; no time is counted for them",
            ),
        ]
    for row in rows:
        laid.add_row(*map(Text, row))
    return laid


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge microcontroller``: two files, and a table of what they need.

    Args:
        arguments: Arguments behind ``microcontroller``.

    Returns:
        The status to exit with: 2 if the file cannot be written so.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-edge microcontroller",
        description="Write an int8 .tflite file as C++ sources for TensorFlow Lite Micro.",
    )
    parser.add_argument("file", type=Path, help="the .tflite file")
    parser.add_argument("--output", type=Path, default=Path(), help="the folder to write to (default: this one)")
    parser.add_argument("--ethosu", choices=_ETHOSU, help="also compile for this NPU with Arm's Vela")
    given = parser.parse_args(arguments)

    from rich.console import Console

    from lightning_edge.exporters.micro import sources as microcontroller
    from lightning_edge.exporters.micro import vela

    try:
        # What can be refused is refused before anything is written.
        microcontroller.footprint(given.file)
        compiled = given.output / f"{given.file.stem}_vela.tflite"
        estimate = None if given.ethosu is None else vela.estimate(given.file, given.ethosu, compiled=compiled)
        written = microcontroller.write(given.file, given.output)
    except EdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    Console().print(table(given.file.name, written.footprint, estimate))
    print(f"written: {written.header}, {written.source}{'' if estimate is None else f', {compiled}'}")
    return 0
