"""What a device says of itself: what it is, how warm and how fast it is, and counters of the energy it takes.

Sent to a device and run there, as `runner` is.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from importlib.util import find_spec
from typing import Any

# Features of x86 CPUs that decide which kernels a runtime takes.
_FEATURES = ("avx_vnni", "avx512_vnni")
_NEEDED = ("numpy", "ai_edge_litert", "onnxruntime", "coremltools")
# How often power is read where there is no counter of energy, seconds.
_POWER_STEP_S = 0.02
# The rail of a Jetson module that everything on it is fed from.
_JETSON_RAIL = "VDD_IN"


def about(root: str = "/") -> dict[str, Any]:
    """Say what this machine is, by what lies in ``proc`` and ``sys`` of ``root``; ``None`` for what is not told."""
    cpu = _fields(_text(root, "proc/cpuinfo"))
    model = _text(root, "proc/device-tree/model").strip("\0\n ") or cpu.get("model name") or cpu.get("Hardware")
    memory = kilobytes(root, "proc/meminfo", "MemTotal")
    flags = cpu.get("flags", "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "model": model,
        "cores": cores,
        "governor": _text(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "memory_bytes": memory,
        "python": platform.python_version(),
        "features": [name for name in _FEATURES if name in flags],
        "missing": [name for name in _NEEDED if find_spec(name) is None],
        **sensors(root),
    }


def sensors(root: str = "/") -> dict[str, Any]:
    """Read the hottest temperature and the fastest core's frequency; ``None`` for what is not told."""
    heat = [value / 1000 for value in _numbers(root, "sys/class/thermal", "thermal_zone", "temp")]
    heat = [value for value in heat if -50 < value < 200]  # a zone that is off tells something else
    clocks = _numbers(root, "sys/devices/system/cpu", "cpu", "cpufreq/scaling_cur_freq")
    return {
        "temperature_c": max(heat, default=None),
        "frequency_mhz": max((value / 1000 for value in clocks), default=None),
    }


def _numbers(root: str, folder: str, prefix: str, name: str) -> list[int]:
    """The whole numbers in the files of this name, in all folders that begin and go on with a number."""
    try:
        places = os.listdir(os.path.join(root, folder))
    except OSError:
        return []
    numbered = [place for place in places if place.startswith(prefix) and place[len(prefix) :].isdigit()]
    texts = [_text(root, os.path.join(folder, place, name)).strip() for place in sorted(numbered)]
    return [int(text) for text in texts if text.lstrip("-").isdigit()]


def _text(root: str, name: str) -> str:
    try:
        with open(os.path.join(root, name), encoding="utf-8", errors="replace") as opened:
            return opened.read(2**16)
    except OSError:
        return ""


def _fields(text: str) -> dict[str, str]:
    """The lines ``name: value``, the first of each name."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def kilobytes(root: str, path: str, name: str) -> int | None:
    """A number of kilobytes in a file of `_fields`, as bytes."""
    words = _fields(_text(root, path)).get(name, "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


class Meter:
    """Energy that this machine takes from here on; a counter that it has, never an estimate.

    Intel's and AMD's RAPL counts the energy of the CPU's packages, and only root may read it. The INA3221 of a Jetson
    module tells the power of all that is on it, which is read 50 times a second and added up.

    Attributes:
        source: What tells it, in words; why nothing does where there is none.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._joules = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._zones, refused = _rapl(root)
        self._power = None if self._zones else _jetson(root)
        if self._zones:
            self.source: str = "RAPL, " + " and ".join(name for name, _, _ in self._zones.values())
        elif self._power:
            self.source = f"INA3221, {_JETSON_RAIL}, {1 / _POWER_STEP_S:.0f} readings a second"
        else:
            self.source = refused or "the device has no counter that is known (RAPL, INA3221 of a Jetson)"
        self._last = {zone: start for zone, (_, start, _) in self._zones.items()}
        if self._power:
            self._thread = threading.Thread(target=self._add_up, daemon=True)
            self._thread.start()

    def joules(self) -> float | None:
        """Joules since the beginning; ``None`` where nothing tells."""
        for zone, (_, _, wraps_at) in self._zones.items():
            now = _number(self._root, f"{zone}/energy_uj")
            if now is None:
                return None
            # The counter begins anew at its end.
            gone = now - self._last[zone]
            self._joules += (gone + wraps_at if gone < 0 else gone) / 1e6
            self._last[zone] = now
        return self._joules if self._zones or self._power else None

    def close(self) -> None:
        """Read no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _add_up(self) -> None:
        before_s, before_w = time.perf_counter(), self._watts()
        while not self._ended.wait(_POWER_STEP_S):
            now_s, now_w = time.perf_counter(), self._watts()
            self._joules += (now_s - before_s) * (before_w + now_w) / 2
            before_s, before_w = now_s, now_w

    def _watts(self) -> float:
        volts, amperes = (_number(self._root, name) or 0 for name in self._power or ())
        return volts * amperes / 1e6  # of thousandths


def _rapl(root: str) -> tuple[dict[str, tuple[str, int, int]], str | None]:
    """The packages that count energy: name, count and where it ends, by folder; and why one cannot be read."""
    found: dict[str, tuple[str, int, int]] = {}
    refused = None
    folder = "sys/class/powercap"
    for number in range(64):
        zone = f"{folder}/intel-rapl:{number}"
        name = _text(root, f"{zone}/name").strip()
        if not name.startswith("package"):
            continue
        start = _number(root, f"{zone}/energy_uj")
        if start is None:
            refused = f"the counter of RAPL ({name}) cannot be read: let the user read energy_uj in /{zone}, or be root"
        else:
            found[zone] = (name, start, _number(root, f"{zone}/max_energy_range_uj") or 0)
    return ({}, refused) if refused else (found, None)


def _jetson(root: str) -> tuple[str, str] | None:
    """The files with millivolts and milliamperes of a Jetson's main rail."""
    for number in range(64):
        monitor = f"sys/class/hwmon/hwmon{number}"
        if _text(root, f"{monitor}/name").strip() != "ina3221":
            continue
        for channel in range(1, 4):
            files = (f"{monitor}/in{channel}_input", f"{monitor}/curr{channel}_input")
            if _text(root, f"{monitor}/in{channel}_label").strip() == _JETSON_RAIL and all(
                _number(root, name) is not None for name in files
            ):
                return files
    return None


def _number(root: str, name: str) -> int | None:
    text = _text(root, name).strip()
    return int(text) if text.isdigit() else None
