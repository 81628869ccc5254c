"""What devices have measured so far, on the disk, so that an evaluation that broke off on one can go on.

The file is a row of frames, as a device's runner speaks them: JSON and raw values, nothing pickled. The first has the
settings, the others each a part that was measured, or the outputs of one call of the user's loop.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from lightning_edge.devices.runner import FrameError, pack, unpack
from lightning_edge.errors import EdgeError
from lightning_edge.evaluation.reference import checksum
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.network import Inputs
from lightning_edge.plain_values import as_count, as_object, as_typed
from lightning_edge.regular_files import read_regular
from lightning_edge.reporting.devices import DeviceRow
from lightning_edge.reporting.report import without_infinities
from lightning_edge.reporting.typed import built
from lightning_edge.user_warnings import warn

NAME = "devices.journal"
_FORMAT = 1
# Outputs of a whole validation set are small for classes and large for images; beyond this they are measured again.
_KEPT_BYTES = 2**28
_MOST_BYTES = 2 * _KEPT_BYTES
_ANEW = "Leave resume out to measure anew"


@dataclass
class _Kept:
    """What there is of one file on one device."""

    sha256: str
    row: DeviceRow | None = None
    parts: set[str] = field(default_factory=set)
    calls: dict[int, tuple[int, list[Tensor]]] = field(default_factory=dict)


@final
class Journal:
    """What devices have measured so far in an evaluation.

    Args:
        settings: Those of the evaluation; the journal lies in its folder.
        resume: Whether to go on with what is there. Else it is written over.

    Raises:
        EdgeError: If there is nothing to go on with, it cannot be used, or it was measured with other settings.
    """

    def __init__(self, settings: EvaluationSettings, resume: bool = False) -> None:
        self._path = Path(settings.dirpath) / NAME
        self._settings = _plain(settings)
        self._kept: dict[str, _Kept] = {}
        self._kept_bytes = 0
        self._end = 0
        self._writes = True
        if resume:
            self._read(settings)

    def begin(self) -> None:
        """Write what it begins with, unless it is there."""
        if not self._end:
            self.append({"journal": _FORMAT, "settings": self._settings})

    def has(self, row: DeviceRow) -> bool:
        """Whether something was measured of a file on a device."""
        kept = self._kept.get(_identity(row))
        return kept is not None and bool(kept.parts or kept.calls)

    def progress(self, row: DeviceRow, sha256: str) -> Progress:
        """Give what there is of a file on a device, and where more of it is kept.

        Raises:
            EdgeError: If the file is another one.
        """
        name = _identity(row)
        if name not in self._kept:
            self._kept[name] = _Kept(sha256)
            self.append({"file": name, "sha256": sha256})
        if self._kept[name].sha256 != sha256:
            raise EdgeError(
                f"{row.path} is another file than the one that was measured before the run broke off (its SHA-256 is "
                f"{sha256[:12]}, and was {self._kept[name].sha256[:12]}). {_ANEW}"
            )
        return Progress(self, name, self._kept[name])

    def append(self, message: dict[str, Any], arrays: Sequence[Any] = ()) -> None:
        """Write a frame behind the others; from the first that cannot be written on, none is."""
        if not self._writes:
            return
        frame = pack(message, arrays)
        try:
            if not self._end:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.unlink(missing_ok=True)
            with self._path.open("r+b" if self._end else "xb") as opened:
                opened.truncate(self._end)  # a frame that was cut short
                opened.seek(self._end)
                opened.write(frame)
        except OSError as error:
            self._writes = False
            warn(f"{self._path} cannot be written ({error.strerror or error}): a run that breaks off cannot be resumed")
        else:
            self._end += len(frame)

    def has_room(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these outputs are kept, too; they count from then on."""
        self._kept_bytes += sum(tensor.nbytes for tensor in tensors)
        return self._kept_bytes <= _KEPT_BYTES

    def remove(self) -> None:
        """Remove it: nothing is missing."""
        self._path.unlink(missing_ok=True)

    def _read(self, settings: EvaluationSettings) -> None:
        if not settings.devices:
            raise EdgeError(f"resume goes on where a device was lost, and there is none. {_ANEW}, or name the devices")
        try:
            data = read_regular(self._path, _MOST_BYTES)
            frames = self._frames(io.BytesIO(data))
        except FileNotFoundError as error:
            raise EdgeError(
                f"there is nothing to resume: no evaluation into {self._path.parent} broke off on a device. {_ANEW}"
            ) from error
        except (OSError, ValueError) as error:
            raise EdgeError(f"{self._path} cannot be used: {error}. {_ANEW}") from error
        then, now = frames, self._settings
        changed = [name for name in now if name not in then or then[name] != now[name]]
        if changed:
            told = "; ".join(f"{name}: then {then.get(name)!r}, now {now[name]!r}" for name in changed)
            raise EdgeError(
                f"{self._path} was measured with other settings ({told}). Resume with the same, or leave resume out to "
                "measure anew"
            )

    def _frames(self, stream: io.BytesIO) -> dict[str, Any]:
        """Take over all frames that are whole; gives the settings."""
        settings: dict[str, Any] | None = None
        while True:
            try:
                message, arrays = unpack(lambda count: _exactly(stream, count), _KEPT_BYTES)
            except EOFError:
                if settings is None:
                    raise ValueError("it is cut short") from None
                return settings
            if settings is None:
                if message.get("journal") != _FORMAT:
                    raise FrameError("it is no journal of this version")
                settings = as_object(message.get("settings"), "settings")
            else:
                self._take(message, arrays)
            self._end = stream.tell()

    def _take(self, message: dict[str, Any], arrays: Sequence[Any]) -> None:
        name = as_typed(message.get("file"), str, "file")
        if "sha256" in message:
            self._kept[name] = _Kept(as_typed(message["sha256"], str, "sha256"))
            return
        if name not in self._kept:
            raise ValueError("it has parts of a file before the file")
        kept = self._kept[name]
        if "part" in message:
            kept.parts.add(as_typed(message["part"], str, "part"))
            kept.row = built(DeviceRow, message.get("row"), "row")
            return
        index, key = (as_count(message.get(part), part) for part in ("call", "key"))
        tensors = [torch.from_numpy(array) for array in arrays]
        kept.calls[index] = key, tensors
        self.has_room(tensors)


@final
class Progress:
    """What there is of one file on one device, and where more of it is kept.

    Args:
        journal: The journal.
        name: What the file on the device is called there.
        kept: What there is.
    """

    def __init__(self, journal: Journal, name: str, kept: _Kept) -> None:
        self._journal, self._name, self._kept = journal, name, kept

    @property
    def row(self) -> DeviceRow | None:
        """The row with every part that was measured, if there is one."""
        return self._kept.row

    def has(self, part: str) -> bool:
        """Whether a part was measured."""
        return part in self._kept.parts

    def add(self, part: str, row: DeviceRow) -> None:
        """Keep a part that was measured, with the row that it led to."""
        self._kept.parts.add(part)
        self._kept.row = row
        self._journal.append({"file": self._name, "part": part, "row": without_infinities(asdict(row))})

    def answers(self, file: Callable[..., list[Tensor]] | None) -> Replay:
        """Begin a pass of the user's loop: calls that were answered are so again, the others by the file.

        Args:
            file: The file on the device; ``None`` where nothing is missing.
        """
        return Replay(self._kept.calls, file, self._keep)

    def _keep(self, index: int, key: int, outputs: Sequence[Tensor]) -> None:
        if self._journal.has_room(outputs):
            arrays = [tensor.contiguous().numpy() for tensor in outputs]
            self._journal.append({"file": self._name, "call": index, "key": key}, arrays)


@final
class Replay:
    """Answers the calls of a pass by outputs that were kept, and by the file where there are none."""

    def __init__(
        self,
        calls: dict[int, tuple[int, list[Tensor]]],
        file: Callable[..., list[Tensor]] | None,
        keep: Callable[[int, int, Sequence[Tensor]], None],
    ) -> None:
        self._calls, self._file, self._keep = calls, file, keep
        self._index = -1

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Answer a call.

        Raises:
            EdgeError: If it is not the one that was answered.
            RunnerError: If the file fails to run.
        """
        self._index += 1
        inputs = Inputs(args, kwargs)
        key = checksum(inputs)
        known = self._calls.get(self._index)
        if known is None and self._file is not None:
            outputs = self._file(*args, **kwargs)
            self._keep(self._index, key, outputs)
            return outputs
        if known is None or known[0] != key:
            self._refuse()
        return [tensor.clone() for tensor in known[1]]

    def end(self) -> None:
        """See that the pass had all the calls that were answered.

        Raises:
            EdgeError: If it had fewer.
        """
        if any(index > self._index for index in self._calls):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise EdgeError(
            f"the samples are not those that ran before the run broke off (batch {self._index + 1}): the data, their "
            f"order or the batch size changed. {_ANEW}"
        )


def _identity(row: DeviceRow) -> str:
    return f"{row.device}/{row.target}/{row.precision}/{row.source}"


def _plain(settings: EvaluationSettings) -> dict[str, Any]:
    """What decides what is measured, as JSON gives it back."""
    timing, asked = settings.timing, settings.on_devices
    return {
        "warmup": timing.warmup,
        "repeats": timing.repeats,
        "threads": timing.threads,
        "measure": sorted(asked.measure),
        "limit_samples": asked.limit_samples,
        "sustained": None if asked.sustained is None else asdict(asked.sustained),
        "cool": None if asked.cool is None else asdict(asked.cool),
        "energy_seconds": asked.energy_seconds,
    }


def _exactly(stream: io.BytesIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
