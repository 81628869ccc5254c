"""A runtime's own benchmark program on a device, named by the user: no Python there, and no values either."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_edge.devices.device import Channel, Device
from lightning_edge.devices.programs import NativeFigures, known_program
from lightning_edge.devices.words import plain
from lightning_edge.errors import DeviceError, RunnerError
from lightning_edge.measure import Timing

# How long a program may take, and be silent, and how much it may say.
_LIMIT_S = 600.0
_MOST_BYTES = 2**18

# Arguments: a folder or nothing, the bytes of the file, its name, the program and what it is given. The file comes by
# standard input. When that ends, the program is killed. The folder goes with the script.
_SCRIPT = """
folder=$(mktemp -d "${1:-${TMPDIR:-/tmp}}/lightning-edge-XXXXXX") || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 129' HUP INT TERM PIPE
cd "$folder" || exit 1
head -c "$2" > "$3" || exit 1
shift 3
exec 4<&0
"$@" 2>&1 < /dev/null 4<&- &
running=$!
{ cat <&4 > /dev/null; kill -KILL "$running"; } > /dev/null 2>&1 &
wait "$running"
status=$?
rm -rf "$folder"
echo "
lightning-edge ended with $status"
"""
_END = re.compile(rb"\nlightning-edge ended with (\d{1,3})\n$")


def time_by_program(name: str, device: Device, target: str, path: Path, timing: Timing) -> tuple[str, NativeFigures]:
    """Run a file by the program that the device has for its target.

    Args:
        name: Name of the device, for messages.
        device: The device.
        target: Target of the file.
        path: The file.
        timing: Warm-up, repeats and threads, as far as the program takes them.

    Returns:
        What ran it, in words, and its figures.

    Raises:
        DeviceError: If the device cannot be reached.
        RunnerError: If the program is not there, fails, or says nothing that is known.
    """
    program, *own = device.programs[target]
    data, known = path.read_bytes(), known_program(program)
    file = f"model{path.suffix}"
    taken = {argument.partition("=")[0] for argument in own}
    added = [argument for argument in known.arguments(file, timing) if argument.partition("=")[0] not in taken]
    script = ["sh", "-c", _SCRIPT, "sh", device.folder or device.native_folder or "", str(len(data)), file]
    try:
        channel = device.start([*script, program, *own, *added])
    except DeviceError as error:
        raise DeviceError(f"{name}: {error}") from error
    called = Path(program).name
    with channel:
        status, said = _said(name, called, channel, data)
    lines = [line for line in map(str.strip, said.splitlines()) if line]
    last = plain(lines[-1], 200) if lines else "nothing"
    if status in (126, 127):
        raise RunnerError(f"{name}: {program} cannot be started there ({last}). Give its path on the device")
    if status != 0:
        raise RunnerError(f"{name}: {called} ended with status {status} and said at last: {last}")
    figures = known.read(said)
    if figures == NativeFigures():
        raise RunnerError(f"{name}: {called} told no times that are known; it said at last: {last}")
    return f"{called}, a program of the device, which gives times only", figures


def _said(name: str, called: str, channel: Channel, data: bytes) -> tuple[int, str]:
    """Send the file, and wait for the end of the program: its status, and what it said."""
    said = bytearray()
    try:
        channel.write(data, _LIMIT_S)
        while not said.endswith(b"\n") or _END.search(said, max(0, len(said) - 64)) is None:
            said += channel.read(1, _LIMIT_S)
            if len(said) > _MOST_BYTES:
                raise RunnerError(f"{name}: {called} said more than {_MOST_BYTES} bytes. Ask it for less")
    except TimeoutError as error:
        raise RunnerError(f"{name}: {called} said nothing for {_LIMIT_S:g} s, and was ended") from error
    except EOFError as error:
        ended = channel.close()
        raise RunnerError(
            f"{name}: {called} was not run to its end: {ended.lost or ended.words or 'it was gone'}"
        ) from error
    end = _END.search(said)
    assert end is not None
    return int(end[1]), said[: end.start()].decode(errors="replace")
