"""What the command line costs: commands on files against `import torch`, and how soon `fit` reaches its first batch.

    python benchmarks/command_time.py [--rounds 5]

Seconds of CPU time of fresh processes, which a busy machine changes less than wall time; medians, all taking turns. The
fit is that of the recipe ``quickstart`` with its callbacks, against a plain LightningCLI of the same configuration
without them; both end as their first batch begins.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RESULTS = Path(__file__).parent / "results" / "resnet8"
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
OURS = "from lightning_edge.cli.entry import main; main()"
THEIRS = "from lightning.pytorch.cli import LightningCLI; LightningCLI(save_config_callback=None)"
FIRST_BATCH = """
import os
import lightning as L

class FirstBatch(L.Callback):
    def on_train_batch_start(self, *args):
        os._exit(0)
"""


def cpu_s(code: str, *arguments: str, folder: Path | None = None) -> float:
    """Run Python code in a process of its own, and give the seconds that it computed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = dict(os.environ)
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, check=False, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def configurations(folder: Path) -> tuple[Path, Path]:
    """Write the recipe and the same without our callbacks, both ending with the first batch."""
    (folder / "first_batch.py").write_text(FIRST_BATCH)
    given = yaml.safe_load(RECIPE.read_text())
    given["trainer"] |= {"default_root_dir": str(folder), "enable_progress_bar": False, "logger": False}
    paths = []
    for name, callbacks in (("ours", given["trainer"]["callbacks"]), ("plain", [])):
        given["trainer"]["callbacks"] = [*callbacks, {"class_path": "first_batch.FirstBatch"}]
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(given))
    return paths[0], paths[1]


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(description="CPU seconds of the command line")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, plain = configurations(folder)
        runs: dict[str, tuple[str, ...]] = {
            "import torch": ("import torch",),
            "--help": (OURS, "--help"),
            "recipes": (OURS, "recipes"),
            "report": (OURS, "report", str(RESULTS), "--to", str(folder / "page.html")),
            "front": (OURS, "front", str(folder)),
            "verify": (OURS, "verify", str(folder)),
            "microcontroller": (OURS, "microcontroller", str(folder / "none.tflite")),
            "fits": (OURS, "fits", str(folder / "none.tflite"), "--device", "stm32l4r5"),
            "fit, to the first batch": (OURS, "fit", "--config", str(ours)),
            "LightningCLI, the same": (THEIRS, "fit", "--config", str(plain)),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, (code, *arguments) in runs.items():
                times[name].append(cpu_s(code, *arguments, folder=folder))
    unit = statistics.median(times["import torch"])
    for name, values in times.items():
        print(
            f"{name:26} {statistics.median(values):6.2f} s  {statistics.median(values) / unit:5.2f} times import torch"
        )


if __name__ == "__main__":
    main()
