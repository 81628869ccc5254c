"""Files that were accepted, on the user's devices: how fast they are there, and whether they still compute the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_edge.devices.conversation import Conversation
from lightning_edge.devices.named import named
from lightning_edge.devices.runtimes import RUNTIMES
from lightning_edge.errors import DeviceError, EdgeError
from lightning_edge.evaluation.device_file import DeviceFile
from lightning_edge.evaluation.journal import Journal
from lightning_edge.evaluation.on_device import OnDevice, device_row
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation
from lightning_edge.reporting.devices import DeviceRow, failures
from lightning_edge.reporting.report import Report

_log = logging.getLogger(__name__)


def check_devices(settings: EvaluationSettings) -> list[str]:
    """See before a training whether the devices will do after it: ask each what it is and what it lacks.

    Returns:
        What is wrong, a line each.

    Raises:
        DeviceError: If a device is not described.
    """
    problems = []
    for name, device in named(settings.devices, settings.on_devices.file).items():
        if not device.times and "accuracy" not in settings.on_devices.measure:
            problems.append(f"{name} is emulated: how long it takes says nothing. Add accuracy to measure")
        wanted = [target for target in settings.targets if device.runs(target)]
        if not wanted:
            targets = ", ".join(settings.targets)
            problems.append(f"{name} runs none of the files of {targets}. Add a target, or leave it out")
            continue
        asked_for = [target for target in wanted if target not in device.programs]
        try:
            device.check()
            if not asked_for:
                device.start(["true"]).close()
                continue
            with Conversation(name, device) as asked:
                missing = {*asked.about.missing}
        except EdgeError as error:
            problems.append(str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}")
            continue
        needed = ["numpy", *(RUNTIMES[target][0] for target in asked_for)]
        if lacking := [module for module in needed if module in missing]:
            packages = " ".join(module.replace("_", "-") for module in lacking)
            problems.append(f"{name}: install on the device: {' '.join(device.python)} -m pip install {packages}")
    return problems


def require_devices(settings: EvaluationSettings) -> None:
    """Raise one error with what `check_devices` finds.

    Raises:
        DeviceError: If there is something.
    """
    if problems := check_devices(settings):
        raise DeviceError("\n".join(problems))


def left_out(settings: EvaluationSettings) -> list[str]:
    """Say which targets of an evaluation do not run on which devices."""
    try:
        devices = named(settings.devices, settings.on_devices.file)
    except EdgeError:  # they are reported where they are used
        return []
    lacking = {
        name: [target for target in settings.targets if not device.runs(target)] for name, device in devices.items()
    }
    return [f"{name} does not run files of {' and '.join(others)}." for name, others in lacking.items() if others]


def run_on_devices(
    files: Sequence[DeviceFile],
    validation: Validation,
    settings: EvaluationSettings,
    tell: Callable[[str], None] = _log.info,
    journal: Journal | None = None,
) -> tuple[DeviceRow, ...]:
    """Run every file on every device. One that fails is a row with an error, and does not stop the others.

    Args:
        files: The files; a device passes over those of targets that it does not run.
        validation: The loop that gives the metrics.
        settings: The devices, what is measured there, and how calls are timed.
        tell: Is called with a line before each step.
        journal: What was measured before the run broke off; none if not given.
    """
    rows: list[DeviceRow] = []
    try:
        devices = named(settings.devices, settings.on_devices.file)
    except EdgeError as error:  # they were there before the training: it is not lost for that
        names = [device if isinstance(device, str) else device.label for device in settings.devices]
        return tuple(device_row(name, file.row, str(error)) for name in names for file in files)
    journal = journal or Journal(settings)
    if devices and files:
        journal.begin()
    for name, device in devices.items():
        refused: str | None = None
        for file in files:
            if not device.runs(file.row.target):
                continue
            measured = OnDevice(name, device, file, validation, settings, journal)
            if refused is None:
                tell(f"{'Going on with' if journal.has(measured.row) else 'Running'} {measured.row.label}")
                refused = measured.run()
            else:
                measured.row = replace(measured.row, error=refused)
            rows.append(measured.row)
    if all(row.error is None for row in rows):
        journal.remove()
    return tuple(rows)


def raise_device_failures(report: Report) -> None:
    """Raise one error that names every file that did not run on a device as it should.

    Raises:
        DeviceError: If there is one.
    """
    if failed := failures(report.devices):
        told = (
            "not everything ran on the devices; the report has the rest, and `lightning-edge evaluate` with --resume "
            "measures what is missing:"
        )
        raise DeviceError("\n  ".join([told, *failed]))
