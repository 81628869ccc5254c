"""The report in the Trainer's loggers, and what only Weights & Biases takes: table, page, and files with their hashes.

wandb is imported only where a run of it exists. Nothing it raises reaches a training.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lightning_edge.reporting.report import Report, digest
from lightning_edge.user_warnings import warn


def log_report(loggers: Iterable[Logger], report: Report, folder: Path, step: int | None = None) -> None:
    """Give the report's metrics to every logger, and to Weights & Biases its table and files as well.

    A logger that fails is warned of and passed over: a finished training is worth more than its log.

    Args:
        loggers: The Trainer's loggers.
        report: The report.
        folder: Where the report and the files were written.
        step: Step to log at.
    """
    metrics = report.metrics()
    for logger in loggers:
        with _forgiven(logger, folder):
            logger.log_metrics(metrics, step=step)
            if is_wandb(logger):
                _log_wandb(logger.experiment, report, folder)  # type: ignore[attr-defined]
            logger.save()


def log_metrics(loggers: Iterable[Logger], metrics: Mapping[str, float], folder: Path, step: int) -> None:
    """Give metrics to every logger; one that fails is warned of and passed over.

    Args:
        loggers: The Trainer's loggers.
        metrics: Numbers by name.
        folder: Where the report is that they are from.
        step: Step to log at.
    """
    for logger in loggers:
        with _forgiven(logger, folder):
            logger.log_metrics(dict(metrics), step=step)


@contextmanager
def _forgiven(logger: Logger, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        warn(f"{type(logger).__name__} did not take the report ({type(error).__name__}: {error}); it is in {folder}")


def is_wandb(logger: Logger) -> bool:
    """Whether a logger is Lightning's WandbLogger or made from it."""
    return any(kind.__name__ == "WandbLogger" for kind in type(logger).__mro__)


def table_of(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Lay the report out flat for a table: the names of the columns, and a list of values for each row."""
    names = report.metric_names()
    records = []
    for row in report.rows:
        values = asdict(row)
        for nested in ("metrics", "inputs", "outputs", "sample", "placements", "budget"):  # in manifest.json
            values.pop(nested)
        values |= {"fallback_share": row.fallback_share, "within_budget": row.within_budget}
        records.append({"candidate": row.label, **{name: row.metrics.get(name) for name in names}, **values})
    columns = list(records[0]) if records else ["candidate"]
    return columns, [[_plain(record[column]) for column in columns] for record in records]


def device_table_of(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Lay the rows of devices out flat for a table: the names of the columns, and a list of values for each row."""
    words = ("device", "target", "precision", "verdict", "error", "runtime")
    figures = [row.figures() for row in report.devices]
    names = list(dict.fromkeys(name for found in figures for name in found))
    rows = zip(report.devices, figures, strict=True)
    data = [[*(getattr(row, word) for word in words), *(found.get(name) for name in names)] for row, found in rows]
    return [*words, *names], data


def hashes(report: Report, folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file of the report, those in packages one by one, by path relative to ``folder``."""
    return {
        file.relative_to(folder).as_posix(): digest(file) for path in _paths(report, folder) for file in _files(path)
    }


def _log_wandb(run: Any, report: Report, folder: Path) -> None:
    import wandb

    columns, data = table_of(report)
    shown: dict[str, Any] = {"edge/report": wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)}
    if report.devices:
        columns, data = device_table_of(report)
        shown["edge/devices"] = wandb.Table(columns=[*columns], data=data, allow_mixed_types=True)
    if (folder / "report.html").is_file():
        with (folder / "report.html").open(encoding="utf-8") as opened:
            # As it is: what wandb would put into it is loaded from its server.
            shown["edge/page"] = wandb.Html(opened, inject=False)
    run.log(shown)
    artifact = wandb.Artifact(
        f"edge-{run.id}", type="edge-model", metadata={"sha256": hashes(report, folder), "versions": report.versions}
    )
    for path in _paths(report, folder):
        if path.is_dir():
            artifact.add_dir(str(path), name=path.name)
        else:
            artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)


def _paths(report: Report, folder: Path) -> list[Path]:
    names = [
        "report.json",
        *filter(lambda name: (folder / name).exists(), ["report.md", "report.html", "manifest.json"]),
        *(row.path for row in report.rows if row.path is not None),
    ]
    return [folder / name for name in names]


def _files(path: Path) -> Sequence[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


@final
class OfflineFallbackWandbLogger(WandbLogger):
    """Lightning's WandbLogger that goes offline where the server does not answer, instead of failing the training.

    An offline run lies in ``save_dir`` and is sent later with ``wandb sync``. Before a run begins the server is asked
    once; wandb itself would wait for minutes and then fail.

    Args:
        answer_within_s: Seconds in which the server has to answer.
        init_within_s: Seconds in which wandb has to begin the run after that.
        options: As for Lightning's ``WandbLogger``.

    Raises:
        ValueError: If a time is not above 0.
    """

    def __init__(self, *, answer_within_s: float = 5.0, init_within_s: float = 30.0, **options: Any) -> None:
        for name, value in (("answer_within_s", answer_within_s), ("init_within_s", init_within_s)):
            if not value > 0:
                raise ValueError(f"{name}={value!r} is not allowed; give seconds above 0")
        super().__init__(**options)
        self._answer_within_s = answer_within_s
        self._init_within_s = init_within_s

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, begun on first use."""
        if self._experiment is not None or self._offline:
            return super().experiment
        if (
            self._wandb_init.get("mode") in ("offline", "disabled")
            or os.environ.get("WANDB_MODE", "online") != "online"
        ):
            return super().experiment
        import wandb

        settings = self._wandb_init.get("settings") or wandb.Settings()
        if isinstance(settings, dict):
            settings = wandb.Settings(**settings)
        # Unless given, the address comes from the environment or wandb's own files, which only its set-up reads.
        server = settings.base_url if "base_url" in settings.model_fields_set else wandb.setup().settings.base_url
        if not answers(server, self._answer_within_s):
            self._go_offline(f"{server} did not answer within {self._answer_within_s:g} s")
            return super().experiment
        settings.init_timeout = min(settings.init_timeout, self._init_within_s)
        self._wandb_init["settings"] = settings
        try:
            return super().experiment
        except (wandb.errors.Error, TimeoutError, OSError) as error:
            self._go_offline(f"the run did not begin ({type(error).__name__}: {error})")
            return super().experiment

    def _go_offline(self, why: str) -> None:
        warn(f"wandb logs offline, into {self.save_dir}: {why}. Send it later with `wandb sync`")
        self._offline = True
        self._wandb_init["mode"] = "offline"


def answers(url: str, within_s: float) -> bool:
    """Whether a server answers at all, with whatever status, by the proxies that the environment names.

    Args:
        url: Address of the server.
        within_s: Seconds to wait, name resolution included.
    """
    found: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=within_s):
                found.append(True)
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError, socket.gaierror):
            found.append(False)

    # Name resolution knows no timeout, so the whole question is asked in a thread that may be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within_s)
    return bool(found and found[0])
