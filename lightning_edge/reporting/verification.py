"""Hold a folder of exported files against its manifest: are they there, unchanged, as stated, and do they run?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_edge import exporters
from lightning_edge.contents import Endpoint
from lightning_edge.errors import EdgeError, ManifestError, printable
from lightning_edge.exporters.artifact import MOST_BYTES, MOST_PACKAGE_BYTES, size_bytes
from lightning_edge.interface import IMAGE_DIMENSIONS, Interface
from lightning_edge.plain_values import shortened
from lightning_edge.regular_files import check_members, check_regular, kind_of
from lightning_edge.reporting.manifest import NAME, FileEntry, Manifest
from lightning_edge.reporting.report import digest
from lightning_edge.reporting.rows import sample_of

if TYPE_CHECKING:
    from rich.table import Table

Check = Literal["exists", "digest", "bytes", "contents", "runs"]
CHECKS: tuple[Check, ...] = ("exists", "digest", "bytes", "contents", "runs")

# What a manifest states and nobody can see of the files: it was measured, or chosen, where they were made.
UNCHECKED = (
    "compressed_bytes",
    "metrics",
    "agreement",
    "latency",
    "runtime",
    "placements",
    "budget",
    "source",
    "not_run",
    "verdict",
    "verdict_reason",
    "devices",
    "model",
    "versions",
    "git",
    "recipe",
    "phases",
)

_AGAIN = "Export it again, or take it from where the manifest came from"
_INSIDE = "Put the file itself here"
# Numbers in a sample of a file: more than any network takes, and a fraction of a machine's memory.
_LARGEST_SAMPLE = 2**28


@dataclass(frozen=True)
class Finding:
    """Something in a folder that is not as its manifest says.

    Attributes:
        path: The file, as the manifest names it.
        check: What was looked at.
        expected: What the manifest says.
        found: What is there.
        advice: What to do.
    """

    path: str
    check: Check
    expected: str
    found: str
    advice: str

    def __str__(self) -> str:
        """Say all of it in one line, control characters of names escaped."""
        return printable(f"{self.path}: {self.check}: expected {self.expected}, found {self.found}. {self.advice}")


def verify(folder: str | Path) -> list[Finding]:
    """Check every file of a folder against its ``manifest.json``.

    Each has to be there, with the digest and the bytes that are stated, and hold what is stated: precision, inputs and
    outputs with their names, shapes, types and quantization, read from the file again. Then it is loaded and run on a
    sample of the stated shape. A file whose digest differs is looked into but not run: it is not what was proven.
    Nor is one that nothing on this machine can run: no finding, but no proof either, see `not_run`. Nothing outside the
    folder is read: a link that leaves it is a finding. What the manifest says beyond that (`UNCHECKED`) is not checked.

    Args:
        folder: The folder.

    Returns:
        What is not as stated; nothing if all is.

    Raises:
        ManifestError: If there is no manifest, or it cannot be used.
    """
    folder = Path(folder)
    manifest = _manifest_in(folder)
    return [finding for entry in manifest.files for finding in _findings(folder, entry, manifest)]


def unlisted(folder: str | Path) -> list[str]:
    """Name the exported files in a folder that its manifest does not speak of.

    Raises:
        ManifestError: If there is no manifest, or it cannot be used.
    """
    known = {entry.path for entry in _manifest_in(Path(folder)).files}
    suffixes = {exporters.target(name).suffix for name in exporters.TARGETS}
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix in suffixes and path.name not in known)


def not_run(folder: str | Path) -> dict[str, str]:
    """Say of each file of a folder that nothing on this machine can run why that is, by its path.

    Raises:
        ManifestError: If there is no manifest, or it cannot be used.
    """
    folder = Path(folder)
    found = {}
    for entry in _manifest_in(folder).files:
        if _misplaced(folder, entry) is not None or _not_of_target(entry) is not None:
            continue  # a finding of `verify`
        try:
            reason = exporters.target(entry.target).not_run_here(exporters.contents_of(folder / entry.path))
        except (EdgeError, ValueError):
            continue  # a finding of `verify`
        if reason is not None:
            found[entry.path] = reason
    return found


def table(manifest: Manifest, findings: Sequence[Finding], waiting: Collection[str] = ()) -> Table:
    """Draw what was looked at and what was found, as a table of the `rich` package.

    Args:
        manifest: What is stated.
        findings: What is not so.
        waiting: Paths of files that were not run, since nothing here can.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("File", *(check.capitalize() for check in CHECKS)):
        drawn.add_column(header, no_wrap=True)
    for entry in manifest.files:
        failed = {finding.check for finding in findings if finding.path == entry.path}
        skipped = _skipped(failed)
        cells = ["FAILED" if check in failed else "-" if check in skipped else "ok" for check in CHECKS]
        if entry.path in waiting and cells[-1] == "ok":
            cells[-1] = "not run"
        # As text: brackets in a name are no markup.
        drawn.add_row(Text(printable(entry.path)), *cells, style="red" if failed else None)
    return drawn


def _skipped(failed: set[Check]) -> set[Check]:
    """Checks that were not made after others had failed."""
    if "exists" in failed:
        return {*CHECKS} - {"exists"}
    return {"runs"} if failed & {"digest", "contents"} else set()


def _findings(folder: Path, entry: FileEntry, manifest: Manifest) -> Iterator[Finding]:
    if (misplaced := _misplaced(folder, entry)) is not None:
        yield misplaced
        return
    if (mismatch := _not_of_target(entry)) is not None:
        yield mismatch
        return
    path = folder / entry.path
    before = [*_bytes(path, entry, manifest), *_contents(path, entry)]
    yield from before
    if not {finding.check for finding in before} & {"digest", "contents"}:
        yield from _run(path, entry)


def _manifest_in(folder: Path) -> Manifest:
    """Read the manifest of a folder, and none that lies elsewhere.

    Raises:
        ManifestError: If there is none, or it cannot be used.
    """
    if not folder.is_dir():
        raise ManifestError(f"{printable(str(folder))} is no folder. Give one that holds exported files and {NAME}")
    if (folder / NAME).exists() and not _inside(folder / NAME, folder):
        raise ManifestError(f"{printable(str(folder / NAME))} is a link out of its folder. {_INSIDE}")
    return Manifest.read(folder)


def _misplaced(folder: Path, entry: FileEntry) -> Finding | None:
    """Find a file that is not there, is no file, or lies outside the folder, a member of a package too."""
    path = folder / entry.path
    try:
        kind = kind_of(path)
        if not _inside(path, folder):
            found = f"a link to {path.resolve()}"
            return Finding(entry.path, "exists", "a file in this folder", found, _INSIDE)
        if kind not in ("a file", "a folder"):
            return Finding(entry.path, "exists", "a file", kind, _AGAIN)
        if kind == "a folder":
            # Not behind links: a digest is one of what is in the package.
            link = next((member for member in path.rglob("*") if member.is_symlink()), None)
            if link is not None:
                found = f"the link {link.relative_to(path)} in it"
                return Finding(entry.path, "exists", "a package of files", found, "Put the files themselves there")
            check_members(path, MOST_PACKAGE_BYTES)
        else:
            check_regular(path, MOST_BYTES)
    except FileNotFoundError:
        return Finding(entry.path, "exists", "a file of that name", "none", _AGAIN)
    except (OSError, ValueError, RuntimeError) as error:  # resolve() tells of links in a circle by a RuntimeError
        return Finding(entry.path, "exists", "a file that can be read", str(error), _AGAIN)
    return None


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _not_of_target(entry: FileEntry) -> Finding | None:
    """Find a target that this version does not have, or whose files have another suffix."""
    if entry.target not in exporters.TARGETS:
        found = f"the target {shortened(entry.target)}"
        return Finding(entry.path, "contents", f"one of {', '.join(exporters.TARGETS)}", found, "Update lightning-edge")
    suffix = exporters.target(entry.target).suffix
    if Path(entry.path).suffix == suffix:
        return None
    return Finding(entry.path, "contents", f"a {suffix} file, as {entry.target} has", Path(entry.path).suffix, _AGAIN)


def _bytes(path: Path, entry: FileEntry, manifest: Manifest) -> Iterator[Finding]:
    size = size_bytes(path)
    if size <= max(file.size_bytes for file in manifest.files):
        found = digest(path)
        other = next((file.path for file in manifest.files if file.sha256 == found), None)
        actual = found if other is None else f"{found}, which is that of {other}: the files were swapped"
    else:
        found, actual = "", "another one, since it is larger than any file of the manifest"  # however large: not read
    if found != entry.sha256:
        yield Finding(entry.path, "digest", entry.sha256, actual, _AGAIN)
    if size != entry.size_bytes:
        yield Finding(entry.path, "bytes", f"{entry.size_bytes:,} bytes", f"{size:,}", _AGAIN)


def _contents(path: Path, entry: FileEntry) -> Iterator[Finding]:
    try:
        contents = exporters.contents_of(path)
    except (EdgeError, ValueError) as error:
        yield Finding(entry.path, "contents", f"a file for {entry.target}", str(error), _AGAIN)
        return
    for name, stated, found in (
        ("precision", _stated_precision(entry), contents.precision),
        ("inputs", _listed(entry.inputs), _listed(contents.inputs)),
        ("outputs", _listed(entry.outputs), _listed(contents.outputs)),
        ("interface", str(entry.interface), str(contents.interface)),
    ):
        if stated != found:
            yield Finding(entry.path, "contents", f"{name} {stated}", found, _AGAIN)


def _stated_precision(entry: FileEntry) -> str:
    return "int8" if entry.scheme is not None and entry.scheme.startswith("int") else entry.precision


def _run(path: Path, entry: FileEntry) -> Iterator[Finding]:
    try:
        artifact = exporters.load(path)
        takes = _listed(sample_of(artifact))
        if takes != _listed(entry.sample):
            yield Finding(entry.path, "runs", f"to be called with {_listed(entry.sample)}", takes, _AGAIN)
            return
        if artifact.not_run is not None:
            return
        outputs = artifact.run([_sample(endpoint, entry.interface) for endpoint in entry.sample])
    except (EdgeError, ValueError) as error:
        advice = "Install what its runtime needs, or export it again"
        yield Finding(entry.path, "runs", "a file that loads and runs", str(error), advice)
        return
    shapes = [tuple(output.shape) for output in outputs]
    stated = [endpoint.shape for endpoint in entry.outputs]
    if shapes != stated:
        yield Finding(entry.path, "runs", f"outputs of shape {stated}", str(shapes), _AGAIN)
    elif not all(output.isfinite().all() for output in outputs):
        yield Finding(entry.path, "runs", "finite outputs", "values that are not finite", _AGAIN)


def _sample(endpoint: Endpoint, interface: Interface) -> Tensor:
    """A sample that any network takes: the same numbers from 0 to 1 each time, zeros for integers and pixels."""
    if prod(endpoint.shape) > _LARGEST_SAMPLE:
        raise ValueError(f"a sample of shape {list(endpoint.shape)} has more than {_LARGEST_SAMPLE:,} numbers")
    if interface.pixels is not None and len(endpoint.shape) == IMAGE_DIMENSIONS:
        return torch.zeros(endpoint.shape, dtype=torch.uint8)
    dtype = getattr(torch, endpoint.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{endpoint.dtype!r} is no type that a file takes")
    if not dtype.is_floating_point:
        return torch.zeros(endpoint.shape, dtype=dtype)
    return torch.rand(endpoint.shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _listed(endpoints: Sequence[Endpoint]) -> str:
    return "; ".join(_described(endpoint) for endpoint in endpoints) or "none"


def _described(endpoint: Endpoint) -> str:
    quantized = "" if endpoint.scale is None else f" (scale {endpoint.scale!r}, zero point {endpoint.zero_point})"
    name = "" if endpoint.name is None else f"{endpoint.name} "
    return f"{name}{list(endpoint.shape)} {endpoint.dtype}{quantized}"
