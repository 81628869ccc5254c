"""A sweep in Weights & Biases: a run for each trial, in one group, and one run with the table of all of them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_edge.errors import check_installed
from lightning_edge.sweeps.front import Front, TrialRecord
from lightning_edge.sweeps.page import PAGE
from lightning_edge.user_warnings import warn

_LOGGER = "lightning_edge.OfflineFallbackWandbLogger"
# What the run with the table takes over from the trials' logger.
_SHARED = ("project", "entity", "offline", "mode")


def logger_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the WandbLogger of a configuration."""
    given = config["trainer"].get("logger")
    listed = given if isinstance(given, list) else [given]
    return next((entry for entry in listed if _is_wandb(entry)), None)


def with_logger(config: Mapping[str, Any], project: str) -> dict[str, Any]:
    """Give a configuration that has a WandbLogger: its own, or one more, which goes offline where no server answers.

    Args:
        config: A complete configuration.
        project: The project, if it has none.

    Raises:
        MissingExtraError: If wandb is not installed.
    """
    check_installed("wandb", "wandb")
    found: dict[str, Any] = copy.deepcopy(dict(config))
    if logger_of(found) is None:
        given = found["trainer"].get("logger")
        others = given if isinstance(given, list) else [given] if isinstance(given, dict) else []
        found["trainer"]["logger"] = [
            *others,
            {"class_path": _LOGGER, "init_args": {"project": project, "save_dir": "."}},
        ]
    return found


def as_trial(config: Mapping[str, Any], settings: Mapping[str, Any], study: str, name: str) -> dict[str, Any]:
    """Name a trial's run, put it into the group of its study, and give it its settings as config.

    Args:
        config: A configuration, which is given back as it is where it has no WandbLogger.
        settings: The trial's settings.
        study: The study.
        name: The trial.
    """
    found: dict[str, Any] = copy.deepcopy(dict(config))
    if (logger := logger_of(found)) is not None:
        arguments = logger.setdefault("init_args", {})
        own = arguments.get("config") or {}
        arguments |= {"name": name, "group": study, "job_type": "trial", "config": {**own, **settings}}
    return found


def log_front(front: Front, logger: Mapping[str, Any], folder: Path, identifier: str) -> str | None:
    """Log a sweep's trials as one run: their table, the first objective over each of the others, and the page.

    A run that fails is warned of: the sweep is done, and its results are in its folder.

    Args:
        front: The trials.
        logger: The trials' logger, as configurations have it.
        folder: The sweep's folder, where an offline run goes.
        identifier: What tells this sweep from others of the same name.

    Returns:
        Where the run is, if it is anywhere.
    """
    try:
        import wandb

        from lightning_edge.callbacks.tracking import OfflineFallbackWandbLogger

        arguments = logger.get("init_args") or {}
        shared = {name: arguments[name] for name in _SHARED if arguments.get(name) is not None}
        own = OfflineFallbackWandbLogger(
            **shared,
            name=front.study,
            group=front.study,
            job_type="sweep",
            save_dir=str(folder),
            # The same run where the sweep goes on.
            id=re.sub(r"[^\w-]", "-", f"sweep-{front.study}-{identifier}"),
            resume="allow",
            config={"base": front.base, "objectives": dict(front.objectives), "constraints": dict(front.constraints)},
        )
        run = own.experiment
        columns, data = table_of(front)
        logged: dict[str, Any] = {"sweep/trials": wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)}
        columns, data = table_of(front, [trial for trial in front.trials if trial.status == "complete"])
        first, *others = front.objectives
        for other in others:
            # A table each: a chart owns the one it draws.
            table = wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)
            chart = wandb.plot.scatter(table, other, first, title=f"{first} over {other}")
            logged[f"sweep/{first} over {other}".replace(".", " ")] = chart
        if (folder / PAGE).is_file():
            with (folder / PAGE).open(encoding="utf-8") as opened:
                # W&B's own scatter plots have no way to mark a front; the page's pictures do.
                logged["sweep/page"] = wandb.Html(opened, inject=False)
        run.log(logged)
        run.summary.update({f"best/{name}": value for name, value in _best(front).items()})
        address = run.url
        run.finish()
    except Exception as error:
        warn(f"wandb did not take the sweep ({type(error).__name__}: {error}); it is in {folder}")
        return None
    return str(address) if address else None


def table_of(front: Front, trials: list[TrialRecord] | None = None) -> tuple[list[str], list[list[Any]]]:
    """Lay trials out for a table: the names of the columns, and a list of values for each trial.

    Args:
        front: The sweep.
        trials: Which of its trials; ``None``: all.
    """
    shown = front.trials if trials is None else trials
    settings = list(dict.fromkeys(key for trial in front.trials for key in trial.settings))
    columns = ["trial", *front.objectives, *settings, "status", "feasible", "front", "seconds", "reason", "run"]
    return columns, [
        [
            trial.number,
            *(trial.values.get(name) for name in front.objectives),
            *(_plain(trial.settings.get(key)) for key in settings),
            *(trial.status, trial.feasible, trial.front, trial.seconds, trial.reason, trial.url),
        ]
        for trial in shown
    ]


def _best(front: Front) -> Mapping[str, float]:
    return front.best().values if any(trial.feasible for trial in front.trials) else {}


def _is_wandb(entry: Any) -> bool:
    return isinstance(entry, dict) and str(entry.get("class_path")).endswith("WandbLogger")


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)
