"""What a sweep costs: 16 trials by two workers, one of them killed, against fits by hand and a common float start.

    python benchmarks/digits_sweep.py [--epochs 20] [--separate 4] [--wandb] [--output sweeps/digits]

Three runs of settings of ``digits-pruned-int8`` that differ in compression only: a sweep of all 16 by two processes, of
which one is killed with its training in the middle and started again; the first few of them as fits by hand, one after
the other; and a sweep of four with ``warm_start``, whose trials train for two fifths of the epochs. Prints seconds by
the clock, which hold for a machine that does nothing else, and of processors.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

COMMAND = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "lightning_edge.cli"]
SPACE = {
    "prune.macs": [1.0, 0.75, 0.5, 0.35],
    "quantize.precisions": ["int8", "mixed"],
    "quantize.linear_weights": ["per_channel", "per_tensor"],
}


def write_files(folder: Path, epochs: int) -> None:
    """Write a sweep file without a common start, and one with it; each has a base of its own length."""
    folder.mkdir(parents=True, exist_ok=True)
    phases = [
        {"class_path": "lightning_edge.Prune", "init_args": {"macs": 0.5, "start": 0.2, "end": 0.5}},
        {"class_path": "lightning_edge.Quantize", "init_args": {"start": 0.7}},
    ]
    evaluation = {"targets": ["tflite"], "calibration_batches": 0, "fp32_files": False}
    warm = {"space": {"prune.macs": SPACE["prune.macs"]}, "warm_start": {"epochs": epochs}}
    for name, length, more in (("cold", epochs, {"space": SPACE}), ("warm", epochs * 2 // 5, warm)):
        base = {
            "trainer": {
                "max_epochs": length,
                "accelerator": "cpu",
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "callbacks": [
                    {"class_path": "lightning_edge.EdgeCompressionCallback", "init_args": {"phases": phases}},
                    {"class_path": "lightning_edge.DeviceEvaluationCallback", "init_args": evaluation},
                ],
            }
        }
        (folder / f"{name}-base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
        sweep = {
            "base": ["recipe:digits-pruned-int8", f"{name}-base.yaml"],
            "objectives": {"val_acc": "max", "tflite.size_bytes": "min"},
            **more,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))


def timed(run: Callable[[], None]) -> dict[str, float]:
    """Seconds by the clock, and of processors in all processes that were started and have ended."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(time.monotonic() - begun, 1), "cpu_s": round(used, 1)}


def start(folder: Path, name: str, wandb: bool) -> subprocess.Popen[bytes]:
    """Start a process that works at a sweep."""
    log = (folder / f"{name}.log").open("ab")
    command = [*COMMAND, "sweep", f"{name}.yaml", "--folder", name, *(["--wandb"] if wandb else [])]
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def sweep(folder: Path, name: str, kill: bool, wandb: bool) -> None:
    """Let two processes work at a sweep; where asked kill one, and its training, when four trials are done."""
    workers = [start(folder, name, wandb), start(folder, name, wandb)]
    killed = not kill
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.5)
        front = folder / name / "front.json"
        done = [trial["status"] for trial in json.loads(front.read_text())["trials"]] if front.exists() else []
        if not killed and done.count("complete") >= 4:
            killed = True
            children = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(workers[1].pid)], capture_output=True, text=True
            )
            workers[1].kill()
            for child in children.stdout.split():
                os.killpg(int(child), signal.SIGKILL)  # a training leads a group of its own
            workers[1].wait()
            print(f"killed a worker with {len(children.stdout.split())} training(s); trials so far: {done}", flush=True)
            workers[1] = start(folder, name, wandb)


def fits(folder: Path, count: int) -> None:
    """Train the first settings of the sweep again, one fit after the other, as one would by hand."""
    for number in range(count):
        config = yaml.safe_load((folder / f"cold/trial-{number:04d}/config.yaml").read_text())
        place = folder / f"by-hand-{number}"
        place.mkdir(exist_ok=True)
        text = yaml.safe_dump(config).replace(
            str((folder / f"cold/trial-{number:04d}").resolve()), str(place.resolve())
        )
        (place / "config.yaml").write_text(text)
        command = [*COMMAND, "fit", "--config", str((place / "config.yaml").resolve())]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """What is in the front of a sweep: every trial once."""
    trials = json.loads((folder / name / "front.json").read_text())["trials"]
    front = sorted(
        (round(trial["values"]["tflite.size_bytes"]), round(trial["values"]["val_acc"], 4))
        for trial in trials
        if trial["front"]
    )
    numbers = [trial["number"] for trial in trials]
    states = [trial["status"] for trial in trials]
    return {"trials": len({*numbers}), "complete": states.count("complete"), "front": front}


def main() -> None:
    """Run all three, and print a line for each."""
    parser = argparse.ArgumentParser(description="what a sweep costs against fits by hand")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--separate", type=int, default=4)
    parser.add_argument("--wandb", action="store_true", help="log every trial; WANDB_MODE=offline needs no account")
    parser.add_argument("--output", type=Path, default=Path("sweeps/digits"))
    options = parser.parse_args()
    folder: Path = options.output.resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_files(folder, options.epochs)
    lines: list[dict[str, Any]] = []
    for name, run in (
        ("cold", lambda: sweep(folder, "cold", kill=True, wandb=options.wandb)),
        ("warm", lambda: sweep(folder, "warm", kill=False, wandb=options.wandb)),
        ("by hand", lambda: fits(folder, options.separate)),
    ):
        line = {"run": name, **timed(run)}
        line |= {"fits": options.separate} if name == "by hand" else outcome(folder, name)
        lines.append(line)
        print(json.dumps(line), flush=True)
    (folder / "cost.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
