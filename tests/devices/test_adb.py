"""A phone by adb: a program that stands for `adb` and keeps a transcript leads to this machine. No phone was used."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import batches

from lightning_edge.devices import Adb
from lightning_edge.devices.conversation import Conversation
from lightning_edge.devices.remote import RemoteRunner
from lightning_edge.errors import DeviceError
from lightning_edge.exporters import Artifact

FAKE = """#!{python}
import json, os, sys
given = sys.argv[1:]
with open({transcript!r}, "a") as file:
    file.write(json.dumps(given) + "\\n")
if given[:2] == ["-s", "emulator-5554"]:
    given = given[2:]
if given == ["get-state"]:
    if {state!r} == "device":
        print("device")
    else:
        sys.exit("error: " + {state!r})
elif given == ["shell", "dumpsys", "thermalservice"]:
    print({thermal!r})
elif given == ["shell", "dumpsys", "battery"]:
    print("Current Battery Service state:\\n  level: 80\\n  temperature: 312")
    print({battery!r})
elif given[:2] == ["shell", "-T"] and len(given) == 3:
    os.execv("/bin/sh", ["sh", "-c", given[2]])
else:
    sys.exit("adb: unknown command")
"""
THERMAL = """IsStatusOverride: false
Current temperatures from HAL:
\tTemperature{mValue=38.25, mType=0, mName=CPU0, mStatus=0}
\tTemperature{mValue=41.5, mType=0, mName=CPU4, mStatus=0}
\tTemperature{mValue=55.0, mType=3, mName=skin, mStatus=0}"""


@dataclass
class Phone:
    """The program, what it was asked, and the place of the phone's files."""

    adb: Path
    transcript: Path
    place: Path

    def device(self, **settings: Any) -> Adb:
        given = {"serial": "emulator-5554", "python": sys.executable, "folder": str(self.place), "adb": str(self.adb)}
        return Adb(**{**given, **settings})

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in self.transcript.read_text().splitlines()]


def phone(folder: Path, place: Path, state: str = "device", thermal: str = THERMAL, battery: str = "") -> Phone:
    adb, transcript = folder / "adb", folder / "transcript"
    shown = {"state": state, "thermal": thermal, "battery": battery}
    adb.write_text(FAKE.format(python=sys.executable, transcript=str(transcript), **shown))
    adb.chmod(0o755)
    return Phone(adb, transcript, place)


def test_a_file_on_the_phone_gives_the_bits_of_the_file_here(
    tmp_path: Path, place: Path, files: dict[str, Artifact]
) -> None:
    artifact, fake = files["tflite"], phone(tmp_path, place)
    device = fake.device()
    with RemoteRunner("phone", device, "tflite", artifact.path, artifact.contents, 1, 20.0) as runner:
        sample = artifact.ready(batches("residual")[0].sample().tensors)
        (here,), (there,) = artifact.runner(sample), runner(sample)
        assert torch.equal(here, there)
        times = runner.times(sample, 5)
        assert len(times.ns) == 5
    asked = fake.asked()
    assert asked[0] == ["-s", "emulator-5554", "get-state"]
    assert asked[1][:4] == ["-s", "emulator-5554", "shell", "-T"]
    assert asked[1][4].startswith(f"{sys.executable} -c 'import sys,types;")
    assert asked[2:] == [["-s", "emulator-5554", "shell", "dumpsys", "thermalservice"]] * 2


def test_the_phone_tells_a_temperature_where_its_python_may_not_read_one(tmp_path: Path, place: Path) -> None:
    assert phone(tmp_path, place).device().temperature_c() == 41.5
    assert phone(tmp_path, place, thermal="").device().temperature_c() == 31.2
    assert phone(tmp_path, place).device(serial="other").temperature_c() is None


@pytest.mark.parametrize(
    ("battery", "joules", "source"),
    [
        ("  AC powered: false\n  voltage: 4000\n  Charge counter: 2500000", -36000.0, "charge times voltage"),
        ("  USB powered: true\n  voltage: 4000\n  Charge counter: 2500000", None, "the phone is on power"),
        ("  AC powered: false\n  voltage: 4000", None, "does not tell its charge"),
    ],
)
def test_what_a_battery_has_given(tmp_path: Path, place: Path, battery: str, joules: float | None, source: str) -> None:
    found = phone(tmp_path, place, battery=battery).device().energy()
    assert found.joules == joules
    assert source in found.source


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("device unauthorized.\nThis adb server's ADB_VENDOR_KEYS is not set", "emulator-5554: device unauthorized"),
        ("no devices/emulators found", "no devices/emulators found. Look at"),
        ("offline", "offline"),
    ],
)
def test_a_phone_that_is_not_reached_is_one_error(tmp_path: Path, place: Path, state: str, told: str) -> None:
    with pytest.raises(DeviceError, match=f"phone: adb does not reach .*{told}"):
        Conversation("phone", phone(tmp_path, place, state).device())


def test_there_is_no_adb_or_no_python(tmp_path: Path, place: Path) -> None:
    with pytest.raises(DeviceError, match=r"there is no program '/no/adb'\. Install Android's platform tools"):
        Conversation("phone", Adb(adb="/no/adb"))
    with pytest.raises(DeviceError, match=r"phone: there is no run-as com\.termux /data/.*python3"):
        Conversation("phone", phone(tmp_path, place).device(python=None))


def test_names_are_never_a_line_for_the_phones_shell(tmp_path: Path, place: Path) -> None:
    odd = tmp_path / "a folder; touch $(id)' \"x"
    odd.mkdir()
    with Conversation("phone", phone(tmp_path, place).device(folder=str(odd))):
        assert [found.name.startswith("lightning-edge-") for found in odd.iterdir()] == [True]
    assert list(odd.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"serial": "-e"}, "as `adb devices` lists it"),
        ({"serial": "a b"}, "as `adb devices` lists it"),
        ({"serial": ""}, "as `adb devices` lists it"),
        ({"python": [""]}, "give the path of a Python"),
        ({"adb": ""}, "give the path of the program"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Adb(**settings)
