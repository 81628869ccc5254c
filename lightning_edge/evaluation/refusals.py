"""Errors of a finished evaluation: files that could not be made, with too bad a verdict, or over their budget."""

from __future__ import annotations

from lightning_edge.errors import BudgetError, ExportError
from lightning_edge.reporting.report import Report
from lightning_edge.reporting.rows import over_budget
from lightning_edge.verdict import Strict


def raise_failures(report: Report, strict: Strict = True) -> None:
    """Raise one error that names every file that could not be made, or has a worse verdict than is allowed.

    Args:
        report: The report.
        strict: The worst verdict that is no error, as for `export`.

    Raises:
        ExportError: If there is one.
    """
    lines = []
    if report.failures:
        lines.append(f"{len(report.failures)} of the files could not be made; the report has the others:")
        lines += [f"  {row.label}: {row.error}" for row in report.failures]
    if refused := report.refused(strict):
        lines.append(
            f"{len(refused)} of the files compute something else than their network (strict={strict!r}); they are "
            "kept, and their verdict is in the report:"
        )
        lines += [f"  {row.label} {row.judgement}" for row in refused]
    if lines:
        raise ExportError("\n".join(lines))


def raise_over_budget(report: Report) -> None:
    """Raise one error that names every file to ship that exceeds its budget.

    Raises:
        BudgetError: If there is one.
    """
    if misses := over_budget(report):
        raise BudgetError("\n".join([*misses, "Make the network smaller, or state another budget"]))
