"""The manifest beside exported files: what each one is, so that a folder can be checked without what made it.

Plain JSON, read back strictly: a manifest that is cut short, of another schema or with a path that leaves its folder is
refused, never half understood. Knows no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_edge.contents import Endpoint, Placement, Placements
from lightning_edge.errors import ManifestError, printable
from lightning_edge.files import replace_text
from lightning_edge.interface import Interface
from lightning_edge.plain_values import (
    as_count,
    as_list,
    as_number,
    as_numbers,
    as_object,
    as_optional,
    as_typed,
    as_whole,
    check_keys,
    cut,
    shortened,
)
from lightning_edge.regular_files import read_regular
from lightning_edge.reporting.budget import Excess, Verdict
from lightning_edge.reporting.device_entry import DeviceEntry
from lightning_edge.reporting.devices import DeviceRow
from lightning_edge.reporting.provenance import Commit
from lightning_edge.reporting.report import Report, Row, without_infinities
from lightning_edge.verdict import GRADES

NAME = "manifest.json"
SCHEMA = 1
# Recipe, labels and names of many files come to some hundred thousand.
MOST_BYTES = 2**24

# Fields of files in manifests of earlier versions.
_NO_LONGER_WRITTEN = {"floor_bytes"}
_NOT_YET_WRITTEN: dict[str, Any] = {"verdict": None, "verdict_reason": None, "devices": []}
# What a file system takes: bytes of a name, and characters of a path with room for the folder's own.
_LONGEST_NAME, _LONGEST_PATH = 255, 1024
_MOST_TOLD = 400
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AGREEMENT = ("samples", "top1", "max_steps", "mean_steps", "max_relative")
_LATENCY = ("p50_ms", "p95_ms", "p99_ms", "throughput", "load_ms")


@dataclass(frozen=True)
class FileEntry:
    """One file of a manifest.

    Attributes:
        path: The file or package, relative to the manifest, with ``/``.
        target: Name of the target that wrote it.
        precision: ``"fp32"`` or ``"int8"``.
        source: Where its weights come from, as in a `Row`.
        scheme: How a float network's weights were stored, if in fewer bits.
        sha256: SHA-256 of the file; of a folder, of the sorted lines ``<sha256>  <path>`` of its files.
        size_bytes: Bytes on disk.
        compressed_bytes: Bytes of a zip of it.
        inputs: What the file takes, read from the file.
        outputs: What it gives.
        sample: What `load` takes for one sample: shape and type of each input, in the network's own layout.
        metrics: The user's metrics; ``None`` for one that is no finite number.
        agreement: How far it lay from the network it came from.
        latency: Milliseconds of one sample and of loading, and samples per second; empty where it was not timed.
        runtime: What ran it.
        placements: Where its operations run.
        budget: Whether it keeps its budget, if there is one.
        interface: How the file is called, beyond what `inputs` and `outputs` say.
        not_run: Why nothing could run the file where it was made, so that nothing is stated of what it computes.
        verdict: What its agreement comes to, as in a `Row`.
        verdict_reason: Why it is that.
        devices: What was found of it on devices.
    """

    path: str
    target: str
    precision: str
    source: str
    scheme: str | None
    sha256: str
    size_bytes: int
    compressed_bytes: int
    inputs: tuple[Endpoint, ...]
    outputs: tuple[Endpoint, ...]
    sample: tuple[Endpoint, ...]
    metrics: Mapping[str, float | None]
    agreement: Mapping[str, float | None]
    latency: Mapping[str, float | None]
    runtime: str | None
    placements: Placements | None
    budget: Verdict | None
    interface: Interface
    not_run: str | None = None
    verdict: str | None = None
    verdict_reason: str | None = None
    devices: tuple[DeviceEntry, ...] = ()

    @classmethod
    def of(cls, row: Row, devices: Sequence[DeviceRow] = ()) -> FileEntry:
        """Take over what the row of a finished file holds, and what was found of that file on devices."""
        if row.path is None or row.sha256 is None or row.size_bytes is None or row.compressed_bytes is None:
            raise ValueError(f"{row.label} is no finished file")
        timed = not row.is_reference
        return cls(
            path=row.path,
            target=row.target,
            precision=row.precision,
            source=row.source,
            scheme=row.scheme,
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            compressed_bytes=row.compressed_bytes,
            inputs=tuple(row.inputs),
            outputs=tuple(row.outputs),
            sample=tuple(row.sample),
            metrics=dict(row.metrics),
            agreement={name: getattr(row, name) for name in _AGREEMENT if getattr(row, name) is not None},
            latency={name: getattr(row, name) for name in _LATENCY if timed and getattr(row, name) is not None},
            runtime=row.runtime,
            placements=row.placements,
            budget=row.budget,
            interface=row.interface or Interface(),
            not_run=row.not_run,
            verdict=row.verdict,
            verdict_reason=row.verdict_reason,
            devices=tuple(DeviceEntry.of(found) for found in devices if found.path == row.path),
        )


@dataclass(frozen=True)
class Manifest:
    """What lies in a folder of exported files.

    Attributes:
        model: Name of the module it came from.
        files: The files.
        versions: Versions of Python, the platform and what took part.
        git: Commit of the working directory; ``None`` where there is none.
        recipe: Text of the configuration, where `lightning-edge` ran one.
        schema: Version of the form of a manifest.
        phases: Settings of the phases that the network was trained with, by name.
    """

    model: str
    files: tuple[FileEntry, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    git: Commit | None = None
    recipe: str | None = None
    schema: int = SCHEMA
    phases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Report, git: Commit | None = None, recipe: str | None = None) -> Manifest:
        """Take over every finished file of a report."""
        finished = [row for row in report.rows if row.path is not None and row.error is None]
        files = tuple(FileEntry.of(row, report.devices) for row in finished)
        return cls(report.model, files, report.versions, git, recipe, phases=report.phases)

    def to_json(self) -> str:
        """Write as JSON; a number that is not finite becomes ``null``."""
        plain = {"schema": self.schema, **asdict(self)}
        return json.dumps(without_infinities(plain), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> Path:
        """Write ``manifest.json`` into a folder, whole or not at all.

        Raises:
            EdgeError: If it cannot be written.
        """
        return replace_text(folder / NAME, self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a manifest back, strictly.

        Args:
            path: The file, or the folder it lies in.

        Raises:
            ManifestError: If there is none, it is cut short, of another schema, says more or less than a manifest does,
                or names a path outside its folder.
        """
        path = Path(path)
        path = path / NAME if path.is_dir() else path
        name = printable(str(path))
        try:
            text = read_regular(path, MOST_BYTES).decode("utf-8")
        except FileNotFoundError as error:
            raise ManifestError(
                f"there is no {name}. Give a folder that lightning-edge export or evaluate has written to"
            ) from error
        except (OSError, ValueError) as error:
            raise ManifestError(
                f"{name} cannot be read: {printable(str(error))}. Export again to write it anew"
            ) from error
        try:
            plain = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
            _check_texts(plain)
            return _manifest(plain)
        except RecursionError as error:
            raise ManifestError(f"{name} is no manifest: it is nested too deeply") from error
        except (ValueError, OverflowError) as error:
            reason = cut(printable(str(error)), _MOST_TOLD)
            message = f"{name} is no manifest that can be used: {reason}. Export again to write it anew"
            raise ManifestError(message) from error


def check_path(path: str) -> None:
    """Refuse a path that is not plainly below its folder.

    Raises:
        ValueError: If it is absolute, empty, climbs up or is not written with ``/``.
    """
    parts = path.split("/")
    if len(path) > _LONGEST_PATH or any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in parts):
        raise ValueError(
            f"the path {shortened(path)} is longer than a path is: {_LONGEST_NAME} bytes for a name, {_LONGEST_PATH} "
            "characters in all"
        )
    windows = "\\" in path or ":" in path
    if not path or windows or "\0" in path or PurePosixPath(path).is_absolute() or {"", ".", ".."} & {*parts}:
        raise ValueError(
            f"the path {path!r} leaves the folder or is not plain; paths are relative, with / and without .."
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")


def _check_texts(plain: Any) -> None:
    """Refuse halves of surrogate pairs, which JSON can write and nothing can print or name a file by."""
    try:
        json.dumps(plain, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!r} in it is half a character and no text") from error


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return made


def _manifest(value: Any) -> Manifest:
    """Build a manifest from parsed JSON; the schema first, since all else depends on it."""
    given = as_object(value, "it")
    schema = given.get("schema")
    if type(schema) is not int:
        raise ValueError(f"its schema is {shortened(schema)} and not a number")
    if schema != SCHEMA:
        newer = "a newer lightning-edge wrote it; update to read it" if schema > SCHEMA else "there is none such"
        raise ValueError(f"its schema is {shortened(schema)} and this version reads {SCHEMA}: {newer}")
    given = {"phases": {}, **given}  # earlier versions did not write them
    _keys(given, Manifest, "it")
    files = tuple(_file(entry, f"files[{index}]") for index, entry in enumerate(as_list(given["files"], "files")))
    paths = [entry.path for entry in files]
    if len({*paths}) < len(paths):
        raise ValueError(f"{next(path for path in paths if paths.count(path) > 1)!r} is named twice")
    versions = as_object(given["versions"], "versions")
    return Manifest(
        model=as_typed(given["model"], str, "model"),
        files=files,
        versions={name: as_typed(text, str, f"versions.{name}") for name, text in versions.items()},
        git=_commit(given["git"]),
        recipe=as_optional(given["recipe"], str, "recipe"),
        phases={
            name: as_object(settings, f"phases.{name}")
            for name, settings in as_object(given["phases"], "phases").items()
        },
    )


def _commit(value: Any) -> Commit | None:
    if value is None:
        return None
    given = as_object(value, "git")
    _keys(given, Commit, "git")
    return Commit(as_typed(given["commit"], str, "git.commit"), as_typed(given["dirty"], bool, "git.dirty"))


def _file(value: Any, where: str) -> FileEntry:
    given = {name: entry for name, entry in as_object(value, where).items() if name not in _NO_LONGER_WRITTEN}
    given = {**_NOT_YET_WRITTEN, **given}
    _keys(given, FileEntry, where)
    verdict = as_optional(given["verdict"], str, f"{where}.verdict")
    if verdict is not None and verdict not in GRADES:
        raise ValueError(f"{where}.verdict is {shortened(verdict)} and not one of {', '.join(GRADES)}")
    path = as_typed(given["path"], str, f"{where}.path")
    check_path(path)
    digest = as_typed(given["sha256"], str, f"{where}.sha256")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{where}.sha256 is {digest!r} and not 64 hexadecimal digits")
    precision = as_typed(given["precision"], str, f"{where}.precision")
    if precision not in ("fp32", "int8"):
        raise ValueError(f"{where}.precision is {precision!r} and not 'fp32' or 'int8'")
    return FileEntry(
        path=path,
        target=as_typed(given["target"], str, f"{where}.target"),
        precision=precision,
        source=as_typed(given["source"], str, f"{where}.source"),
        scheme=as_optional(given["scheme"], str, f"{where}.scheme"),
        sha256=digest,
        size_bytes=as_count(given["size_bytes"], f"{where}.size_bytes"),
        compressed_bytes=as_count(given["compressed_bytes"], f"{where}.compressed_bytes"),
        inputs=_endpoints(given["inputs"], f"{where}.inputs"),
        outputs=_endpoints(given["outputs"], f"{where}.outputs"),
        sample=_endpoints(given["sample"], f"{where}.sample"),
        metrics=as_numbers(given["metrics"], f"{where}.metrics"),
        agreement=as_numbers(given["agreement"], f"{where}.agreement"),
        latency=as_numbers(given["latency"], f"{where}.latency"),
        runtime=as_optional(given["runtime"], str, f"{where}.runtime"),
        placements=_placements(given["placements"], f"{where}.placements"),
        budget=_verdict(given["budget"], f"{where}.budget"),
        interface=_interface(given["interface"], f"{where}.interface"),
        verdict=verdict,
        verdict_reason=as_optional(given["verdict_reason"], str, f"{where}.verdict_reason"),
        not_run=as_optional(given["not_run"], str, f"{where}.not_run"),
        devices=_devices(given["devices"], f"{where}.devices"),
    )


def _devices(value: Any, where: str) -> tuple[DeviceEntry, ...]:
    return tuple(DeviceEntry.read(entry, f"{where}[{index}]") for index, entry in enumerate(as_list(value, where)))


def _interface(value: Any, where: str) -> Interface:
    given = as_object(value, where)
    _keys(given, Interface, where)
    return Interface.of(given)


def _endpoints(value: Any, where: str) -> tuple[Endpoint, ...]:
    return tuple(_endpoint(entry, f"{where}[{index}]") for index, entry in enumerate(as_list(value, where)))


def _endpoint(value: Any, where: str) -> Endpoint:
    given = as_object(value, where)
    _keys(given, Endpoint, where)
    zero_point = given["zero_point"]
    return Endpoint(
        name=as_optional(given["name"], str, f"{where}.name"),
        shape=tuple(as_count(size, f"{where}.shape") for size in as_list(given["shape"], f"{where}.shape")),
        dtype=as_typed(given["dtype"], str, f"{where}.dtype"),
        scale=None if given["scale"] is None else as_number(given["scale"], f"{where}.scale"),
        zero_point=None if zero_point is None else as_whole(zero_point, f"{where}.zero_point"),
    )


def _placements(value: Any, where: str) -> Placements | None:
    if value is None:
        return None
    given = as_object(value, where)
    _keys(given, Placements, where)
    ops = []
    for index, entry in enumerate(as_list(given["ops"], f"{where}.ops")):
        place = f"{where}.ops[{index}]"
        op = as_object(entry, place)
        _keys(op, Placement, place)
        names = [as_typed(op[name], str, f"{place}.{name}") for name in ("op", "place")]
        ops.append(Placement(*names, *(as_count(op[name], f"{place}.{name}") for name in ("count", "macs"))))
    return Placements(as_typed(given["told_by"], str, f"{where}.told_by"), tuple(ops))


def _verdict(value: Any, where: str) -> Verdict | None:
    if value is None:
        return None
    given = as_object(value, where)
    _keys(given, Verdict, where)
    exceeded = []
    for entry in as_list(given["exceeded"], f"{where}.exceeded"):
        excess = as_object(entry, f"{where}.exceeded")
        _keys(excess, Excess, f"{where}.exceeded")
        numbers = (as_number(excess[name], f"{where}.exceeded.{name}") for name in ("limit", "value"))
        exceeded.append(Excess(as_typed(excess["name"], str, f"{where}.exceeded.name"), *numbers))
    names = (as_typed(name, str, f"{where}.not_measurable") for name in as_list(given["not_measurable"], where))
    return Verdict(as_typed(given["status"], str, f"{where}.status"), tuple(exceeded), tuple(names))


def _keys(given: Mapping[str, Any], kind: type, where: str) -> None:
    check_keys(given, [entry.name for entry in fields(kind)], where, "a manifest of this schema")
