"""A sweep of ResNet-8 on CIFAR-10 from the reference's weights: accuracy of int8 ``.tflite`` files against their bytes.

    python benchmarks/resnet8_sweep.py --images FOLDER --weights ic01_resnet8_fp32_weights.npz \
        --reference pretrainedResnet_quant.tflite [--epochs 3] [--output sweeps/resnet8]

Writes the sweep's two files and runs ``lightning-edge sweep`` on them; run it again to go on. Trials are compared on
5,000 of the training images, which the reference was trained on. Then every trial's file and the reference's own
(MLPerf Tiny ``ic01``, post-training quantized, calibrated on test images) are run on the 10,000 test images, which
decide nothing. These are not MLPerf results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from lightning_edge import exporters
from lightning_edge.cli.sweep import main as sweep
from lightning_edge.zoo.cifar10 import CIFAR10DataModule
from lightning_edge.zoo.networks import ResNet8, load_reference_weights
from lightning_edge.zoo.task import Classifier

STUDY = "resnet8"


def write_files(options: argparse.Namespace) -> Path:
    """Write the checkpoint to begin from, what differs from the recipe, and the sweep file, which is returned."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    module = Classifier(ResNet8())
    load_reference_weights(module.network, options.weights)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "reference.ckpt")
    phases = [
        {"class_path": "lightning_edge.Prune", "init_args": {"macs": 0.5, "start": 0, "end": 0, "round_to": 4}},
        {"class_path": "lightning_edge.Quantize", "init_args": {"start": options.epochs - 1}},
    ]
    base = {
        "trainer": {
            "max_epochs": options.epochs,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning_edge.EdgeCompressionCallback", "init_args": {"phases": phases}},
                {
                    "class_path": "lightning_edge.DeviceEvaluationCallback",
                    "init_args": {"targets": ["tflite"], "calibration_batches": 0, "fp32_files": False},
                },
            ],
        },
        "model": {"init_args": {"weight_decay": 0.0}},
        "data": {"init_args": {"folder": str(options.images), "batch_size": 64}},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    text = {
        "base": ["recipe:cifar10-resnet8-int8", "base.yaml"],
        "space": {"prune.macs": options.macs, "model.init_args.learning_rate": options.learning_rates},
        "objectives": {"val_acc": "max", "tflite.size_bytes": "min"},
        "warm_start": "reference.ckpt",
    }
    (folder / f"{STUDY}.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    return folder / f"{STUDY}.yaml"


def test_accuracy(path: Path, loader: Any, channels_last: bool) -> float:
    """Share of the test images that a file classifies right."""
    file = exporters.load(path)
    correct = total = 0
    for images, labels in loader:
        given = images.permute(0, 2, 3, 1).contiguous() if channels_last else images
        correct += int((file(given)[0].argmax(1) == labels).sum())
        total += len(labels)
    return correct / total


def main() -> None:
    """Sweep, and print a line for the reference's file and for each trial, on the test images."""
    parser = argparse.ArgumentParser(description="ResNet-8 on CIFAR-10: a sweep against the MLPerf Tiny reference file")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--macs", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 1e-3])
    parser.add_argument("--output", type=Path, default=Path("sweeps/resnet8"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    status = sweep([str(write_files(options)), "--folder", str(options.output / "trials")])
    front = json.loads((options.output / "trials" / "front.json").read_text())

    data = CIFAR10DataModule(options.images, batch_size=250)
    data.setup("test")
    lines = [
        {
            "file": options.reference.name,
            "bytes": options.reference.stat().st_size,
            "test_acc": test_accuracy(options.reference, data.test_dataloader(), channels_last=True),
        }
    ]
    for trial in front["trials"]:
        if trial["status"] == "complete":
            path = options.output / "trials" / trial["folder"] / "artifacts" / "model-int8.tflite"
            line = {"file": f"trial {trial['number']}", "bytes": path.stat().st_size}
            line |= {"test_acc": test_accuracy(path, data.test_dataloader(), channels_last=False)}
            lines.append(line | {"val_acc": trial["values"]["val_acc"], "front": trial["front"], **trial["settings"]})
    for line in lines:
        print(json.dumps(line), flush=True)
    (options.output / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
