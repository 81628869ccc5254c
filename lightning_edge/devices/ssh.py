"""`Ssh`: any Linux machine that a key opens by SSH and that has a Python, such as a Raspberry Pi."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import signal
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

from lightning_edge.devices.device import Channel, Device, Farewell
from lightning_edge.devices.meter import check_meter
from lightning_edge.devices.programs import programs_of
from lightning_edge.devices.words import last_line
from lightning_edge.errors import DeviceError, check_installed, first_line, require

EXTRA = "ssh"

_Result = TypeVar("_Result")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
# A device that says nothing at all for so long is lost: this often it is asked, and so often it may stay silent.
_ALIVE_S, _ALIVE_COUNT = 5.0, 4
# How long a runner may take to put its things away, once nobody asks any more.
_LAST_BREATH_S = 8.0
_WORDS_BYTES = 2**12
_PART_BYTES = 2**18


@final
class Ssh(Device):
    """A Linux machine by SSH. Its host key has to be known, and a key or an agent opens it: there are no passwords.

    What ``~/.ssh/config`` says of the host holds where nothing is given here.

    Args:
        host: Name or address of the device.
        user: Name to log in by; as ``ssh`` finds it if not given.
        port: Port of its SSH server; 22 if not given.
        known_hosts: File with the host keys that are known, as ``ssh`` has it; ``~/.ssh/known_hosts`` if not given.
        fingerprint: Fingerprint of the host key in place of such a file: ``SHA256:`` and 43 characters.
        key: File of a private key without a passphrase; those of ``~/.ssh`` and of the agent if not given.
        python: The device's Python, such as that of a virtual environment.
        folder: Folder on the device for what is written there; that of its temporary files if not given.
        connect_limit_s: Seconds that it may take to log in.
        meter: As for `Local`.
        programs: As for `Local`.

    Raises:
        ValueError: If a setting is not allowed.
    """

    def __init__(
        self,
        host: str,
        user: str | None = None,
        port: int | None = None,
        known_hosts: str | None = None,
        fingerprint: str | None = None,
        key: str | None = None,
        python: str = "python3",
        folder: str | None = None,
        connect_limit_s: float = 15.0,
        meter: Sequence[str] | None = None,
        programs: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(host, str) or not _HOST.fullmatch(host) or host.startswith("-"):
            raise ValueError(
                f"Ssh(host={host!r}): give the name or address of the device; user=... and port=... beside it"
            )
        if port is not None and (type(port) is not int or not 0 < port < 2**16):
            raise ValueError(f"Ssh(port={port!r}) is not allowed; give a number from 1 to 65535")
        if fingerprint is not None and not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(
                f"Ssh(fingerprint={fingerprint!r}): give SHA256: and 43 characters, as "
                "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints it on the device"
            )
        if fingerprint is not None and known_hosts is not None:
            raise ValueError("Ssh(known_hosts=..., fingerprint=...): give one of them")
        if not python:
            raise ValueError(f"Ssh(python={python!r}): give the path of the device's Python")
        if not connect_limit_s > 0:
            raise ValueError(f"Ssh(connect_limit_s={connect_limit_s!r}) is not allowed; give more than 0 seconds")
        self.host, self.user, self.port = host, user, port
        self.known_hosts = None if known_hosts is None else Path(known_hosts).expanduser()
        self.fingerprint = fingerprint
        self.key = None if key is None else Path(key).expanduser()
        self.python = (python,)
        self.folder = folder
        self.connect_limit_s = connect_limit_s
        self.meter = check_meter(meter)
        self.programs = programs_of(programs)

    @property
    def label(self) -> str:
        """The host."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.host)

    def check(self) -> None:
        """Look whether asyncssh is installed, and the files of the settings are there.

        Raises:
            DeviceError: If a file is not.
            MissingExtraError: If asyncssh is not installed.
        """
        check_installed("asyncssh", EXTRA)
        for name, path in (("known_hosts", self.known_hosts), ("key", self.key)):
            if path is not None and not path.is_file():
                raise DeviceError(f"{name}={str(path)!r} is no file. Give the path of one, or leave {name} out")

    def start(self, command: Sequence[str]) -> Channel:
        """Log in and start a program.

        Raises:
            DeviceError: If the device is not reached, is another than expected, or does not let us in.
        """
        self.check()
        return _SshChannel(self, shlex.join(command))

    def __str__(self) -> str:
        """Name it as ``ssh`` does."""
        return f"{self.user}@{self.host}" if self.user else self.host


class _Loop:
    """An event loop in a thread of its own, for a library that knows no other way."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssh", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _Result], limit_s: float | None = None) -> _Result:
        """Wait for a coroutine.

        Raises:
            TimeoutError: If it takes longer than ``limit_s`` seconds.
        """
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, limit_s), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@final
class _SshChannel(Channel):
    """A program on a device, over a connection of its own."""

    def __init__(self, device: Ssh, command: str) -> None:
        self._lost: str | None = None
        self._farewell: Farewell | None = None
        self._unread = bytearray()
        self._ssh = require("asyncssh", EXTRA)
        self._loop = _Loop()
        shown: list[Any] = []
        try:
            self._connection, self._process = self._loop.run(_begun(self._ssh, device, command, shown))
        except BaseException as error:
            self._loop.stop()
            if isinstance(error, self._ssh.Error | OSError | ValueError | TimeoutError):
                raise DeviceError(_refusal(self._ssh, device, error, shown)) from error
            raise

    def write(self, data: bytes, limit_s: float) -> None:
        """Write to its standard input."""
        if self._farewell is not None:
            raise EOFError("the program is gone")

        async def write() -> None:
            self._process.stdin.write(data)
            await self._process.stdin.drain()

        self._waiting(write(), limit_s)

    def read(self, count: int, limit_s: float) -> bytes:
        """Read from its standard output."""
        if self._farewell is not None:
            raise EOFError("the program is gone")
        while len(self._unread) < count:
            part = self._waiting(self._process.stdout.read(_PART_BYTES), limit_s)  # what is there, and not all of that
            if not part:
                raise EOFError("the program is gone")
            self._unread += part
        found = bytes(self._unread[:count])
        del self._unread[:count]
        return found

    def close(self, pids: Sequence[int] = ()) -> Farewell:
        """End it, and the connection."""
        if self._farewell is None:
            self._farewell = self._loop.run(self._leave(pids))
            self._loop.stop()
        return self._farewell

    def _waiting(self, coroutine: Coroutine[Any, Any, _Result], limit_s: float) -> _Result:
        try:
            return self._loop.run(coroutine, limit_s)
        except TimeoutError:
            raise
        except (self._ssh.Error, OSError) as error:
            self._lost = first_line(error)
            raise EOFError("the program is gone") from error

    async def _leave(self, pids: Sequence[int]) -> Farewell:
        """Let the program end by itself, else kill what it said its processes are, and hang up."""
        process, status, words = self._process, None, b""
        with contextlib.suppress(TimeoutError, self._ssh.Error, OSError):
            process.stdin.write_eof()
            words = await asyncio.wait_for(_last(process.stderr), _LAST_BREATH_S)
            await asyncio.wait_for(process.wait_closed(), _LAST_BREATH_S)
        if process.exit_signal is not None:
            status = 128 + getattr(signal, f"SIG{process.exit_signal[0]}", 0)
        elif process.exit_status is not None:
            status = process.exit_status
        if status is None and self._connection.is_closed():
            self._lost = self._lost or "the device closed it"
        elif status is None and pids:
            with contextlib.suppress(TimeoutError, self._ssh.Error, OSError):
                kill = shlex.join(["kill", "-KILL", *map(str, pids)])
                await self._connection.run(kill, timeout=_LAST_BREATH_S)
        self._connection.close()
        with contextlib.suppress(TimeoutError, self._ssh.Error, OSError):
            await asyncio.wait_for(self._connection.wait_closed(), _LAST_BREATH_S)
        return Farewell(status, last_line(words), self._lost if status is None else None)


async def _last(stream: Any) -> bytes:
    """Read to the end, and keep the last of it."""
    kept = b""
    while part := await stream.read(_WORDS_BYTES):
        kept = (kept + part)[-_WORDS_BYTES:]
    return kept


async def _begun(ssh: Any, device: Ssh, command: str, shown: list[Any]) -> tuple[Any, Any]:
    """Log in and start a command."""
    connection = await _connect(ssh, device, shown)
    try:
        starting = connection.create_process(command, encoding=None)
        return connection, await asyncio.wait_for(starting, device.connect_limit_s)
    except BaseException:
        connection.abort()
        raise


async def _connect(ssh: Any, device: Ssh, shown: list[Any]) -> Any:
    """Log in; the host key that the device shows, where it is not among the known ones, is put into ``shown``."""

    class Client(ssh.SSHClient):  # type: ignore[misc]
        def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
            shown.append(key)
            return device.fingerprint is not None and key.get_fingerprint() == device.fingerprint

    options: dict[str, Any] = {}
    if device.user is not None:
        options["username"] = device.user
    if device.port is not None:
        options["port"] = device.port
    if device.key is not None:
        options["client_keys"] = [str(device.key)]
    if device.fingerprint is not None:
        options["known_hosts"] = ([], [], [])  # anything that is empty would be the user's own file
    elif device.known_hosts is not None:
        options["known_hosts"] = str(device.known_hosts)
    connection, _ = await ssh.create_connection(
        Client,
        device.host,
        preferred_auth="publickey",
        password_auth=False,
        kbdint_auth=False,
        gss_auth=False,
        connect_timeout=device.connect_limit_s,
        keepalive_interval=_ALIVE_S,
        keepalive_count_max=_ALIVE_COUNT,
        **options,
    )
    return connection


def _refusal(ssh: Any, device: Ssh, error: BaseException, shown: Sequence[Any]) -> str:
    """Why the device was not reached, in words, and what to do."""
    at = f"{device.host} port {device.port or 22}"
    if isinstance(error, ssh.HostKeyNotVerifiable) or (shown and isinstance(error, ssh.KeyExchangeFailed)):
        return _unknown_key(ssh, device, shown)
    if isinstance(error, ssh.PermissionDenied):
        key = f"the key {device.key}" if device.key is not None else "a key of ~/.ssh or of the agent"
        return (
            f"{at} did not let {device.user or 'this user'} in by {key}. Add its public half to ~/.ssh/authorized_keys "
            "on the device (ssh-copy-id), or give user=... and key=...; passwords are not used"
        )
    if isinstance(error, ssh.KeyImportError | ssh.KeyEncryptionError):
        return (
            f"the key {device.key or 'in ~/.ssh'} cannot be read: {first_line(error)}. One with a passphrase goes "
            "into the agent (ssh-add), and key=... is left out"
        )
    if isinstance(error, ConnectionRefusedError):
        return f"{at} refused the connection. Start the SSH server of the device, or give its port with port=..."
    if isinstance(error, socket.gaierror):
        return f"there is no host {device.host!r}: {error.strerror}. Give its address with host=..."
    if isinstance(error, TimeoutError) or "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return (
            f"{at} did not answer within {device.connect_limit_s:g} s. Look whether the device is on and in this "
            "network, or give a larger connect_limit_s"
        )
    if isinstance(error, ssh.ChannelOpenError):
        return f"{at} let us in, but started nothing: {first_line(error)}. Allow this user to run commands there"
    if isinstance(error, ValueError) and not isinstance(error, ssh.Error):
        return (
            f"what is known of {device.host} cannot be read: {first_line(error)}. Look at ~/.ssh/config and "
            f"{_known_hosts(device)}"
        )
    if isinstance(error, OSError) and not isinstance(error, ConnectionResetError):
        return f"{at} is not reached: {error.strerror or first_line(error)}. Look whether it is on and in this network"
    path = _known_hosts(device)
    other = f", and whether it still has a host key of the kind that {path} has for it" if _knows(ssh, device) else ""
    return f"{at} broke off before it let us in: {first_line(error)}. Look whether that is an SSH server{other}"


def _unknown_key(ssh: Any, device: Ssh, shown: Sequence[Any]) -> str:
    """Say which host key was shown, and whether another one was expected."""
    told = (
        f"{shown[-1].get_algorithm()} {shown[-1].get_fingerprint()}" if shown else "of a kind that is not known of it"
    )
    on_device = "`ssh-keygen -lf` of /etc/ssh/ssh_host_*_key.pub on the device prints the right ones"
    if device.fingerprint is not None:
        return f"{device.host} shows the host key {told}, not fingerprint={device.fingerprint}. {on_device}"
    path = _known_hosts(device)
    if _knows(ssh, device):
        return (
            f"{device.host} shows the host key {told}, and {path} has another for it: it was set up anew, or something "
            f"else answers in its place. {on_device}; then ssh-keygen -R {device.host} and log in once by ssh"
        )
    return (
        f"the host key of {device.host} is not known: it shows {told}, and {path} has none for it. Log in once by ssh, "
        f"or give fingerprint=...; {on_device}"
    )


def _known_hosts(device: Ssh) -> Path:
    return device.known_hosts or Path("~/.ssh/known_hosts").expanduser()


def _knows(ssh: Any, device: Ssh) -> bool:
    """Whether the file of known hosts has a key for a device."""
    path = _known_hosts(device)
    if device.fingerprint is not None or not path.is_file():
        return False
    port = device.port if device.port not in (None, 22) else None
    return any(ssh.match_known_hosts(str(path), device.host, "", port)[:2])
