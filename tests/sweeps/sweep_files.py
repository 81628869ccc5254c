"""A base, a checker and sweeps of them that train nothing; imported by the tests and by workers they start."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_edge.sweeps.definition import Sweep, bind, parse_definition
from lightning_edge.sweeps.engine import Engine
from lightning_edge.sweeps.fit import Fit
from lightning_edge.sweeps.study import Study

CONFIG: dict[str, Any] = {
    "seed_everything": 5,
    "trainer": {
        "max_epochs": 3,
        "logger": None,
        "default_root_dir": None,
        "callbacks": [
            {
                "class_path": "lightning_edge.EdgeCompressionCallback",
                "init_args": {
                    "phases": [
                        {"class_path": "lightning_edge.Prune", "init_args": {"macs": 0.5, "start": 0.1}},
                        {"class_path": "lightning_edge.Quantize", "init_args": {"start": 0.5, "precisions": None}},
                    ]
                },
            },
            {
                "class_path": "lightning_edge.DeviceEvaluationCallback",
                "init_args": {"targets": ["tflite", "executorch"], "dirpath": "artifacts", "metrics": None},
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "some/checkpoints"},
            },
        ],
    },
    "model": {"class_path": "some.Model", "init_args": {"learning_rate": 0.01, "width": 8}},
    "data": None,
}
GRID = """
base: base.yaml
space:
  prune.macs: [1.0, 0.75, 0.5]
  model.init_args.width: [4, 8]
objectives: {val_acc: max, tflite.size_bytes: min}
constraints: {tflite.p95_ms: 3.5}
"""


class FixedChecker:
    """Knows one configuration, and refuses a width that is negative."""

    def __init__(self, config: Mapping[str, Any] = CONFIG) -> None:
        self.config = copy.deepcopy(dict(config))

    def resolve(self, *configs: str) -> dict[str, Any]:
        return self.config

    def check(self, config: Mapping[str, Any]) -> None:
        from lightning_edge.errors import SweepError

        width = config["model"]["init_args"]["width"]
        if not isinstance(width, int) or width < 0:
            raise SweepError(f"model.init_args.width: given {width!r}; allowed: int")


def sweep_of(text: str = GRID, path: Path = Path("study.yaml")) -> Sweep:
    return bind(parse_definition(text, path), FixedChecker())


def report_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a training with this configuration would report: a larger network is better, larger and slower."""
    phases = [
        phase for callback in config["trainer"]["callbacks"][:1] for phase in callback["init_args"].get("phases", [])
    ]
    kept = next((phase["init_args"]["macs"] for phase in phases if phase["class_path"].endswith("Prune")), 1.0)
    width = config["model"]["init_args"]["width"]
    size = int(1000 * kept * width)
    accuracy = 0.5 + kept * width / 20 + config["seed_everything"] / 1000
    row = {"target": "tflite", "precision": "int8", "source": "trained", "error": None, "is_reference": False}
    values = {"size_bytes": size, "p95_ms": kept * width / 2, "metrics": {"val_acc": accuracy}}
    floating = {**row, **values, "precision": "fp32", "source": "float", "metrics": {"val_acc": 1.0}}
    in_torch = {**row, **values, "target": "torch", "metrics": {"val_acc": 1.0}}
    return {"rows": [in_torch, floating, {**row, **values}]}


def quick(fit: Fit) -> dict[str, Any]:
    """Train nothing, and note that it was asked to."""
    with (fit.folder / "asked").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return report_of(fit.config)


def engine(
    folder: Path,
    text: str = GRID,
    runner: Callable[[Fit], Mapping[str, Any]] = quick,
    url: str | None = None,
    **options: Any,
) -> Engine:
    sweep = sweep_of(text)
    return Engine(sweep, Study(sweep, folder, url), runner=runner, tell=lambda line: None, **options)


def main() -> None:
    """Work at the sweep of a folder: seconds for each trial, and the seconds after which the process hangs."""
    folder, seconds, log, url = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] or None

    def slow(fit: Fit) -> dict[str, Any]:
        with log.open("a") as file:
            file.write(json.dumps({"worker": os.getpid(), "folder": fit.folder.name, "event": "begin"}) + "\n")
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(json.dumps({"worker": os.getpid(), "folder": fit.folder.name, "event": "end"}) + "\n")
        return report_of(fit.config)

    engine(folder, Path(sys.argv[5]).read_text(), slow, url).run()


if __name__ == "__main__":
    main()
