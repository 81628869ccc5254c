"""``lightning-edge verify``: a folder of exported files against its manifest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``lightning-edge verify``: a table, and every mismatch on standard error.

    Args:
        arguments: Arguments behind ``verify``.

    Returns:
        The status to exit with: 1 if something is not as stated, 2 if the manifest cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-edge verify", description="Check exported files against the manifest.json beside them."
    )
    parser.add_argument("folder", type=Path, help="the folder that export or evaluate has written to")
    folder = parser.parse_args(arguments).folder

    # Here and not above: they import torch, which takes seconds, and --help needs none.
    from rich.console import Console

    from lightning_edge.errors import ManifestError, printable
    from lightning_edge.reporting.manifest import Manifest
    from lightning_edge.reporting.verification import UNCHECKED, not_run, table, unlisted, verify

    try:
        manifest, others = Manifest.read(folder), unlisted(folder)
        findings, waiting = verify(folder), not_run(folder)
    except ManifestError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    Console().print(table(manifest, findings, waiting))
    for path, reason in waiting.items():
        print(printable(f"{path} was not run: {reason}"))
    if others:
        print(printable(f"not in the manifest, and not looked at: {', '.join(others)}"))
    print(f"stated in the manifest, and not checked: {', '.join(UNCHECKED)}")
    for finding in findings:
        sys.stderr.write(f"{finding}\n")
    return 1 if findings else 0
