"""Commands on files alone: what `lightning-edge` does without a configuration and a Trainer."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from lightning_edge import verification
from lightning_edge.exporters.microcontroller import Microcontroller, export_microcontroller


def run(args: Sequence[str]) -> bool:
    """Run the command that the first argument names, and tell whether it is one of ours.

    Raises:
        SystemExit: With status 2 for a mistake in the arguments, or the status of a command that failed.
    """
    if not args or args[0] not in _COMMANDS:
        return False
    if status := _COMMANDS[args[0]](list(args[1:])):
        sys.exit(status)
    return True


def microcontroller(args: Sequence[str]) -> int:
    """Write a ``.tflite`` as C++ source and print what it needs.

    Args:
        args: Arguments behind the command's name.
    """
    parser = ArgumentParser("lightning-edge microcontroller", description=microcontroller.__doc__)
    parser.add_argument("model", help="int8 .tflite file")
    parser.add_argument("--output", default="microcontroller", help="folder for the files (default: %(default)s)")
    parser.add_argument("--ethosu", help="compile for this Ethos-U too, for example ethos-u55-128")
    parser.add_argument("--max_cpu_ops", type=int, help="operations that Vela may leave to the CPU (default: any)")
    given = parser.parse_args(list(args))
    written = export_microcontroller(given.model, given.output, ethosu=given.ethosu, max_cpu_ops=given.max_cpu_ops)
    console = Console()
    console.print(table(written))
    console.print(written.resolver, markup=False, highlight=False, end="")
    return 0


def table(written: Microcontroller) -> Table:
    """What was written and what it needs, one line each."""
    memory, estimate = written.memory, written.estimate
    rows = [
        ("files", ", ".join(str(path) for path in (written.header, written.source, written.compiled) if path)),
        ("array in flash", _bytes(written.file_bytes)),
        ("weights and constants in it", _bytes(written.constant_bytes)),
        ("operations to register", str(len(written.operators))),
        ("activations, as TFLM plans them", _bytes(memory.activation_bytes)),
        ("alive at once, no plan takes less", _bytes(memory.lower_bound_bytes)),
        ("tensor arena (estimate)", _bytes(memory.arena_bytes)),
    ]
    if memory.uncounted_scratch_ops:
        rows.append(("scratch memory not counted", ", ".join(memory.uncounted_scratch_ops)))
    if estimate is not None:
        left = ", ".join(f"{count} {name}" for name, count in estimate.cpu_ops.items())
        rows += [
            (f"{estimate.config}: time (estimate)", f"{estimate.inference_time_ms:.3f} ms, {estimate.cycles:,} cycles"),
            (f"{estimate.config}: SRAM (estimate)", _bytes(estimate.sram_bytes)),
            (f"{estimate.config}: flash (estimate)", _bytes(estimate.flash_bytes)),
            (f"{estimate.config}: on the NPU, by Vela's count", f"{estimate.npu_ops} operations"),
            (f"{estimate.config}: left to the CPU, not in the time", left or "none"),
            (f"{estimate.config}: taken for granted", f"{estimate.system_config}, {estimate.memory_mode}"),
        ]
    shown = Table(show_header=False)
    for name, value in rows:
        shown.add_row(name, value)
    return shown


def _bytes(size_bytes: int) -> str:
    return f"{size_bytes:,} bytes"


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"microcontroller": microcontroller, "verify": verification.main}
