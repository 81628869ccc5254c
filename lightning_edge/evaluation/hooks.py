"""`EvaluationHook`: what a user does with each file and with the report, such as an upload."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from pathlib import Path

from lightning_edge.reporting.report import Report, Row
from lightning_edge.user_warnings import warn


class EvaluationHook(ABC):  # noqa: B024 (each method may be left as it is)
    """What to do with the files of an evaluation when the report is written. Both methods do nothing by default.

    Subclass it, and give it to ``DeviceEvaluationCallback(hooks=[...])``, in a recipe by its class path. What a hook
    raises is a warning: a finished training is worth more than its upload.
    """

    def on_artifact(self, row: Row, path: Path) -> None:  # noqa: B027
        """Take a file that is in its place.

        Args:
            row: What was found of it: target, precision, verdict, metrics, latency, bytes.
            path: The file, or folder for a package.
        """

    def on_report(self, report: Report, folder: Path) -> None:  # noqa: B027
        """Take the report, after all files.

        Args:
            report: The report.
            folder: The folder with ``report.json``, ``report.md``, ``report.html``, ``manifest.json`` and the files.
        """


def call_hooks(hooks: Sequence[EvaluationHook], report: Report, folder: Path) -> None:
    """Give each file, and then the report, to each hook; warn of what they raise."""
    for hook in hooks:
        try:
            for row in report.rows:
                if row.path is not None:
                    hook.on_artifact(row, folder / row.path)
            hook.on_report(report, folder)
        except Exception as error:  # the user's own code
            warn(
                f"{type(hook).__name__} failed ({type(error).__name__}: {error}); the report and the files are in "
                f"{folder}"
            )
