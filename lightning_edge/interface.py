"""How the files of a network are called: names, layout, and what is built into them.

One description for every target. Knows neither torch nor any file format: `exporters.front` puts it into a graph.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

# What the notes of an interface begin with in a file.
PREFIX = "lightning_edge."
# Dimensions of an input that layout and pixels are about: batch, channels, height and width.
IMAGE_DIMENSIONS = 4

Layout = Literal["nchw", "nhwc"]

# What a name may be in all formats: ONNX asks for the identifiers of C, Core ML for letters, digits and underscores.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LARGEST_PIXEL = 255


@dataclass(frozen=True)
class Pixels:
    """How a network's images are made of pixels from 0 to 255, so that a file can take the pixels themselves.

    ``(pixel / 255 * white - mean) / std``, by channel: with the default ``white`` what torchvision's ``ToTensor`` and
    ``Normalize(mean, std)`` do.

    Attributes:
        mean: One number for each channel, or one for all.
        std: One number for each channel, or one for all.
        white: What the pixel 255 is before ``mean`` and ``std``: 1, or 255 for a network whose images are the pixels
            as numbers.

    Raises:
        ValueError: If a number is not finite, ``std`` or ``white`` not above 0, or there are different numbers of both.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    white: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            values = _numbers(given)
            if not values or not all(math.isfinite(value) for value in values):
                raise ValueError(f"Pixels({name}={given!r}): give one finite number for each channel, or one for all")
            object.__setattr__(self, name, values)
        if not all(value > 0 for value in self.std) or not (math.isfinite(self.white) and self.white > 0):
            raise ValueError(f"Pixels(std={self.std}, white={self.white!r}): give numbers above 0")
        if len({len(self.mean), len(self.std)} - {1}) > 1:
            raise ValueError(f"Pixels(mean={self.mean}, std={self.std}) are of different numbers of channels")

    @property
    def channels(self) -> int:
        """Channels that it is for; 1 where one number is for all."""
        return max(len(self.mean), len(self.std))

    def scale(self) -> tuple[float, ...]:
        """What a pixel is multiplied by, for each of `channels`."""
        return tuple(self.white / _LARGEST_PIXEL / std for std in self._each(self.std))

    def shift(self) -> tuple[float, ...]:
        """What is added then, for each of `channels`."""
        return tuple(-mean / std for mean, std in zip(self._each(self.mean), self._each(self.std), strict=True))

    def _each(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values * self.channels if len(values) == 1 else values


@dataclass(frozen=True)
class Interface:
    """What an exported file takes and gives, for every target.

    However a file is written, `load` gives something that is called as the network is.

    Attributes:
        inputs: Names of the file's inputs: positional arguments as they come, then keyword arguments sorted by name.
            If not given ``input``, or ``input_0`` and on, and keyword arguments by their own names.
        outputs: Names of its outputs, in the order in which the network gives them. If not given the keys of the
            network's dict, else ``output``, or ``output_0`` and on.
        layout: Layout of the file's own 4-D inputs. ``"nhwc"`` saves an app that has images so a transpose.
        pixels: How images are made of pixels; with it the file takes 4-D inputs as uint8 from 0 to 255.
        labels: Names of the classes, kept in the file: as many as the first output of shape ``(batch, classes)`` has,
            or the second dimension of the first output where none has two.
        max_batch: The most samples that the file takes in one call; it takes any number from 1 to that.

    Raises:
        ValueError: If a value is not allowed.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    layout: Layout = "nchw"
    pixels: Pixels | None = None
    labels: tuple[str, ...] = ()
    max_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "labels"):
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
        if type(self.max_batch) is not int or self.max_batch < 1:
            raise ValueError(f"Interface(max_batch={self.max_batch!r}): give a whole number of samples, 1 or more")
        if any("\n" in label or "\r" in label for label in self.labels):
            raise ValueError("Interface: a label has a line break in it; files keep one label a line")

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
        given = dict(values)
        try:
            if given.get("pixels") is not None:
                given["pixels"] = Pixels(**given["pixels"])
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"{values!r} is no interface of a file: {error}") from error


def _numbers(given: Any) -> tuple[float, ...]:
    """Read one number, or several, as floats; none where it is neither."""
    values: Sequence[Any] = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return ()
    return tuple(float(value) for value in values)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
