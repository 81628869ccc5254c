"""Load an exported file into its runtime, in a process of its own unless asked otherwise."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from lightning_edge.errors import EdgeError, RunnerError
from lightning_edge.exporters.base import (
    Artifact,
    Contents,
    Runner,
    Target,
    compressed_bytes,
    first_line,
    import_runtime,
    size_bytes,
)
from lightning_edge.exporters.isolated import DEFAULT_TIME_LIMIT_S, Isolated
from lightning_edge.exporters.not_run import NotRun
from lightning_edge.exporters.targets import TARGETS, target


def load(
    path: str | Path, *, threads: int = 1, isolated: bool = True, time_limit_s: float = DEFAULT_TIME_LIMIT_S
) -> Artifact:
    """Load an exported file; its suffix says the target.

    Args:
        path: The file, or the folder of a Core ML package.
        threads: Threads to run it with.
        isolated: Whether its runtime gets a process of its own, which ends with the artifact: what crashes there is a
            `RunnerError` here. With ``False`` it starts sooner, a call is not sent anywhere, and a crash is one of this
            process. Core ML's reference interpreter has no process of its own either way.
        time_limit_s: Seconds that loading the file, or running one sample, may take before the process is ended; means
            nothing without one.

    Raises:
        RunnerError: If it is missing, cut short, or not what its suffix says.
        ValueError: If the suffix belongs to no target, or an argument is not allowed.
    """
    check_running(threads, time_limit_s)
    name, path = _existing(path)
    contents = inspect_file(target(name), path, path.name)
    return open_file(name, path, contents, threads, isolated, time_limit_s)


def contents_of(path: str | Path) -> Contents:
    """Read what an exported file holds, without running it; its suffix says the target.

    Args:
        path: The file, or the folder of a Core ML package.

    Raises:
        RunnerError: If it is missing, cut short, or not what its suffix says.
        ValueError: If the suffix belongs to no target.
    """
    name, path = _existing(path)
    return inspect_file(target(name), path, path.name)


def _existing(path: str | Path) -> tuple[str, Path]:
    """The target that a file is of, by its suffix, and its path."""
    path = Path(path)
    name = next((name for name in TARGETS if path.suffix == target(name).SUFFIX), None)
    if name is None:
        known = ", ".join(f"{target(name).SUFFIX} ({name})" for name in TARGETS)
        raise ValueError(f"{path} has the suffix {path.suffix!r}; load() reads {known}")
    if not path.exists():
        raise RunnerError(f"{path} does not exist; export() writes it")
    return name, path


def inspect_file(module: Target, path: Path, name: str) -> Contents:
    """Read what a target's file holds; ``name`` is what an error calls it.

    Raises:
        RunnerError: If it is not what its suffix says.
    """
    try:
        return module.inspect(path)
    except EdgeError:
        raise
    except Exception as error:
        raise RunnerError(f"{name} is no {module.SUFFIX} file: {first_line(error)}. Export it again") from error


def placed(module: Target, path: Path, contents: Contents) -> Contents:
    """Put what the runtime itself tells of where operations run in the place of what the file alone tells."""
    ask = getattr(module, "placements", None)
    told = None if ask is None else ask(path)
    return contents if told is None else replace(contents, placements=told)


def not_run_here(name: str, contents: Contents) -> str | None:
    """Say why nothing on this machine can run a target's file of these contents; ``None`` where it can."""
    ask = getattr(target(name), "not_run_here", None)
    return None if ask is None else ask(contents)


def open_file(
    name: str,
    path: Path,
    contents: Contents,
    threads: int,
    isolated: bool,
    time_limit_s: float,
) -> Artifact:
    """Load a file whose contents are known; see `load`. One that nothing here can run is given without being loaded.

    Raises:
        RunnerError: If it does not load.
    """
    module = target(name)
    if (reason := not_run_here(name, contents)) is not None:
        waiting = NotRun(path.name, contents, reason)
        return Artifact(
            name, path, size_bytes(path), compressed_bytes(path), contents, waiting, load_ms=None, not_run=reason
        )
    runner: Runner
    try:
        if isolated and not getattr(module, "IN_PROCESS", False):
            runner = Isolated(TARGETS[name], path, threads, time_limit_s)
            load_ms = runner.load_ms
        else:
            import_runtime(module)
            start = time.perf_counter()
            runner = module.open(path, threads)
            load_ms = (time.perf_counter() - start) * 1000
    except EdgeError:
        raise
    except Exception as error:
        raise RunnerError(f"{path.name} does not load: {first_line(error)}. Export it again") from error
    return Artifact(name, path, size_bytes(path), compressed_bytes(path), contents, runner, load_ms)


def check_running(threads: int, time_limit_s: float) -> None:
    """Refuse numbers of threads and seconds that nothing can run with.

    Raises:
        ValueError: Naming what was given and what is allowed.
    """
    if threads < 1:
        raise ValueError(f"threads={threads!r} is not allowed; give 1 or more")
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s={time_limit_s!r} is not allowed; give more than 0 seconds")
