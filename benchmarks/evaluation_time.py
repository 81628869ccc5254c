"""What validating files takes: CIFAR-10's test images through the int8 files of ResNet-8, by DeviceEvaluationCallback.

    python benchmarks/evaluation_time.py --images FOLDER --weights ic01_resnet8_fp32_weights.npz
        [--targets executorch,coreml,tflite,onnx] [--samples 10000] [--few 64]

Evaluates twice, with all images and with a few: the difference is what images take, without the exports. Prints seconds
by the clock and of processors, and both reports' accuracies. The network trains for one batch in int8 from the
reference's weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge import DeviceEvaluationCallback, EdgeCompressionCallback, Quantize
from lightning_edge.zoo.cifar10 import CIFAR10DataModule
from lightning_edge.zoo.networks import ResNet8, load_reference_weights
from lightning_edge.zoo.task import Classifier


def processors_s() -> float:
    """Seconds of processors so far, of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def evaluate(options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Train for one batch, export, and run every file on so many test images."""
    L.seed_everything(0)
    module = Classifier(ResNet8())
    load_reference_weights(module.network, options.weights)
    data = CIFAR10DataModule(options.images, batch_size=64)
    data.setup("test")
    batches = [*data.test_dataloader()]
    images = TensorDataset(*(torch.cat(part)[:samples] for part in zip(*batches, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        evaluation = DeviceEvaluationCallback(
            options.targets.split(","), folder, calibration_batches=0, fp32_files=False, strict=False
        )
        trainer = L.Trainer(
            max_epochs=1,
            limit_train_batches=1,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EdgeCompressionCallback([Quantize(start=0)]), evaluation],
        )
        clock, processors = time.monotonic(), processors_s()
        trainer.fit(module, DataLoader(images, batch_size=64), DataLoader(images, batch_size=64))
        assert evaluation.report is not None
        return {
            "samples": samples,
            "clock_s": round(time.monotonic() - clock, 1),
            "processors_s": round(processors_s() - processors, 1),
            "val_acc": {row.target: row.error or row.metrics.get("val_acc") for row in evaluation.report.rows},
        }


def main() -> None:
    """Print a line for a few images, one for all, and the difference."""
    parser = argparse.ArgumentParser(description="what validating files takes")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--targets", default="executorch,coreml,tflite,onnx")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--few", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [evaluate(options, samples) for samples in (options.few, options.samples)]
    few, many = lines
    lines.append(
        {name: round(many[name] - few[name], 1) for name in ("samples", "clock_s", "processors_s")}
        | {"line": "difference"}
    )
    for line in lines:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
