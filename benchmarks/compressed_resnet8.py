"""ResNet-8 on CIFAR-10 at a fraction of its multiplications: pruning, a teacher and int8 training in one fit.

    python benchmarks/compressed_resnet8.py --images FOLDER --weights ic01_resnet8_fp32_weights.npz \
        [--macs 0.5 | --layers '{"stem.*": 0.75, ...}' --round-to 4] [--epochs 12] [--seed 0] [--compile] \
        [--output benchmarks/results/compressed_resnet8]

Starts from the MLPerf Tiny reference's FP32 weights, which are also the teacher's. Trains on 45,000 of the training
images, watches 5,000 (which the reference was trained on), and reports once, at the end, on the 10,000 test images. The
dense network beside it is the reference quantized after training; each pair of files is timed in turn, in this process.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console

from lightning_edge import Distill, EdgeCompressionCallback, Prune, Quantize, exporters, quantize
from lightning_edge.evaluation.evaluate import evaluate_module
from lightning_edge.evaluation.refusals import raise_failures
from lightning_edge.evaluation.settings import EvaluationSettings
from lightning_edge.evaluation.validation import Validation, calibration_inputs
from lightning_edge.measure import Timing, interleaved_latency, torch_threads
from lightning_edge.zoo.cifar10 import CIFAR10DataModule
from lightning_edge.zoo.networks import ResNet8, load_reference_weights
from lightning_edge.zoo.task import Classifier

TARGETS = ["executorch", "coreml", "tflite"]


class EpochLines(L.Callback):
    """One line of validation per epoch."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the metrics of validation."""
        values = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items() if "val" in name}
        print(f"epoch {trainer.current_epoch}: {values}", flush=True)


def dense_files(network: torch.nn.Module, batches: list[Any], folder: Path) -> dict[str, exporters.Artifact]:
    """Export the dense network, quantized after training, to every target."""
    quantized = quantize(network, batches)
    paths = {name: folder / f"dense-int8{exporters.target(name).suffix}" for name in TARGETS}
    return {name: exporters.export(quantized, name, path, batches=batches[:2]) for name, path in paths.items()}


def accuracy(artifact: exporters.Artifact, loader: Any) -> float:
    """Share of test images that a file classifies right."""
    correct = total = 0
    for images, labels in loader:
        correct += int((artifact(images)[0].argmax(1) == labels).sum())
        total += len(labels)
    return correct / total


def main() -> None:
    """Train, export, and print the table with the dense files' lines."""
    parser = argparse.ArgumentParser(description="ResNet-8 on CIFAR-10, pruned, distilled and in int8, in one fit")
    parser.add_argument("--images", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--macs", type=float, default=0.5, help="kept fraction")
    parser.add_argument("--layers", type=json.loads, default=None, help="instead: kept fraction by layer pattern, JSON")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--scope", default="global")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--prune-until", type=int, default=2, help="epoch of the last cut; cuts begin at 0")
    parser.add_argument("--quantize-from", type=int, default=9, help="epoch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    parser.add_argument("--resume", type=Path, default=None, help="the trained.ckpt of an earlier run, to report anew")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/compressed_resnet8"))
    options = parser.parse_args()
    L.seed_everything(options.seed, verbose=False)
    torch.set_num_threads(1)

    data = CIFAR10DataModule(options.images, batch_size=64, validation_size=5000)
    module = Classifier(ResNet8(), learning_rate=options.learning_rate, weight_decay=0.0)
    load_reference_weights(module.network, options.weights)
    teacher = copy.deepcopy(module.network)
    if options.compile:
        module.network.compile()
    compression = EdgeCompressionCallback(
        [
            Prune(
                macs=options.macs if options.layers is None else None,
                layers=options.layers,
                start=0,
                end=options.prune_until,
                criterion=options.criterion,
                scope=options.scope,
                round_to=options.round_to,
            ),
            Distill(teacher, temperature=4.0),
            Quantize(start=options.quantize_from),
        ]
    )
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=[compression, EpochLines()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=options.resume)
    options.output.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(options.output / "trained.ckpt")

    calibration = calibration_inputs(module, data.train_dataloader(), 32)
    with torch_threads(1):
        report = evaluate_module(
            Validation.of_datamodule(module, data, split="test"),
            EvaluationSettings(TARGETS, options.output, timing=Timing(repeats=options.repeats), name="resnet8"),
            calibration=lambda: calibration,
            baseline=compression.baseline(module),
        )
        Console().print(report.table())
        raise_failures(report)
        dense = dense_files(teacher.eval(), calibration, options.output)
        image = next(iter(data.test_dataloader()))[0][:1]
        for name, artifact in dense.items():
            ours = exporters.load(options.output / f"resnet8-int8{exporters.target(name).suffix}")
            line = {
                "target": name,
                "dense_accuracy": accuracy(artifact, data.test_dataloader()),
                "dense_size_bytes": artifact.size_bytes,
                "size_bytes": ours.size_bytes,
            }
            if name != "coreml":  # run by our reference interpreter, whose time says nothing
                calls = {"dense": artifact.timed_call([image]), "ours": ours.timed_call([image])}
                times = interleaved_latency(calls, 20, options.repeats)
                line |= {"dense_p50_ms": times["dense"].p50_ms, "p50_ms": times["ours"].p50_ms}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
