"""``lightning-edge fits``: whether a file, or the network of a configuration that is not trained yet, fits a board."""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edge.boards import Board, board_names, read_board
from lightning_edge.errors import EdgeError

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from rich.table import Table
    from torch import nn

    from lightning_edge.reporting.needs import Needs

_CONFIGURATIONS = (".yaml", ".yml", ".json")
# What the ranges of an untrained network are read on: they decide no size.
_BATCHES = 2
_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
# As of `lightning-edge evaluate`.
_OVER_BUDGET = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge fits``: a table of what is needed and what there is.

    Args:
        arguments: Arguments behind ``fits``.

    Returns:
        The status to exit with: 3 if it does not fit, 2 if it cannot be told.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-edge fits",
        description="Tell whether a file, or the network of a configuration before it is trained, fits a board.",
    )
    parser.add_argument("model", help="an exported file, a configuration in YAML, or recipe:<name>")
    parser.add_argument("--device", required=True, choices=board_names(), metavar="NAME", help=", ".join(board_names()))
    given = parser.parse_args(arguments)

    from rich.console import Console

    from lightning_edge.quiet import quiet_libraries
    from lightning_edge.reporting.needs import needs_of
    from lightning_edge.user_warnings import print_messages_only

    quiet_libraries()
    print_messages_only()
    board = read_board(given.device)
    try:
        with tempfile.TemporaryDirectory(prefix="fits-") as folder:
            path, parameters = Path(given.model), None
            if given.model.startswith("recipe:") or path.suffix in _CONFIGURATIONS:
                path, parameters = _untrained(given.model, board, Path(folder))
            found = needs_of(path, board)
            estimated = _by_vela(path, board, found)
    except (EdgeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    Console().print(table(f"{given.model} on {board.title}", found, board, parameters, estimated))
    for reason in found.lacking:
        print(f"does not run: {reason}")
    for excess in found.verdict.exceeded:
        share = 1 - excess.limit / excess.value
        print(f"too large: {excess}; it must shrink by {share:.0%}")
    if parameters is not None:
        print(
            f"As it is built, quantized on {_BATCHES} batches without training; what phases would take out is still "
            "in it."
        )
    if board.note is not None:
        print(board.note)
    print(_summary(found, board))
    return 0 if found.fits else _OVER_BUDGET


def table(
    title: str, found: Needs, board: Board, parameters: int | None = None, estimated: Sequence[tuple[str, str]] = ()
) -> Table:
    """Lay out what a file needs beside what a board has.

    Args:
        title: What the table is of.
        found: What the file needs.
        board: The board.
        parameters: Weights and biases of the network, if it was at hand.
        estimated: What Vela estimates, by name.
    """
    from rich.table import Table
    from rich.text import Text

    laid = Table(title=Text(title), title_justify="left")
    for heading in ("", "needs", "there is", ""):
        laid.add_column(heading, overflow="fold")
    over = {excess.name for excess in found.verdict.exceeded}

    def verdict(name: str, value: int | None) -> tuple[str, str]:
        limit = board.limits.get(name)
        if limit is None:
            return "not known", ""
        if value is None:
            return f"{limit:,} bytes", "not known"
        return f"{limit:,} bytes", "too large" if name in over else f"{value / limit:.1%} of it"

    rows = [("file, in flash", f"{found.size_bytes:,} bytes", *verdict("flash_bytes", found.size_bytes))]
    rows.append(("weights in it", f"{found.weight_bytes:,} bytes", "", ""))
    if board.is_microcontroller:
        needed = "not known" if found.arena_bytes is None else f"{found.arena_bytes:,} bytes at most"
        rows.append(("arena, in RAM", needed, *verdict("arena_bytes", found.arena_bytes)))
    rows.append(("MACs", "not known" if found.macs is None else f"{found.macs:,}", "", ""))
    rows.append(("operations", ", ".join(found.operations), "", ""))
    if parameters is not None:
        stored = ", ".join(f"{name} {parameters * bits // 8:,}" for name, bits in _BITS.items())
        rows.append((f"{parameters:,} parameters", f"{stored} bytes", "", "without the rest of a file"))
    rows += [(name, value, "", "Vela's estimate") for name, value in estimated]
    for row in rows:
        laid.add_row(*map(Text, row))
    return laid


def _summary(found: Needs, board: Board) -> str:
    if not found.fits:
        return "It does not fit."
    if not board.limits:
        return "Nothing that is known stands in its way; no memory of the board is known."
    unknown = found.verdict.not_measurable
    return f"It fits, as far as is known; not known: {', '.join(unknown)}." if unknown else "It fits."


def _untrained(given: str, board: Board, folder: Path) -> tuple[Path, int]:
    """Build what a configuration says, quantize it on a few batches, and write the file of the board's first target."""
    from lightning_edge import exporters
    from lightning_edge.callbacks.compression import EdgeCompressionCallback
    from lightning_edge.callbacks.evaluation import DeviceEvaluationCallback
    from lightning_edge.cli.main import EdgeCLI, EdgeParser
    from lightning_edge.cli.trainer import EdgeTrainer, first_of, loader_of
    from lightning_edge.evaluation.validation import calibration_inputs
    from lightning_edge.quantization import quantize
    from lightning_edge.surgery import find_network

    with warnings.catch_warnings():
        # It warns of arguments beside those of the command line, which are ours.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        built = EdgeCLI(
            trainer_class=EdgeTrainer,
            parser_class=EdgeParser,
            save_config_callback=None,
            run=False,
            args=["--config", given],
        )
    model, data, trainer = built.model, built.datamodule, built.trainer
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    compression = first_of(callbacks, EdgeCompressionCallback)
    evaluation = first_of(callbacks, DeviceEvaluationCallback)
    module = next((found.module for found in (compression, evaluation) if found is not None and found.module), None)
    model.trainer = trainer
    if data is not None:
        data.prepare_data()
        data.setup("fit")
    model.prepare_data()
    model.setup("fit")
    model.configure_model()
    inputs = calibration_inputs(model, loader_of(data or model, "train_dataloader"), _BATCHES, module, data)
    network: nn.Module = find_network(model, module)
    name = board.targets[0]
    settings = {} if evaluation is None else evaluation.settings.options
    options = {key: value for key, value in exporters.options_of(name, "int8", settings).items() if key != "scheme"}
    path = folder / f"model{exporters.target(name).suffix}"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    staged = exporters.stage(quantize(network, inputs), name, path, inputs=inputs[0], **options)
    try:
        staged.accept()
    finally:
        staged.discard()
    return path, parameters


def _by_vela(path: Path, board: Board, found: Needs) -> list[tuple[str, str]]:
    """What Arm's compiler says of a file for an NPU that it compiles for."""
    if board.npu is None or found.lacking:
        return []
    from lightning_edge.exporters.micro import vela

    told = vela.estimate(path, board.npu)
    on_cpu = ", ".join(dict.fromkeys(told.cpu_operators)) or "none"
    return [
        ("inference", f"{told.inference_time_ms:.3f} ms at {told.clock_hz / 1e6:g} MHz"),
        ("SRAM", f"{told.sram_bytes:,} bytes"),
        ("flash", f"{told.flash_bytes:,} bytes"),
        ("left to the CPU", on_cpu),
    ]
