"""Errors of a finished evaluation: files that could not be made, with too bad a verdict, or over their budget."""

from __future__ import annotations

from lightning_edge.errors import BudgetError, ExportError
from lightning_edge.reporting.report import Report
from lightning_edge.reporting.rows import over_budget
from lightning_edge.verdict import Strict


def raise_failures(report: Report, strict: Strict = True) -> None:
    """Raise one error that names every file that could not be made, or has a worse verdict than is allowed.

    Why was told when it happened, and is in the report.

    Args:
        report: The report.
        strict: The worst verdict that is no error, as for `export`.

    Raises:
        ExportError: If there is one.
    """
    lines = []
    if report.failures:
        labels = ", ".join(row.label for row in report.failures)
        lines.append(f"of {len(report.rows)} networks and files {len(report.failures)} could not be made: {labels}")
    if refused := report.refused(strict):
        labels = ", ".join(f"{row.label} {row.verdict}" for row in refused)
        lines.append(
            f"{len(refused)} compute something else than their network (strict={strict!r}), and are kept: {labels}"
        )
    if lines:
        raise ExportError("; ".join(lines) + ". Why is told above, and in the report with all the others")


def raise_over_budget(report: Report) -> None:
    """Raise one error that names every file to ship that exceeds its budget.

    Raises:
        BudgetError: If there is one.
    """
    if misses := over_budget(report):
        raise BudgetError("\n".join([*misses, "Make the network smaller, or state another budget"]))
