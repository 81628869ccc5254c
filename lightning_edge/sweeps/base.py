"""The configuration that a sweep varies: where its settings are, and the configuration of one trial."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from lightning_edge.errors import SweepError

ARTIFACTS = "artifacts"
_COMPRESSION, _EVALUATION = "EdgeCompressionCallback", "DeviceEvaluationCallback"
# By phase and argument: the value that leaves the network as it is, so that the phase is not needed.
_OFF: dict[tuple[str, str], float] = {
    **{("prune", name): 1.0 for name in ("macs", "params", "size")},
    ("factorize", "size"): 1.0,
    ("factorize", "energy"): 1.0,
    ("sparsify", "sparsity"): 0.0,
}
# Phases by their names in a sweep file: class, and arguments that a base may give it.
_PHASES = {
    "factorize": ("Factorize", "size: 0.5"),
    "prune": ("Prune", "macs: 0.5"),
    "sparsify": ("Sparsify", "sparsity: 0.5"),
    "quantize": ("Quantize", "start: 0.7"),
    "distill": ("Distill", "teacher: {checkpoint: FILE, class_path: CLASS}"),
}
# Arguments that say where a callback or logger writes.
_PLACES = ("dirpath", "save_dir")

Place = tuple[str | int, ...]


class Checker(Protocol):
    """What knows configurations: the command line's own parser, in practice."""

    def resolve(self, *configs: str) -> dict[str, Any]:
        """Give the complete configuration, with all defaults, of recipes or files, later ones merged over earlier ones.

        Raises:
            SweepError: If it is none.
        """

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that `fit` would refuse, as far as it can be told without training.

        Raises:
            SweepError: If it is not allowed.
        """


@dataclass(frozen=True)
class Base:
    """The complete configuration that every trial begins with.

    Attributes:
        name: ``recipe:<name>`` or the path of a file.
        config: The configuration, with all defaults.

    Raises:
        SweepError: If it has no DeviceEvaluationCallback, whose report is what a trial gives.
    """

    name: str
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        found = [callback for callback in _callbacks(self.config) if _class_name(callback) == _EVALUATION]
        if len(found) != 1:
            raise SweepError(
                f"base: {self.name} has {len(found) or 'no'} {_EVALUATION}{'s' if found else ''}; a sweep compares the "
                f"files of its report, so give it one, with the targets you want"
            )

    @property
    def targets(self) -> list[str]:
        """Names of the targets that it exports to."""
        return list(_arguments(_evaluation(self.config)).get("targets") or ())

    @property
    def metrics(self) -> list[str] | None:
        """Names of the metrics where the configuration lists them; ``None`` where the module logs them."""
        given = _arguments(_evaluation(self.config)).get("metrics")
        return None if not given else list(given)

    @property
    def makes_int8(self) -> bool:
        """Whether it makes int8 files, in training or after it."""
        return "quantize" in self.phases or bool(_arguments(_evaluation(self.config)).get("calibration_batches"))

    @property
    def phases(self) -> list[str]:
        """Names of its phases: their classes, in lower case."""
        return [name for name, _ in _phases(self.config)]

    @property
    def seed(self) -> int:
        """The seed it sets, 0 where it sets none of its own."""
        given = self.config.get("seed_everything")
        return given if isinstance(given, int) and not isinstance(given, bool) else 0

    def place(self, key: str) -> Place:
        """Find where a setting of a sweep is in the configuration.

        Args:
            key: The name of the setting: ``<phase>.<argument>``, or the keys of the configuration with dots between.

        Raises:
            SweepError: If there is neither such a phase nor such a key.
        """
        head, *rest = key.split(".")
        for name, place in _phases(self.config):
            if name == head:
                if not rest:
                    raise SweepError(f"space: {key}: name the argument too, such as {key}.start")
                return (*place, "init_args", *rest)
        if head in _PHASES:
            raise SweepError(f"space: {key}: {self._without_phase(*key.split('.', 1))}")
        if head not in self.config:
            known = [*self.phases, *self.config]
            close = get_close_matches(head, known, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise SweepError(
                f"space: {key}: {self.name} has no phase and no key {head!r}.{meant} "
                f"Phases: {', '.join(self.phases) or 'none'}; keys: {', '.join(self.config)}"
            )
        return tuple(int(part) if part.isdecimal() else part for part in (head, *rest))

    def _without_phase(self, head: str, argument: str = "") -> str:
        """Say that the base has no such phase, and what to add so that it has."""
        name, arguments = _PHASES[head]
        # Of arguments of which one is to be given, the one that the space varies.
        arguments = f"{argument}: 0.5" if (head, argument) in _OFF else arguments
        phase = [f"- class_path: lightning_edge.{name}", f"  init_args: {{{arguments}}}"]
        if any(_class_name(callback) == _COMPRESSION for callback in _callbacks(self.config)):
            where = f"Add it to the phases of its {_COMPRESSION}"
            lines = ["phases:", *(f"  {line}" for line in phase)]
        else:
            where = "Add to the callbacks of its trainer"
            lines = [
                f"- class_path: lightning_edge.{_COMPRESSION}",
                "  init_args:",
                "    phases:",
                *(f"      {line}" for line in phase),
            ]
        told = "\n".join(f"    {line}" for line in lines)
        return f"{self.name} has no {name} phase, which the space varies. {where}:\n{told}"

    def check_keys(self, keys: Iterable[str], seeds: int) -> None:
        """Refuse settings that do not exist, that mean the same, or that the sweep itself sets.

        Raises:
            SweepError: Naming them.
        """
        own: dict[str, Place] = {
            "the folder of a trial": ("trainer", "default_root_dir"),
            "the folder of its files": (*self._evaluation_place(), "init_args", "dirpath"),
        }
        if seeds > 1:
            own["the seeds of a trial"] = ("seed_everything",)
        taken: dict[str, Place] = {}
        for key in keys:
            place = self.place(key)
            for name, other in own.items():
                if _within(place, other):
                    raise SweepError(f"space: {key}: a sweep sets {name} itself; leave it out")
            for name, other in taken.items():
                if _within(place, other):
                    raise SweepError(f"space: {name} and {key} set the same key; give one of them")
            taken[key] = place

    def configuration(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Give the configuration with settings in it; a phase that a value turns off is left out.

        Args:
            settings: Values by the names of the space.

        Raises:
            SweepError: If a setting has no place there.
        """
        config: dict[str, Any] = copy.deepcopy(dict(self.config))
        for key, value in settings.items():
            _put(config, self.place(key), copy.deepcopy(value), key)
        phases = _phases(config)
        off = {
            key.split(".")[0]
            for key, value in settings.items()
            if key.split(".")[0] in self.phases and _is_off(key, value)
        }
        for name, place in reversed(phases):
            if name in off:
                _at(config, place[:-1]).pop(place[-1])
        if phases and not _phases(config):
            # The callback refuses to be there for nothing.
            config["trainer"]["callbacks"] = [
                callback for callback in _callbacks(config) if _class_name(callback) != _COMPRESSION
            ]
        return config

    def _evaluation_place(self) -> Place:
        callbacks = _callbacks(self.config)
        number = next(number for number, callback in enumerate(callbacks) if _class_name(callback) == _EVALUATION)
        single = not isinstance(self.config["trainer"]["callbacks"], list)
        return ("trainer", "callbacks") if single else ("trainer", "callbacks", number)


def in_folder(config: Mapping[str, Any], folder: Path, seed: int | None = None) -> dict[str, Any]:
    """Point everything that a training writes into a folder.

    Args:
        config: A complete configuration.
        folder: The folder; files and report come into ``artifacts`` in it.
        seed: The seed to set; ``None``: as the configuration has it.
    """
    placed: dict[str, Any] = copy.deepcopy(dict(config))
    trainer = placed["trainer"]
    trainer["default_root_dir"] = str(folder)
    loggers = trainer.get("logger")
    for owner in (*_callbacks(placed), *(loggers if isinstance(loggers, list) else [loggers])):
        arguments = _arguments(owner)
        for name in _PLACES:
            if isinstance(arguments.get(name), str):
                arguments[name] = str(folder / Path(arguments[name]).name)
    _arguments(_evaluation(placed))["dirpath"] = str(folder / ARTIFACTS)
    if seed is not None:
        placed["seed_everything"] = seed
    return placed


def without_edge_callbacks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a configuration that only trains: without compression and without files."""
    alone: dict[str, Any] = copy.deepcopy(dict(config))
    kept = [callback for callback in _callbacks(alone) if _class_name(callback) not in (_COMPRESSION, _EVALUATION)]
    alone["trainer"]["callbacks"] = kept
    return alone


def with_callback(
    config: Mapping[str, Any], class_path: str, arguments: Mapping[str, Any], *, first: bool = False
) -> dict[str, Any]:
    """Give a configuration with one callback more, behind all others or in front of them."""
    more: dict[str, Any] = copy.deepcopy(dict(config))
    added = [{"class_path": class_path, "init_args": dict(arguments)}]
    given = _callbacks(more)
    more["trainer"]["callbacks"] = [*added, *given] if first else [*given, *added]
    return more


def _evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    return next(callback for callback in _callbacks(config) if _class_name(callback) == _EVALUATION)


def _callbacks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    trainer = config.get("trainer")
    given = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    return [entry for entry in (given if isinstance(given, list) else [given]) if isinstance(entry, dict)]


def _phases(config: Mapping[str, Any]) -> list[tuple[str, Place]]:
    """Name and place of each phase, in order."""
    found: list[tuple[str, Place]] = []
    callbacks = config.get("trainer", {}).get("callbacks")
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    for number, callback in enumerate(listed):
        if isinstance(callback, dict) and _class_name(callback) == _COMPRESSION:
            place: Place = ("trainer", "callbacks", *((number,) if isinstance(callbacks, list) else ()))
            phases = _arguments(callback).get("phases") or []
            found += [
                (_class_name(phase).lower(), (*place, "init_args", "phases", index))
                for index, phase in enumerate(phases)
            ]
    return found


def _arguments(owner: Any) -> dict[str, Any]:
    return owner.setdefault("init_args", {}) if isinstance(owner, dict) and "class_path" in owner else {}


def _class_name(owner: Any) -> str:
    path = owner.get("class_path", "") if isinstance(owner, Mapping) else owner
    return str(path).rpartition(".")[2]


def _is_off(key: str, value: Any) -> bool:
    phase, _, argument = key.partition(".")
    off = _OFF.get((phase, argument))
    return off is not None and not isinstance(value, bool) and isinstance(value, int | float) and value == off


def _within(one: Place, other: Place) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _at(config: Any, place: Place) -> Any:
    for part in place:
        config = config[part]
    return config


def _put(config: Any, place: Place, value: Any, key: str) -> None:
    for part in place[:-1]:
        if isinstance(config, list) and isinstance(part, int) and part < len(config):
            config = config[part]
        elif isinstance(config, dict):
            if not isinstance(config.get(str(part)), dict | list):
                config[str(part)] = {}
            config = config[str(part)]
        else:
            raise SweepError(f"space: {key}: there is no {part!r} at that place of the configuration")
    last = place[-1]
    if isinstance(config, dict):
        config[str(last)] = value
    elif isinstance(config, list) and isinstance(last, int) and last < len(config):
        config[last] = value
    else:
        raise SweepError(f"space: {key}: there is no {last!r} at that place of the configuration")
