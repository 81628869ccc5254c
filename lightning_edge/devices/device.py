"""`Device`, the abstract class of machines that files are run on, and `Channel`, the way to a program there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

from lightning_edge.devices.meter import Reading, read_meter


@dataclass(frozen=True)
class Farewell:
    """How a program on a device ended.

    Attributes:
        status: Its exit status, 128 and the signal's number where a signal ended it; ``None`` where that is not known.
        words: The last that it printed as an error.
        lost: Why the way to the device broke off, in words; ``None`` where it did not.
    """

    status: int | None
    words: str = ""
    lost: str | None = None


class Channel(ABC):
    """Standard input and output of a program on a device. It ends with this object, and leaves nothing behind there."""

    @abstractmethod
    def write(self, data: bytes, limit_s: float) -> None:
        """Write to the program's standard input.

        Raises:
            EOFError: If the program or the way to it is gone.
            TimeoutError: If it takes longer than ``limit_s`` seconds.
        """

    @abstractmethod
    def read(self, count: int, limit_s: float) -> bytes:
        """Read exactly so many bytes from the program's standard output.

        Raises:
            EOFError: If the program or the way to it is gone.
            TimeoutError: If it takes longer than ``limit_s`` seconds.
        """

    @abstractmethod
    def close(self, pids: Sequence[int] = ()) -> Farewell:
        """End the program, which ends by itself when its standard input does, and say how it ended.

        It may be called again, and then says the same.

        Args:
            pids: Processes of the device that are killed by their numbers where it does not end by itself.
        """

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Device(ABC):
    """A machine that files are run on: what can start a program there, and give its standard input and output.

    What is started is the device's own Python with one file of this package, `devices.runner`, which needs NumPy and
    the runtime of the file. A subclass is named in a configuration by its class path.

    Attributes:
        python: The device's Python: the program, and what stands before its own arguments.
        folder: Folder on the device for what is written there; that of its temporary files if ``None``.
        times: Whether how long a call takes there says something: not on an emulated CPU.
        runtimes: Targets whose files its Python runs.
        session: Settings of its runtime, by name.
        programs: By target a runtime's own benchmark program on the device, and its arguments, see `native`.
        native_folder: Folder for files of these programs where ``folder`` is not given; that of temporary files if
            ``None``.
        meter: Program of this machine that prints the joules that the device has taken so far, and its arguments.
    """

    python: Sequence[str] = ("python3",)
    folder: str | None = None
    times: bool = True
    runtimes: Collection[str] = ("tflite", "onnx")
    session: Mapping[str, str] = MappingProxyType({})
    programs: Mapping[str, Sequence[str]] = MappingProxyType({})
    native_folder: str | None = None
    meter: Sequence[str] | None = None

    def runs(self, target: str) -> bool:
        """Whether files of a target are run there, by its Python or by a program."""
        return target in self.runtimes or target in self.programs

    @abstractmethod
    def start(self, command: Sequence[str]) -> Channel:
        """Start a program on the device.

        Args:
            command: The program and its arguments, one by one: never a line for a shell to take apart.

        Raises:
            DeviceError: If the device cannot be reached, saying why and what to do.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """Name of the device where it was given none: letters, digits, dots, hyphens and underscores."""

    def check(self) -> None:  # noqa: B027 (most have nothing to look at)
        """Look at what can be known to be wrong without the device.

        Raises:
            DeviceError: If a file that the settings name is not there.
            MissingExtraError: If an optional package is not installed.
        """

    def temperature_c(self) -> float | None:
        """Tell the device's temperature in degrees Celsius, where the runner there cannot read it; ``None`` else."""
        return None

    def energy(self) -> Reading | None:
        """Read a counter of energy that is not read by the runner there; ``None`` where the runner is to look.

        Raises:
            DeviceError: If the user's meter does not tell.
        """
        return None if self.meter is None else read_meter(self.meter)
