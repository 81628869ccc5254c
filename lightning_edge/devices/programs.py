"""Benchmark programs of runtimes that a user may name: how each is called, and what is read of what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_edge.measure import Timing


@dataclass(frozen=True)
class NativeFigures:
    """What a program said, in milliseconds; ``None`` for what it does not say."""

    first_ms: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    jitter_ms: float | None = None
    load_ms: float | None = None
    throughput: float | None = None
    repeats: int | None = None


@dataclass(frozen=True)
class Program:
    """How one program is called, and what is read of what it says."""

    target: str
    arguments: Callable[[str, Timing], Sequence[str]]
    read: Callable[[str], NativeFigures]


def programs_of(given: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    """Check the programs of a device.

    Args:
        given: By target the path of a program on the device, and arguments of the user's own.

    Raises:
        ValueError: If a program is not known, or not one for files of that target.
    """
    found = {}
    for target, command in (given or {}).items():
        if isinstance(command, str) or not command or not all(isinstance(part, str) and part for part in command):
            raise ValueError(f"programs: {target}={command!r}; give a list: a program on the device and its arguments")
        if known_program(command[0]).target != target:
            raise ValueError(f"programs: {target}={command[0]!r} runs files of {known_program(command[0]).target}")
        found[target] = list(command)
    return found


def known_program(program: str) -> Program:
    """Find a program by the end of its name: builds have their platform before it.

    Raises:
        ValueError: If it is not known.
    """
    called = program.replace("\\", "/").rpartition("/")[2]
    for known, found in _PROGRAMS.items():
        if called == known or called.endswith(f"_{known}"):
            return found
    raise ValueError(f"programs: {program!r} is not known; allowed are {', '.join(_PROGRAMS)}")


def _numbers(pattern: str, said: str) -> dict[str, float]:
    """The named numbers of the last place that a pattern is found at."""
    found = {}
    for match in re.finditer(pattern, said):
        found = {key: float(value) for key, value in match.groupdict().items() if value is not None}
    return found


_NUMBER = r"\d{1,12}(?:\.\d{1,9})?(?:e[+-]?\d{1,2})?"


def _of_benchmark_model(said: str) -> NativeFigures:
    """LiteRT's ``benchmark_model``, in microseconds: the line of its timed calls, and that of its summary."""
    calls = _numbers(
        rf"count=(?P<count>\d{{1,9}}) first=\S+ curr=\S+ min=\S+ max=\S+ avg=(?P<avg>{_NUMBER}) "
        rf"std=(?:(?P<std>{_NUMBER})(?!\S)|\S+)"
        rf"(?: p5=\S+ median=(?P<median>{_NUMBER}) p95=(?P<p95>{_NUMBER}))?",
        said,
    )
    whole = _numbers(rf"in us: Init: (?P<init>{_NUMBER}), First inference: (?P<first>{_NUMBER}),", said)
    return NativeFigures(
        first_ms=_ms(whole.get("first")),
        p50_ms=_ms(calls.get("median")),
        p95_ms=_ms(calls.get("p95")),
        jitter_ms=_ms(calls.get("std")),
        load_ms=_ms(whole.get("init")),
        throughput=1e6 / calls["avg"] if calls.get("avg") else None,
        repeats=int(calls["count"]) if "count" in calls else None,
    )


def _ms(us: float | None) -> float | None:
    return None if us is None else us / 1000


def _of_trtexec(said: str) -> NativeFigures:
    """TensorRT's ``trtexec``, in milliseconds: latency with the way to the GPU and back."""
    found = _numbers(
        rf"\] Latency: min = .{{1,80}}? median = (?P<p50>{_NUMBER}) ms(?:, percentile\(90%\) = \S+ ms)?"
        rf"(?:, percentile\(95%\) = (?P<p95>{_NUMBER}) ms)?(?:, percentile\(99%\) = (?P<p99>{_NUMBER}) ms)?",
        said,
    )
    rate = _numbers(rf"Throughput: (?P<qps>{_NUMBER}) qps", said)
    return NativeFigures(
        p50_ms=found.get("p50"), p95_ms=found.get("p95"), p99_ms=found.get("p99"), throughput=rate.get("qps")
    )


def _of_executor_runner(said: str) -> NativeFigures:
    """ExecuTorch's ``executor_runner``, in milliseconds: all calls together. Of one call that is the first."""
    found = _numbers(rf"executed successfully (?P<calls>\d{{1,9}}) time\(s\) in (?P<ms>{_NUMBER}) ms", said)
    if not found.get("calls") or not found.get("ms"):
        return NativeFigures()
    if found["calls"] == 1:
        return NativeFigures(first_ms=found["ms"])
    return NativeFigures(throughput=found["calls"] / found["ms"] * 1000, repeats=int(found["calls"]))


_PROGRAMS = {
    "benchmark_model": Program(
        "tflite",
        lambda file, timing: (
            f"--graph={file}",
            f"--num_threads={timing.threads}",
            f"--warmup_runs={max(1, timing.warmup)}",
            f"--num_runs={timing.repeats}",
        ),
        _of_benchmark_model,
    ),
    "executor_runner": Program(
        "executorch",
        lambda file, timing: (f"--model_path={file}", f"--num_executions={timing.repeats}"),
        _of_executor_runner,
    ),
    "trtexec": Program("onnx", lambda file, timing: (f"--onnx={file}",), _of_trtexec),
}
