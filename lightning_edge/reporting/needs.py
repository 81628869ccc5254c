"""What a file needs of a board, beside what the board has: before a training as well as after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_edge.boards import Board
from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError
from lightning_edge.exporters import TARGETS, contents_of
from lightning_edge.exporters.micro.memory import memory
from lightning_edge.exporters.micro.operators import METHODS
from lightning_edge.exporters.target import target
from lightning_edge.exporters.tflite.graph import parse
from lightning_edge.regular_files import read_regular
from lightning_edge.reporting.budget import Budget, Verdict

# An array in flash; no microcontroller has a hundredth of it.
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Needs:
    """What a file needs of a board.

    Attributes:
        size_bytes: Bytes of the file.
        weight_bytes: Bytes of its weights, a part of them.
        macs: Multiply-accumulates of one sample; ``None`` where the format does not tell.
        operations: The kinds of its operations.
        lacking: What the board's runtime has no kernel for, or does not run, one sentence each.
        arena_bytes: Arena of TensorFlow Lite Micro, an upper bound; ``None`` where that does not run it.
        verdict: Whether it keeps the limits of the board.
    """

    size_bytes: int
    weight_bytes: int
    macs: int | None
    operations: tuple[str, ...]
    lacking: tuple[str, ...]
    arena_bytes: int | None
    verdict: Verdict

    @property
    def fits(self) -> bool:
        """Whether nothing that is known stands in the way."""
        return not self.lacking and self.verdict.status != "exceeded"


def needs_of(path: str | Path, board: Board) -> Needs:
    """Read what a file needs, and hold it against a board.

    Args:
        path: An exported file, or the folder of a Core ML package.
        board: The board.

    Raises:
        RunnerError: If it is missing, cut short, or not what its suffix says.
        ExportError: If the board runs no files of this format.
        ValueError: If the suffix belongs to no target.
    """
    path = Path(path)
    contents = contents_of(path)
    name = next(name for name in TARGETS if target(name).suffix == path.suffix)
    if name not in board.targets:
        raise ExportError(
            f"{path}: {board.name} runs files of {', '.join(board.targets)}, and this is one of {name}; export for one "
            "of those"
        )
    size_bytes = sum(part.stat().st_size for part in _parts(path))
    lacking, arena_bytes = _on_runtime(path, contents, board)
    verdict = Budget(device=board.name).judge(
        {"flash_bytes": size_bytes, "arena_bytes": arena_bytes}, {"peak_memory_bytes": size_bytes}
    )
    weights = contents.int8_weight_bytes + contents.int4_weight_bytes + contents.float_weight_bytes
    macs = None if contents.placements is None else contents.placements.macs
    return Needs(size_bytes, weights, macs, tuple(contents.ops), lacking, arena_bytes, verdict)


def _parts(path: Path) -> list[Path]:
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def _on_runtime(path: Path, contents: Contents, board: Board) -> tuple[tuple[str, ...], int | None]:
    """What the runtime lacks, and the arena where it is TensorFlow Lite Micro."""
    lacking = []
    floats = sorted({*contents.float_compute_ops, *contents.float_ops})
    if board.schemes != "any" and floats:
        lacking.append(f"it computes in float: {', '.join(floats)}; the board runs {', '.join(board.schemes)}")
    if not board.is_microcontroller:
        return tuple(lacking), None
    unknown = sorted(name for name in contents.ops if name not in METHODS)
    if unknown:
        lacking.append(f"TensorFlow Lite Micro has no kernel for {', '.join(unknown)}")
    try:
        return tuple(lacking), memory(parse(read_regular(path, _MOST_BYTES))).arena_bytes
    except ValueError as error:
        return (*lacking, str(error)), None
