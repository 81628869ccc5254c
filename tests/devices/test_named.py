"""Devices by name: what a file of devices may say, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_edge import DeviceEvaluationCallback
from lightning_edge.devices import Local, Ssh
from lightning_edge.devices.named import check_names, named
from lightning_edge.devices.settings import Cool, DeviceSettings, Sustained
from lightning_edge.errors import DeviceError
from lightning_edge.evaluation.on_devices import check_devices

BOARDS = """
pi4:
  class_path: lightning_edge.devices.Ssh
  init_args:
    host: raspberrypi.local
    user: pi
    python: /home/pi/venv/bin/python
fast:
  class_path: lightning_edge.devices.Local
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "devices.yaml"
    path.write_text(text)
    return path


def test_names_are_those_of_the_file(tmp_path: Path) -> None:
    found = named(["fast", "pi4"], written(tmp_path, BOARDS))
    assert list(found) == ["fast", "pi4"]
    assert isinstance(found["fast"], Local)
    board = found["pi4"]
    assert isinstance(board, Ssh)
    assert (board.host, board.user, board.python) == ("raspberrypi.local", "pi", ("/home/pi/venv/bin/python",))


def test_local_needs_no_file_and_may_be_another_one(tmp_path: Path) -> None:
    assert isinstance(named(["local"], tmp_path / "none.yaml")["local"], Local)
    other = "local: {class_path: lightning_edge.devices.Ssh, init_args: {host: bench}}"
    assert isinstance(named(["local"], written(tmp_path, other))["local"], Ssh)


def test_devices_in_person_have_the_name_of_their_host(tmp_path: Path) -> None:
    board = Ssh("fe80::1%eth0")
    assert named([board], tmp_path / "none.yaml") == {"fe80--1-eth0": board}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pi5: 3", "devices.yaml describes no device 'pi4', but pi5. Describe it there by class_path"),
        ("off: 3", "devices.yaml: a name is read as False, not as text; put it in quotes"),
        ("[pi4]", "devices.yaml holds list; write the names"),
        ("", "devices.yaml holds NoneType"),
        ("pi4: [", "devices.yaml: line 1, column 7: expected the node content"),
        ("pi4: !!python/object/apply:os.system [true]", "names no plain value; leave it out"),
        ("pi4: pi@raspberrypi", "pi4: given 'pi@raspberrypi'; describe it by class_path and init_args"),
        ("pi4: {host: a}", "pi4: given \\['host'\\]; describe it by"),
        ("pi4: {class_path: lightning_edge.devices.Ssh, args: 3}", "pi4: given \\['args', 'class_path'\\]"),
        ("pi4: {class_path: lightning_edge.devices.Shh}", "class_path='lightning_edge.devices.Shh' is not found"),
        ("pi4: {class_path: Ssh}", "class_path='Ssh' is not found .*; lightning_edge.devices.Ssh is one"),
        ("pi4: {class_path: 7}", "class_path=7 is not found"),
        ("pi4: {class_path: os.system}", "os.system is no device"),
        ("pi4: {class_path: lightning_edge.devices.Device}", "is no device; give a class made from"),
        (
            "pi4: {class_path: lightning_edge.devices.Ssh}",
            "pi4: missing a required argument: 'host'|missing 1 required",
        ),
        ("pi4: {class_path: lightning_edge.devices.Ssh, init_args: [a]}", "init_args=\\['a'\\]; give settings by name"),
        ("pi4: {class_path: lightning_edge.devices.Ssh, init_args: {hots: a}}", "no setting 'hots'; it has host, user"),
        (
            "pi4: {class_path: lightning_edge.devices.Ssh, init_args: {host: a, password: b}}",
            "no setting 'password' .a key opens a device, and no file holds a password.; it has",
        ),
        (
            "pi4: {class_path: lightning_edge.devices.Ssh, init_args: {host: 'a b'}}",
            "pi4: Ssh.host='a b'.: give the name",
        ),
        (
            "pi4: {class_path: lightning_edge.devices.Ssh, init_args: {host: a, port: x}}",
            "Ssh.port='x'. is not allowed",
        ),
        ("a: " + "x" * 2**20, "devices.yaml has 1,048,579 bytes or more; 262,144 are allowed"),
    ],
)
def test_a_file_that_does_not_describe_the_device(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        named(["pi4"], written(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"there is no file '.*none.yaml', which describes devices by name"):
        named(["pi4"], tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("pi4", "give a list, .pi4."),
        (["pi4", "pi4"], "names 'pi4' twice"),
        (["a/b"], "'a/b' is no name of a device"),
        (["tflite"], "'tflite' is no name of a device; .* none of torch, executorch"),
        (["torch"], "'torch' is no name of a device"),
        ([""], "'' is no name of a device"),
    ],
)
def test_names_that_are_none(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_names(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure": []}, "give a list of one or more of \\['latency', 'accuracy', 'energy'\\]"),
        ({"measure": "latency"}, "give a list"),
        ({"measure": ["speed"]}, "measure=\\['speed'\\] is not allowed"),
        ({"limit_samples": 0}, "limit_samples=0 is not allowed"),
        ({"sustained": "10"}, "sustained='10' is not allowed"),
        ({"cool": 45}, "cool=45 is not allowed; give Cool"),
        ({"energy_seconds": 0.5}, "energy_seconds=0.5 is not allowed; give 1 to 86400"),
        ({"limit_samples": 2.5}, "limit_samples=2.5 is not allowed"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeviceSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("minutes", [0, -1, 1441, float("nan")])
def test_minutes_that_are_not_allowed(minutes: float) -> None:
    with pytest.raises(ValueError, match=r"sustained: minutes=.* is not allowed; give more than 0, and 1440 at most"):
        Sustained(minutes)
    with pytest.raises(ValueError, match=r"cool: minutes=.* is not allowed; give more than 0, and 1440 at most"):
        Cool(45.0, minutes)


def test_degrees_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match=r"cool: below_c=0 is not allowed"):
        Cool(0)


def test_a_recipe_names_devices_and_gives_them_in_person() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DeviceEvaluationCallback, "callback")
    given = {
        "targets": ["onnx"],
        "devices": ["pi4", {"class_path": "lightning_edge.devices.Ssh", "init_args": {"host": "board", "port": 2222}}],
        "on_devices": {
            "measure": ["latency"],
            "limit_samples": 64,
            "sustained": {"minutes": 5},
            "cool": {"below_c": 40},
        },
    }
    callback = parser.instantiate(parser.parse_object({"callback": given})).callback
    name, board = callback.settings.devices
    assert name == "pi4"
    assert isinstance(board, Ssh)
    assert board.port == 2222
    assert callback.settings.on_devices == DeviceSettings(
        measure=["latency"], limit_samples=64, sustained=Sustained(5.0), cool=Cool(40.0)
    )


def test_devices_without_a_file_for_them() -> None:
    callback = DeviceEvaluationCallback(["coreml"], devices=["local"])
    assert check_devices(callback.settings) == ["local runs none of the files of coreml. Add a target, or leave it out"]
