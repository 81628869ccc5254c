"""Devices by name: what a file of devices describes, and what a configuration gives in person."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_edge.devices.device import Device
from lightning_edge.devices.local import Local
from lightning_edge.errors import DeviceError, EdgeError, first_line
from lightning_edge.exporters.target import TARGETS
from lightning_edge.yaml_files import read_yaml

# A name stands between slashes in the names of metrics, where those of targets stand too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = ("torch", *TARGETS)
_FORM = "class_path and init_args, as for a callback"


def check_names(devices: Sequence[str | Device]) -> None:
    """Refuse what cannot be the name of a device, and a name that is given twice.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    if isinstance(devices, str):
        raise ValueError(f"devices={devices!r}: give a list, [{devices}]")
    names = [device if isinstance(device, str) else device.label for device in devices]
    for name in names:
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise ValueError(
                f"devices={names}: {name!r} is no name of a device; give letters, digits, dots, hyphens and "
                f"underscores, and none of {', '.join(_TAKEN)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"devices={names} names {name!r} twice; give the second one another name in devices.yaml")


def named(devices: Sequence[str | Device], file: str | Path) -> dict[str, Device]:
    """Find the devices of a list, by name.

    ``local`` is this machine, unless the file describes another device of that name.

    Args:
        devices: Names that the file describes, or devices.
        file: A YAML file: under each name the ``class_path`` of a `Device` and its ``init_args``. It is read only where
            there is a name to look for.

    Raises:
        DeviceError: If a name is not described, or what describes it is not allowed.
        ValueError: If the names are not allowed.
    """
    check_names(devices)
    path = Path(file)
    wanted = [device for device in devices if isinstance(device, str)]
    described = _read(path) if [name for name in wanted if name != "local"] or (wanted and path.is_file()) else {}
    found: dict[str, Device] = {}
    for device in devices:
        if isinstance(device, Device):
            found[device.label] = device
        elif device in described:
            found[device] = _built(path, device, described[device])
        elif device == "local":
            found[device] = Local()
        else:
            known = ", ".join(map(str, described)) or "none"
            raise DeviceError(f"{path} describes no device {device!r}, but {known}. Describe it there by {_FORM}")
    return found


def _read(path: Path) -> Mapping[Any, Any]:
    if not path.exists():
        raise DeviceError(f"there is no file {str(path)!r}, which describes devices by name. Write it, or name another")
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise DeviceError(str(error)) from error
    if not isinstance(content, dict):
        raise DeviceError(f"{path} holds {type(content).__name__}; write the names of devices, and under each {_FORM}")
    for name in content:
        if not isinstance(name, str):  # YAML's own idea of `off`, `no` and `1`
            raise DeviceError(f"{path}: a name is read as {name!r}, not as text; put it in quotes")
    return content


def _built(path: Path, name: str, described: Any) -> Device:
    """Make the device that an entry of the file describes."""
    where = f"{path}: {name}"
    if not isinstance(described, dict) or not {"class_path"} <= described.keys() <= {"class_path", "init_args"}:
        given = sorted(map(str, described)) if isinstance(described, dict) else described
        raise DeviceError(f"{where}: given {given!r}; describe it by {_FORM}")
    class_path, settings = described["class_path"], described.get("init_args") or {}
    kind = _class(where, class_path)
    allowed = list(inspect.signature(kind).parameters)
    if not isinstance(settings, dict):
        raise DeviceError(f"{where}: init_args={settings!r}; give settings by name: {', '.join(allowed)}")
    for setting in settings:
        if setting not in allowed:
            said = " (a key opens a device, and no file holds a password)" if setting == "password" else ""
            raise DeviceError(f"{where}: {class_path} has no setting {setting!r}{said}; it has {', '.join(allowed)}")
    try:
        return kind(**settings)
    except EdgeError:
        raise
    except (TypeError, ValueError) as error:
        raise DeviceError(f"{where}: {first_line(error)}") from error


def _class(where: str, class_path: Any) -> type[Device]:
    module, _, name = class_path.rpartition(".") if isinstance(class_path, str) else ("", "", "")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DeviceError(
            f"{where}: class_path={class_path!r} is not found ({first_line(error)}); lightning_edge.devices.Ssh is one"
        ) from error
    if not inspect.isclass(found) or not issubclass(found, Device) or inspect.isabstract(found):
        raise DeviceError(f"{where}: {class_path} is no device; give a class made from lightning_edge.devices.Device")
    return found
