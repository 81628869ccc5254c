"""The study: which trials there are, who trains which, and what came of them."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lightning_edge.errors import SweepError, require
from lightning_edge.locks import Lock
from lightning_edge.sweeps.definition import Sweep
from lightning_edge.sweeps.front import Status, TrialRecord, with_front
from lightning_edge.sweeps.locks import held, take
from lightning_edge.sweeps.samplers import EXTRA, distributions, to_settings, to_stored
from lightning_edge.sweeps.space import combinations, count
from lightning_edge.sweeps.storage import FOLDER_ID, LOCK, give_back, open_study
from lightning_edge.sweeps.strict_yaml import read_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# So often a sampler may choose what was trained already, before something else is chosen for it.
_MOST_REPEATS = 10
# A trial that nobody says anything of for so long, from its first moment on, was never begun.
_NEVER_BEGUN = timedelta(minutes=10)
_SILENT = "its worker was not heard of any more"


@dataclass
class Claim:
    """A trial that this process trains, and nobody else.

    Attributes:
        number: Its number in the study.
        settings: Values by the names of the space.
        folder: Where it is trained.
        lock: What keeps others from it.
        resumed: Whether somebody else began with it.
    """

    number: int
    settings: dict[str, Any]
    folder: Path
    lock: Lock
    resumed: bool


@dataclass(frozen=True)
class Result:
    """What came of a trial.

    Attributes:
        values: Its figures, by name, objectives and constraints.
        spread: Their standard deviation over seeds, if there are several.
        seconds: How long it took.
        url: Where its run of Weights & Biases is.
    """

    values: Mapping[str, float]
    spread: Mapping[str, float] | None
    seconds: float
    url: str | None = None


@final
class Study:
    """A sweep's study in its storage, and its folder on this machine.

    Args:
        sweep: The sweep.
        folder: Its folder.
        url: A database, or ``None`` for a journal in the folder.

    Attributes:
        base_changed: Whether the base was another when the study began.

    Raises:
        SweepError: If the folder or the study is that of another sweep, or the storage cannot be reached.
    """

    def __init__(self, sweep: Sweep, folder: Path, url: str | None = None) -> None:
        self.sweep, self.folder = sweep, folder
        self._optuna = require("optuna", EXTRA)
        self._states = self._optuna.trial.TrialState
        self._study, self._storage = open_study(sweep.definition, folder, url)
        self._shared = url is not None
        self._id = read_text(folder / FOLDER_ID).strip()
        self._space = sweep.definition.space
        self._distributions = distributions(self._space)
        with held(folder / LOCK):
            self._check_trial_folders()
            self.base_changed = self._note_base()
            self._list_grid()

    @property
    def identifier(self) -> str:
        """What tells this folder from any other."""
        return self._id

    def claim(self) -> Claim | None:
        """Take a trial that was left behind, or begin a new one; ``None`` if there is none to take now."""
        with held(self.folder / LOCK):
            if self._shared:
                self._give_back_silent()
            return self._left_behind() or self._begin()

    def unfinished(self) -> int:
        """Count the trials that others train now."""
        states = (self._states.RUNNING, self._states.WAITING)
        return sum(trial.state in states for trial in self._counted(self._trials(), waiting=True))

    def beat(self, number: int) -> None:
        """Say that a trial is still being trained, where others cannot see its lock."""
        if self._shared:
            self._storage.record_heartbeat(self._identifier(number))

    def complete(self, claim: Claim, result: Result) -> bool:
        """Record what a trial gave; whether it was still wanted."""
        trial = self._trial(claim.number)
        if trial is None:
            return False
        names = [objective.figure.name for objective in self.sweep.objectives]
        self._keep(trial, seconds=result.seconds, spread=result.spread and dict(result.spread), url=result.url)
        # Constraints and attributes before the values: a trial that was told cannot be changed.
        trial.set_user_attr("measured", dict(result.values))
        for constraint in self.sweep.constraints:
            name = constraint.figure.name
            trial.set_constraint(name, result.values[name] - constraint.limit)
        self._study.tell(trial, [result.values[name] for name in names])
        return True

    def fail(self, claim: Claim, reason: str, seconds: float, url: str | None = None) -> bool:
        """Record why a trial gave nothing; whether it was still wanted."""
        return self._end(claim, reason, seconds, url, self._states.FAIL)

    def stop(self, claim: Claim, reason: str, seconds: float, url: str | None = None) -> bool:
        """Record why a trial was ended before its time; whether it was still wanted."""
        return self._end(claim, reason, seconds, url, self._states.PRUNED)

    def retry_failed(self) -> int:
        """Put the settings of all failed trials back, to be trained once more; returns how many."""
        with held(self.folder / LOCK):
            failed = [trial for trial in self._counted(self._trials()) if trial.state == self._states.FAIL]
            for trial in failed:
                give_back(self._study, trial)
        return len(failed)

    def records(self) -> list[TrialRecord]:
        """Give what is known of each trial, in order, those on the Pareto front marked."""
        found = [self._record(trial) for trial in self._counted(self._trials())]
        return with_front(found, self.sweep.definition.objectives)

    def _end(self, claim: Claim, reason: str, seconds: float, url: str | None, state: Any) -> bool:
        trial = self._trial(claim.number)
        if trial is None:
            return False
        self._keep(trial, seconds=seconds, reason=reason, url=url)
        self._study.tell(trial, state=state)
        return True

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        attributes = trial.user_attrs
        states = self._states
        statuses: dict[Any, Status] = {
            states.COMPLETE: "complete",
            states.PRUNED: "ended early",
            states.FAIL: "failed",
        }
        status = statuses.get(trial.state, "running")
        measured = attributes.get("measured") or {}
        done = status == "complete"
        limits = [constraint for constraint in self.sweep.constraints if done]
        names = [objective.figure.name for objective in self.sweep.objectives]
        begun = trial.datetime_start
        running = 0.0 if begun is None else (datetime.now() - begun).total_seconds()
        return TrialRecord(
            number=trial.number,
            status=status,
            settings=to_settings(self._space, trial.params),
            values={name: measured[name] for name in names} if done else {},
            spread=attributes.get("spread") if done else None,
            feasible=done and all(measured[limit.figure.name] <= limit.limit for limit in limits),
            front=False,
            folder=folder_name(trial.number),
            reason=attributes.get("reason", _SILENT if status == "failed" else None),
            seconds=float(attributes.get("seconds", running)),
            url=attributes.get("url"),
            limited={limit.figure.name: measured[limit.figure.name] for limit in limits},
        )

    def _trials(self) -> Sequence[FrozenTrial]:
        trials: Sequence[FrozenTrial] = self._study.get_trials(deepcopy=False)
        return trials

    def _counted(self, trials: Sequence[FrozenTrial], waiting: bool = False) -> list[FrozenTrial]:
        """Leave out what is not begun, was one too many, or was given back and began anew under another number."""
        replaced = {trial.user_attrs.get("retry_of") for trial in trials}
        return [
            trial
            for trial in trials
            if (waiting or trial.state != self._states.WAITING)
            and not trial.user_attrs.get("surplus")
            and trial.number not in replaced
        ]

    def _check_trial_folders(self) -> None:
        """Refuse a folder with trials that the study knows nothing of: they would be overwritten."""
        own = {trial.number for trial in self._trials() if trial.user_attrs.get("folder") in (None, self._id)}
        known = {folder_name(number) for number in own}
        foreign = sorted(path.name for path in self.folder.glob("trial-*") if path.name not in known)
        if foreign:
            raise SweepError(
                f"{self.folder / foreign[0]} is of a study in another storage. Give the --storage that the sweep began "
                "with (none: the journal in its folder), or another --folder"
            )

    def _note_base(self) -> bool:
        """Keep what the base is in the study; whether it was another when the study began."""
        digest = hashlib.sha256(json.dumps(self.sweep.base.config, sort_keys=True, default=str).encode()).hexdigest()
        known = self._study.user_attrs.get("base_sha256")
        if known is None:
            self._study.set_user_attr("base_sha256", digest)
        return known not in (None, digest)

    def _list_grid(self) -> None:
        """Line up the trials of a grid that are not there yet."""
        if self.sweep.definition.sampler != "grid":
            return
        known = {self._key(trial) for trial in self._trials() if not trial.user_attrs.get("surplus")}
        for settings in self.sweep.grid():
            if self.sweep.settings_key(settings) not in known:
                self._study.enqueue_trial(to_stored(self._space, settings))

    def _key(self, trial: FrozenTrial) -> str:
        params = trial.params or trial.system_attrs.get("fixed_params", {})
        return self.sweep.settings_key(to_settings(self._space, params))

    def _left_behind(self) -> Claim | None:
        """Take a trial that a process of this folder began and no process trains any more."""
        for trial in self._counted(self._trials()):
            if trial.state != self._states.RUNNING:
                continue
            owner = trial.user_attrs.get("folder")
            if owner is None and self._shared:
                begun = trial.datetime_start
                if begun is not None and datetime.now() - begun > _NEVER_BEGUN:
                    self._drop(trial.number)
                continue
            if owner not in (None, self._id):
                continue
            if set(trial.params) != set(self._space):
                self._drop(trial.number)
                continue
            if claim := self._locked(trial.number, to_settings(self._space, trial.params), resumed=True):
                self.beat(trial.number)
                return claim
        return None

    def _begin(self) -> Claim | None:
        for _ in range(_MOST_REPEATS + 1):
            trials = self._trials()
            waiting = any(trial.state == self._states.WAITING for trial in trials)
            full = len(self._counted(trials)) >= self.sweep.definition.trials
            if not waiting and (full or self.sweep.definition.sampler == "grid"):
                return None
            if claim := self._ask():
                return claim
        if not self._line_up_untried():
            return None
        return self._ask()

    def _ask(self) -> Claim | None:
        with warnings.catch_warnings():
            # Optuna says that heartbeats are for its own loop; `beat` sends them here.
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            trial = self._study.ask(self._distributions)
        # Another machine may have asked in the same moment: the one with the lower number goes on.
        earlier = [other for other in self._counted(self._trials()) if other.number < trial.number]
        settings = to_settings(self._space, trial.params)
        # Of one that is still being asked for, the settings are not all there.
        known = {self._key(other) for other in earlier if set(other.params) == set(self._space)}
        repeated = self.sweep.settings_key(settings) in known
        if len(earlier) >= self.sweep.definition.trials or repeated:
            self._drop(trial.number)
            return None
        trial.set_user_attr("folder", self._id)
        self.beat(trial.number)
        return self._locked(trial.number, settings, resumed=False)

    def _line_up_untried(self) -> bool:
        """Choose at random of what was not tried, where a sampler only repeats itself; whether there was anything."""
        total = count(self._space)
        if total is None or total > 10_000:
            return False
        known = {self._key(trial) for trial in self._counted(self._trials(), waiting=True)}
        untried = [s for s in combinations(self._space) if self.sweep.settings_key(s) not in known]
        if untried:
            self._study.enqueue_trial(to_stored(self._space, random.choice(untried)))
        return bool(untried)

    def _drop(self, number: int) -> None:
        """End a trial that nobody will train, so that it does not count."""
        trial = self._trial(number)
        if trial is not None:
            trial.set_user_attr("surplus", True)
            self._study.tell(trial, state=self._states.FAIL)

    def _locked(self, number: int, settings: dict[str, Any], resumed: bool) -> Claim | None:
        folder = self.folder / folder_name(number)
        folder.mkdir(exist_ok=True)
        lock = take(folder / "lock")
        return None if lock is None else Claim(number, settings, folder, lock, resumed)

    def _give_back_silent(self) -> None:
        """Give back what machines have begun that say nothing any more."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optuna.storages.fail_stale_trials(self._study)

    def _trial(self, number: int) -> Any:
        """Give a trial that runs, to be told of; ``None`` if it was given back or told of by another."""
        identifier = self._identifier(number)
        if self._storage.get_trial(identifier).state != self._states.RUNNING:
            return None
        return self._optuna.trial.Trial(self._study, identifier)

    def _identifier(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        return int(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _keep(self, trial: Any, **attributes: Any) -> None:
        for name, value in attributes.items():
            trial.set_user_attr(name, value)


def folder_name(number: int) -> str:
    """Name the folder of a trial."""
    return f"trial-{number:04d}"
