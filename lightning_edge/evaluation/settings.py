"""EvaluationSettings: what an evaluation makes of a trained network, and what its files may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_edge.contents import Precision
from lightning_edge.devices.device import Device
from lightning_edge.devices.named import check_names
from lightning_edge.devices.settings import DeviceSettings
from lightning_edge.evaluation.hooks import EvaluationHook
from lightning_edge.exporters import TARGETS, check_options, options_of
from lightning_edge.exporters.jobs import check_jobs, default_jobs
from lightning_edge.exporters.run.running import Running
from lightning_edge.exporters.verify import schemes
from lightning_edge.exporters.verify.contents import check_share
from lightning_edge.interface import Interface
from lightning_edge.measure import Timing, Tolerance
from lightning_edge.reporting.budget import Budget
from lightning_edge.reporting.monitor import Monitor


@dataclass(frozen=True)
class EvaluationSettings:
    """Which files an evaluation makes, and how it tests, times and judges them.

    Attributes:
        targets: Keys of `exporters.TARGETS`.
        dirpath: Folder for ``<name>-<precision><suffix>``, ``report.json``, ``.md`` and ``.html``, ``manifest.json``.
        options: Options of targets, by target.
        tolerance: How far each file may lie from the network it came from, over the whole split.
        timing: Warm-up, repeats and threads of the latency measurement, and the time limit of a call.
        fp32_files: Whether to export the float network as well.
        monitor: The metric that decides between post-training and trained quantization; ``None``: what the training
            watched, else one whose name tells.
        budget: What each file may cost; see `evaluate.raise_over_budget`.
        max_fallback: Largest share of the multiply-accumulates, 0 to 1, that a file may leave to its runtime's own CPU
            kernels; ``None``: any.
        interface: How the files are called: names, layout, pixels, labels.
        name: First part of each file's name.
        devices: Devices that the files are run on as well, by name or in person.
        on_devices: What is measured there.
        hooks: What is called with each file and with the report when it is written.
        jobs: How many targets are written at once, each in a process of its own; 0: in this process, one by one;
            ``None``: one a core, and in this process where there is one core only.

    Raises:
        ValueError: If a target or one of its options is unknown, ``max_fallback``, ``name`` or ``jobs`` is out of its
            range, or there is a budget's device, and no target's files run there, or it has no delegate that
            ``max_fallback`` could limit.
    """

    targets: Sequence[str]
    dirpath: str | Path = "artifacts"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)
    timing: Timing = field(default_factory=Timing)
    fp32_files: bool = True
    monitor: Monitor | None = None
    budget: Budget | None = None
    max_fallback: float | None = None
    interface: Interface | None = None
    name: str = "model"
    devices: Sequence[str | Device] = ()
    on_devices: DeviceSettings = field(default_factory=DeviceSettings)
    hooks: Sequence[EvaluationHook] = ()
    jobs: int | None = 0

    def __post_init__(self) -> None:
        self._check_types()
        check_targets(self.targets, self.options)
        check_share(self.max_fallback)
        check_jobs(self.jobs)
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} is not the first part of a file's name; dirpath names the folder")
        check_names(self.devices)
        check_board(self.budget, self.targets, self.options, self.max_fallback)

    def _check_types(self) -> None:
        """Refuse plain dicts, which a configuration takes and Python does not."""
        kinds = {"tolerance": Tolerance, "timing": Timing, "budget": Budget, "interface": Interface}
        for name, kind in {**kinds, "on_devices": DeviceSettings}.items():
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"{name}={given!r} is no {kind.__name__}; give {kind.__name__}(...)")

    def for_targets(self, targets: Sequence[str]) -> EvaluationSettings:
        """Copy these settings for other targets, without the options of targets that are left out.

        Raises:
            ValueError: If a target is unknown.
        """
        options = {name: chosen for name, chosen in self.options.items() if name in targets}
        return replace(self, targets=targets, options=options)

    def running(self, target: str, precision: Precision) -> Running:
        """Say how a file is run here: with reference kernels where the budget's device is a microcontroller."""
        board = None if self.budget is None else self.budget.board()
        form = options_of(target, precision, self.options).get("scheme") or precision
        micro = board is not None and board.is_microcontroller and board.runs(target, form)
        return Running(
            self.timing.threads, time_limit_s=self.timing.time_limit_s, kernels="reference" if micro else "delegate"
        )

    @property
    def writing_jobs(self) -> int:
        """How many processes write files at once on this machine; 0 for none but this one."""
        return default_jobs(len(self.targets)) if self.jobs is None else self.jobs

    def tolerance_for(self, scheme: schemes.Scheme | None) -> Tolerance:
        """Give the tolerance for files of a scheme: the scheme's own, unless the user gave another."""
        if scheme is not None and self.tolerance == Tolerance():
            return schemes.tolerance(scheme)
        return self.tolerance


def check_board(
    budget: Budget | None,
    targets: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    max_fallback: float | None = None,
) -> None:
    """Refuse a budget of a device that runs none of the files, or that has no delegate where one is asked for.

    Raises:
        ValueError: Naming what it runs, or the limit.
    """
    board = None if budget is None else budget.board()
    if board is None:
        return
    if not {*targets} & {*board.targets}:
        raise ValueError(
            f"budget: device={board.name!r} runs files of {', '.join(board.targets)}, and targets={list(targets)} has "
            "none of them; add one, or leave the device out"
        )
    if max_fallback is not None and board.is_microcontroller:
        raise ValueError(
            f"budget: device={board.name!r} is a microcontroller, which has no delegate, and "
            f"max_fallback={max_fallback} limits what one leaves to the CPU; leave the limit or the device out"
        )
    for target in board.targets:
        scheme = options.get(target, {}).get("scheme")
        if target in targets and scheme is not None and not board.runs(target, scheme):
            raise ValueError(
                f"budget: device={board.name!r} runs files in {', '.join(board.schemes)}, and options of {target} ask "
                f"for scheme={scheme!r}; leave the scheme or the device out"
            )


def check_targets(targets: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None) -> None:
    """Refuse unknown targets, a target named twice, and options for a target that is not among them.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    allowed = ", ".join(map(repr, TARGETS))
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r}: give a list of one or more of {allowed}")
    for name in targets:
        if name not in TARGETS:
            raise ValueError(f"targets={list(targets)}: {name!r} is not one of {allowed}")
    if len(set(targets)) < len(targets):
        raise ValueError(f"targets={list(targets)} names a target twice")
    for name, chosen in (options or {}).items():
        if name not in targets:
            raise ValueError(f"options are given for {name!r}, which is not one of targets={list(targets)}")
        check_options(name, chosen)
