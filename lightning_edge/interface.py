"""How the files of a network are called: names, layout.

One description for every target. Knows neither torch nor any file format: `exporters.front` puts it into a graph.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

# What the notes of an interface begin with in a file.
PREFIX = "lightning_edge."

Layout = Literal["nchw", "nhwc"]

# What a name may be in all formats: ONNX asks for the identifiers of C, Core ML for letters, digits and underscores.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Interface:
    """What an exported file takes and gives, for every target.

    However a file is written, `load` gives something that is called as the network is.

    Attributes:
        inputs: Names of the file's inputs: positional arguments as they come, then keyword arguments sorted by name.
            Those of the converters if not given.
        outputs: Names of its outputs, in the order in which the network gives them. Those of the network's dict, or
            the converters', if not given.
        layout: Layout of the file's own 4-D inputs. ``"nhwc"`` saves an app that has images so a transpose.

    Raises:
        ValueError: If a value is not allowed.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    layout: Layout = "nchw"

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            given = getattr(self, name)
            listed = isinstance(given, list | tuple)
            if not listed or not all(isinstance(text, str) and text.strip() for text in given):
                raise ValueError(f"Interface({name}={given!r}): give a list of texts that are not empty")
            object.__setattr__(self, name, tuple(given))
        names = [*self.inputs, *self.outputs]
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"Interface: {name!r} is no name that every format takes; give letters, digits and underscores, no "
                    "digit first"
                )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Interface names {', '.join(twice)} twice; every input and output needs its own name")
        if self.layout not in get_args(Layout):
            raise ValueError(f"Interface(layout={self.layout!r}) is not one of {get_args(Layout)}")

    def notes(self) -> dict[str, str]:
        """What is not as by default, by name, as short texts to be kept in a file; see `of_notes`."""
        given = asdict(self)
        default = asdict(Interface())
        changed = {name: value for name, value in given.items() if value != default[name]}
        return {PREFIX + name: value if isinstance(value, str) else _json(value) for name, value in changed.items()}

    @classmethod
    def of_notes(cls, notes: Mapping[str, str]) -> Interface:
        """Read `notes` back; other notes are not looked at.

        Raises:
            ValueError: If one is not what `notes` writes.
        """
        found = {entry.name: notes[PREFIX + entry.name] for entry in fields(cls) if PREFIX + entry.name in notes}
        return cls.of({name: text if name == "layout" else json.loads(text) for name, text in found.items()})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Interface:
        """Build it of plain values, as JSON has them.

        Raises:
            ValueError: If they are not those of an interface.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{values!r} is no interface of a file: {error}") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
