"""ResNet-8 on CIFAR-10: int8 training from the reference's FP32 weights, three files, beside the reference's own file.

    python benchmarks/resnet8_cifar10.py --images FOLDER --weights ic01_resnet8_fp32_weights.npz \
        --reference pretrainedResnet_quant.tflite [--epochs 3] [--seed 0] [--output benchmarks/results/resnet8]

Trains on 45,000 of the training images and reports once on the 10,000 test images. The reference file (MLPerf Tiny
``ic01``, post-training quantized, calibrated on test images) is run on the same images and timed in turn with ours, in
this process. These are not MLPerf results.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from lightning_edge import EdgeCompressionCallback, Quantize, exporters
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.refusals import raise_failures
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation, calibration_inputs
from lightning_edge.measure import Timing, interleaved_latency, torch_threads
from lightning_edge.network import Inputs
from lightning_edge.zoo.cifar10 import CIFAR10DataModule
from lightning_edge.zoo.networks import ResNet8, load_reference_weights
from lightning_edge.zoo.task import Classifier


def evaluate_reference(path: Path, loader: Any, ours: Path, repeats: int) -> dict[str, Any]:
    """Run the reference on the test images, and time it in turn with our file for the same runtime."""
    reference, own = exporters.load(path), exporters.load(ours)
    correct = total = 0
    images = labels = torch.empty(0)
    for images, labels in loader:
        scores = reference(images.permute(0, 2, 3, 1).contiguous())[0]
        correct += int((scores.argmax(1) == labels).sum())
        total += len(labels)
    sample = images[:1]
    nhwc = sample.permute(0, 2, 3, 1).contiguous()
    calls = {"reference": reference.timed_call([nhwc]), "ours": own.timed_call([sample])}
    times = interleaved_latency(calls, 20, repeats)
    return {
        "accuracy": correct / total,
        "images": total,
        "size_bytes": reference.size_bytes,
        "runtime": reference.runner.runtime,
        "p50_ms": times["reference"].p50_ms,
        "ours_p50_ms": times["ours"].p50_ms,
        "ours_over_reference": times["ours"].p50_ms / times["reference"].p50_ms,
    }


def main() -> None:
    """Train, export, and print the table with the reference's line."""
    parser = argparse.ArgumentParser(description="ResNet-8 on CIFAR-10 against the MLPerf Tiny reference file")
    parser.add_argument("--images", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--reference", type=Path, default=None)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--fold-batch-norm", type=int, default=None, help="epoch; default: at the start")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/resnet8"))
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightning_edge").setLevel(logging.INFO)

    data = CIFAR10DataModule(options.images, batch_size=64)
    module = Classifier(ResNet8(), learning_rate=options.learning_rate, weight_decay=0.0)
    load_reference_weights(module.network, options.weights)
    compression = EdgeCompressionCallback([Quantize(start=0, fold_batch_norm=options.fold_batch_norm)])
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[compression],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(options.output / "trained.ckpt")

    validation = Validation.of_datamodule(module, data, split="test")
    calibration: list[Inputs] = calibration_inputs(module, data.train_dataloader(), 32)
    with torch_threads(1):
        report = evaluate_module(
            validation,
            EvaluationSettings(
                ["executorch", "coreml", "tflite"],
                options.output,
                timing=Timing(repeats=options.repeats),
                name="resnet8",
            ),
            calibration=lambda: calibration,
            baseline=compression.baseline(module),
        )
        Console().print(report.table())
        raise_failures(report)
        if options.reference is not None:
            ours = options.output / "resnet8-int8.tflite"
            line = evaluate_reference(options.reference, data.test_dataloader(), ours, options.repeats)
            print(json.dumps({"reference": options.reference.name, **line}))


if __name__ == "__main__":
    main()
