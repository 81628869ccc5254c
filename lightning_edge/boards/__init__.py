"""Profiles of boards and phones: what a file may take there, and the document that says so. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from lightning_edge.yaml_files import read_yaml

LIMITS = ("flash_bytes", "arena_bytes", "peak_memory_bytes")


@dataclass(frozen=True)
class Board:
    """What is known of a board, without figures that are not published, or that differ from one to the next.

    Attributes:
        name: What a budget and `lightning-edge fits` call it.
        title: What it is.
        runtime: What usually runs files there.
        targets: Targets whose files it runs.
        schemes: Forms of weights that it runs: ``["int8"]``, or ``"any"`` that the target has.
        flash_bytes: Flash, all of it: the firmware needs its part.
        arena_bytes: RAM in one piece, all of it: the firmware needs its part.
        peak_memory_bytes: RAM of a machine with an operating system, all of it.
        npu: Configuration of Arm's compiler Vela.
        note: What else there is to know.
        sources: The document that each figure is from, by the figure's name.
    """

    name: str
    title: str
    runtime: str
    targets: Sequence[str]
    schemes: Sequence[str] | Literal["any"]
    flash_bytes: int | None = None
    arena_bytes: int | None = None
    peak_memory_bytes: int | None = None
    npu: str | None = None
    note: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_microcontroller(self) -> bool:
        """Whether TensorFlow Lite Micro is its runtime."""
        return self.runtime.startswith("TensorFlow Lite Micro")

    @property
    def limits(self) -> dict[str, int]:
        """What a file may take there, by the names of a `Budget`."""
        given = {name: getattr(self, name) for name in LIMITS}
        return {name: limit for name, limit in given.items() if limit is not None}

    def runs(self, target: str, scheme: str) -> bool:
        """Whether it runs a target's files of this form: ``"fp32"``, ``"int8"`` or a scheme."""
        return target in self.targets and (self.schemes == "any" or scheme in self.schemes)


def board_names() -> list[str]:
    """List the boards there is a profile of."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_board(name: str) -> Board:
    """Read a profile.

    Args:
        name: One of `board_names`.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in board_names():
        raise ValueError(f"device: there is no profile {name!r}; allowed: {', '.join(board_names())}")
    given: dict[str, Any] = read_yaml(Path(str(resources.files(__name__) / f"{name}.yaml")))
    unknown = sorted({*given} - {entry.name for entry in fields(Board)})
    if unknown:
        raise ValueError(f"profile {name!r} has keys that are not known: {', '.join(unknown)}")
    return Board(name=name, **given)
