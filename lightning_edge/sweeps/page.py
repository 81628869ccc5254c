"""The page and the picture of a sweep, beside its ``front.json``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from lightning_edge.files import replace_text
from lightning_edge.reporting.html import sweep_page, sweep_svg
from lightning_edge.sweeps.front import Front

PAGE, PICTURE = "report.html", "front.svg"


def write_page(front: Front, folder: Path) -> Path:
    """Write ``report.html`` and ``front.svg`` into a sweep's folder, each whole or not at all.

    There is no picture where there is nothing to draw.

    Args:
        front: The trials so far.
        folder: The folder of the sweep.

    Returns:
        The page.

    Raises:
        EdgeError: If a file cannot be written.
    """
    plain = asdict(front)
    # One objective gives no picture, and neither does a sweep without a trial that is complete.
    with suppress(ValueError):
        replace_text(folder / PICTURE, sweep_svg(plain))
    return replace_text(folder / PAGE, sweep_page(plain))
