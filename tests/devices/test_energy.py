"""Energy: counters of a system that a test lays out, a meter that a test plays, and what is made of their figures."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_edge.devices import Local, sensors
from lightning_edge.devices.meter import Reading, read_meter
from lightning_edge.devices.remote import Spent
from lightning_edge.errors import DeviceError
from lightning_edge.evaluation.on_device import energy_of
from lightning_edge.reporting.budget import Budget
from lightning_edge.reporting.devices import DeviceRow, described
from lightning_edge.reporting.report import Row
from lightning_edge.reporting.rows import judged

Write = Callable[[str, object], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the system in the test's folder."""

    def written(name: str, text: object) -> None:
        path = tmp_path / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    return written


def test_packages_of_rapl_are_added_up_and_begin_anew_at_their_end(tmp_path: Path, write: Write) -> None:
    for number, (name, count) in enumerate([("package-0", 900), ("package-1", 50), ("psys", 7)]):
        write(f"powercap/intel-rapl:{number}/name", name)
        write(f"powercap/intel-rapl:{number}/energy_uj", count)
        write(f"powercap/intel-rapl:{number}/max_energy_range_uj", 1000)
    write("powercap/intel-rapl:0:0/name", "core")  # a part of package 0
    meter = sensors.Meter(str(tmp_path))
    assert meter.source == "RAPL, package-0 and package-1"
    write("powercap/intel-rapl:0/energy_uj", 100)
    write("powercap/intel-rapl:1/energy_uj", 80)
    assert meter.joules() == pytest.approx(230e-6)
    write("powercap/intel-rapl:1/energy_uj", 90)
    assert meter.joules() == pytest.approx(240e-6)
    meter.close()


def test_a_counter_that_may_not_be_read_is_none(tmp_path: Path, write: Write) -> None:
    write("powercap/intel-rapl:0/name", "package-0")
    meter = sensors.Meter(str(tmp_path))
    assert meter.joules() is None
    assert "RAPL (package-0) cannot be read: let the user read energy_uj" in meter.source


def test_without_a_counter_there_is_no_energy(tmp_path: Path) -> None:
    meter = sensors.Meter(str(tmp_path))
    assert meter.joules() is None
    assert meter.source.startswith("the device has no counter that is known")


def test_the_power_of_a_jetson_is_added_up(tmp_path: Path, write: Write) -> None:
    write("hwmon/hwmon0/name", "cpu_thermal")
    write("hwmon/hwmon3/name", "ina3221")
    for channel, (label, millivolts, milliamperes) in enumerate([("VDD_CPU", 5000, 1), ("VDD_IN", 5000, 2000)], 1):
        write(f"hwmon/hwmon3/in{channel}_label", label)
        write(f"hwmon/hwmon3/in{channel}_input", millivolts)
        write(f"hwmon/hwmon3/curr{channel}_input", milliamperes)
    meter, start = sensors.Meter(str(tmp_path)), time.perf_counter()
    assert meter.source == "INA3221, VDD_IN, 50 readings a second"
    time.sleep(0.3)
    meter.close()
    joules = meter.joules()
    assert joules is not None
    assert 1.0 < joules <= 10 * (time.perf_counter() - start)  # of 10 W


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_meter_is_a_program_that_prints_joules(tmp_path: Path) -> None:
    meter = program(tmp_path / "meter", 'echo "meter of $1"; echo 12.5')
    assert read_meter([meter, "the board"]) == Reading(12.5, f"the meter that {meter} reads")
    assert Local(meter=[meter, "x"]).energy() == read_meter([meter, "x"])
    assert Local().energy() is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("echo 12 J", "said '12 J'. Let it print the joules"),
        ("echo nan", "said 'nan'"),
        ("echo 5; echo no meter >&2; exit 3", "status 3 and said 'no meter'"),
        ("true", "said 'nothing'"),
    ],
)
def test_a_meter_that_does_not_tell(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DeviceError) as error:
        read_meter([program(tmp_path / "meter", text)])
    assert says in str(error.value)


def test_a_meter_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="meter: there is no program"):
        read_meter([str(tmp_path / "none")])
    for given in ("meter.py", [], ["meter", ""]):
        with pytest.raises(ValueError, match="give a list: a program and its arguments"):
            Local(meter=given)


def test_what_waiting_takes_is_taken_off() -> None:
    energy_mj, note = energy_of(Spent(1, 10.0, 20.0, "RAPL"), Spent(500, 5.0, 15.0, "RAPL"))
    assert energy_mj == pytest.approx(10.0)  # 15 J less 2 W for 5 s, in 500 calls
    assert note == "RAPL: 15 J in 5.0 s of 500 calls, 2 W while it waited"


@pytest.mark.parametrize(
    ("idle", "busy", "says"),
    [
        (Spent(1, 10.0, 20.0, "a plug"), Spent(500, 5.0, 10.0, "a plug"), "Give a larger energy_seconds"),
        (Spent(1, 10.0, 0.0, "a plug"), Spent(500, 5.0, 0.0, "a plug"), "a plug told 0 J in 5.0 s"),
        (Spent(1, 10.0, -1.0, "a plug"), Spent(500, 5.0, 1.0, "a plug"), "Give a larger energy_seconds"),
        (Spent(1, 10.0, None, "no counter"), Spent(500, 5.0, None, "no counter"), "not measured: no counter"),
    ],
)
def test_no_energy_where_the_counter_does_not_tell(idle: Spent, busy: Spent, says: str) -> None:
    energy_mj, note = energy_of(idle, busy)
    assert energy_mj is None
    assert says in note


def test_a_budget_is_held_against_the_device_that_takes_most() -> None:
    row = Row("tflite", "int8", "trained", size_bytes=5)
    devices = [DeviceRow(name, "tflite", "int8", "trained", energy_mj=mj) for name, mj in (("a", 3.0), ("b", 5.0))]
    other = DeviceRow("c", "onnx", "int8", "trained", energy_mj=50.0)
    (found,) = judged([row], Budget(energy_mj=4.0), None, [*devices, other])
    assert found.budget is not None
    assert str(found.budget) == "energy_mj 5 is 1 above 4"
    (found,) = judged([row], Budget(energy_mj=4.0), None, [other])
    assert found.budget is not None
    assert found.budget.status == "not measurable"


def test_the_report_says_where_energy_is_from() -> None:
    row = DeviceRow("a", "tflite", "int8", "trained", energy_mj=3.0, energy_note="RAPL, package-0: 3 J in 1.0 s")
    assert described([row])[1] == "a: tflite int8, energy: 3 mJ an inference; RAPL, package-0: 3 J in 1.0 s"
    assert dict(row.flat()) == {"edge/a/tflite/energy_mj": 3.0}
    row = DeviceRow("a", "tflite", "int8", "trained", energy_note="not measured: no counter")
    assert described([row])[1] == "a: tflite int8, energy: not measured: no counter"
