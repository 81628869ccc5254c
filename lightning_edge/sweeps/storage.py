"""Where a study is kept: a journal in the sweep's folder, or a database that several machines share."""

from __future__ import annotations

import logging
import re
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_edge.errors import SweepError, first_line, require
from lightning_edge.files import STAGING, replace_text
from lightning_edge.sweeps.definition import Definition, parse_definition
from lightning_edge.sweeps.locks import held
from lightning_edge.sweeps.samplers import EXTRA, sampler
from lightning_edge.sweeps.strict_yaml import read_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

JOURNAL, COPY, FOLDER_ID, LOCK = "journal.log", "sweep.yaml", "folder-id", "sweep.lock"
# A worker with a database says so often that it is alive, and is given up after so long a silence.
BEAT_S, SILENCE_S = 20, 120
_IDENTITY = "sweep"
# What a process leaves that comes first or was killed before it wrote the copy, and what agents of W&B have trained.
_NO_MATTER = re.compile(rf"{re.escape(LOCK)}|agent|{re.escape(JOURNAL)}.*|{re.escape(STAGING)}.*")
_PASSWORD = re.compile(r"(?<=://)[^@/]*@")


def open_study(definition: Definition, folder: Path, url: str | None) -> tuple[Study, Any]:
    """Open the study of a sweep, or make it, and its folder; give the study and its storage.

    Args:
        definition: The sweep.
        folder: Its folder.
        url: A database as SQLAlchemy names it, such as ``sqlite:///sweep.db``; ``None``: a journal in the folder.

    Raises:
        SweepError: If the folder or the study is that of another sweep, or the storage cannot be reached. Nothing is
            written then.
    """
    optuna = require("optuna", EXTRA)
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        check_folder(definition, folder)
    except SweepError:
        # Another process may be making the folder, and what is in it is then told by the check behind its lock.
        if not (folder / LOCK).exists():
            raise
    # A database that does not answer leaves no folder behind.
    database = None if url is None else _database(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{folder} cannot be made: {error.strerror}. Give another --folder") from error
    with held(folder / LOCK):
        check_folder(definition, folder)
        storage = _journal(folder / JOURNAL) if database is None else database
        study: Study = optuna.create_study(
            storage=storage,
            study_name=definition.study,
            directions=[f"{direction}imize" for direction in definition.objectives.values()],
            sampler=sampler(definition.sampler, definition.trials),
            load_if_exists=True,
        )
        known = study.user_attrs.get(_IDENTITY)
        if known is None:
            study.set_user_attr(_IDENTITY, definition.identity())
        else:
            _check_same(
                definition.identity(), known, f"the study {definition.study!r} in the storage", "rename the sweep file"
            )
        replace_text(folder / COPY, definition.text)
        if not (folder / FOLDER_ID).exists():
            replace_text(folder / FOLDER_ID, uuid.uuid4().hex)
    return study, storage


def check_folder(definition: Definition, folder: Path) -> None:
    """Refuse a folder that is not this sweep's.

    Raises:
        SweepError: If it is that of another sweep, or of something else.
    """
    copy = folder / COPY
    if folder.exists() and not folder.is_dir():
        raise SweepError(f"{folder} is a file; give a folder as --folder")
    if copy.exists():
        kept = parse_definition(read_text(copy), copy)
        _check_same(
            definition.identity(), kept.identity(), f"{folder} is the folder of another sweep", "give another --folder"
        )
    elif folder.exists() and any(not _NO_MATTER.fullmatch(entry.name) for entry in folder.iterdir()):
        raise SweepError(f"{folder} holds other files; give an empty or a new folder as --folder")


def _check_same(given: dict[str, str], known: dict[str, str], what: str, advice: str) -> None:
    differing = [name for name in {**given, **known} if known.get(name) != given.get(name)]
    # A base may have been beside the file, and the copy is elsewhere: the name of the file tells.
    if "base" in differing and Path(given["base"].strip('"')).name == Path(str(known.get("base")).strip('"')).name:
        differing.remove("base")
    if differing:
        name = differing[0]
        raise SweepError(f"{what}: its {name} is {known.get(name)}, and yours {given.get(name)}; {advice}")


def _journal(path: Path) -> Any:
    journal = require("optuna.storages.journal", EXTRA)
    return journal.JournalStorage(journal.JournalFileBackend(str(path)))


def _database(url: str) -> Any:
    """Open a database, whose heartbeats tell of workers on other machines."""
    storages = require("optuna.storages", EXTRA)
    shown = _PASSWORD.sub("", url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return storages.RDBStorage(
                url,
                heartbeat_interval=BEAT_S,
                grace_period=SILENCE_S,
                heartbeat_stale_trial_callback=give_back,
                engine_kwargs={"pool_pre_ping": True},
            )
    except Exception as error:  # each database's driver has errors of its own
        raise SweepError(
            f"--storage {shown}: it cannot be used: {_PASSWORD.sub('', first_line(error))}. Allowed: a database as "
            "SQLAlchemy names it, such as sqlite:///sweep.db or postgresql://user@host/name, with its driver installed"
        ) from error


def give_back(study: Study, trial: FrozenTrial) -> None:
    """Put a trial's settings back, to be trained by whoever comes next."""
    study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
