"""When int8 training is worth it: the same epochs spent in float before PTQ, in folded QAT, or in QAT with BatchNorm.

    python benchmarks/when_qat.py --images CIFAR10_FOLDER --weights ic01_resnet8_fp32_weights.npz \
        --speech fsdd_mfcc_f16.npz [--networks resnet8,dscnn] [--rate-factor 10] [--output artifacts/when_qat]

For each network and seed one float start, and from it three trainings of the same length on the same batches in the
same order: ``ptq`` (float, then `quantize` on 32 training batches), ``folded`` (`Quantize(start=0)`) and ``live``
(BatchNorm learns until the last epoch begins). Each converted int8 network sees the test set once, after the last step;
nothing is selected on it. One JSON per training; those that exist are not run again. The tables are printed at the end,
``--report`` prints them alone.

ResNet-8 starts from the MLPerf Tiny reference weights, the others from nothing, with a start of their own per seed.
CIFAR-10: a fixed part of the training and of the test images. Spoken digits (FSDD), split in two ways: ``dscnn`` holds
out two of the six speakers with each seed, so that three seeds test every recording once; ``dscnn_takes`` is the
official split, takes 0 to 4 of every speaker and digit.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_edge import EdgeCompressionCallback, Quantize, convert, quantize
from lightning_edge.zoo.augmentation import mirror_and_shift
from lightning_edge.zoo.image_files import read_images
from lightning_edge.zoo.networks import DSCNN, MobileNetV2, ResNet8, load_reference_weights
from lightning_edge.zoo.task import Classifier

VARIANTS = ("start", "ptq", "folded", "live")
CALIBRATION_BATCHES = 32
Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Study:
    """How one network is trained.

    Attributes:
        epochs: Epochs of each of the three trainings that are compared.
        learning_rate: Where their cosine schedule starts; it ends at 0.
        float_epochs: Epochs of the float training before, 0 where weights are given.
        float_learning_rate: Where its cosine schedule starts.
        batch_size: Samples in a batch; the last, smaller batch of an epoch is left out.
        train_samples: Training samples, ``None``: all.
        test_samples: Test samples, ``None``: all.
    """

    epochs: int
    learning_rate: float
    float_epochs: int
    float_learning_rate: float
    batch_size: int
    train_samples: int | None
    test_samples: int | None


STUDIES = {
    "resnet8": Study(3, 1e-4, 0, 0.0, 64, 6400, 5000),
    "dscnn": Study(4, 1e-4, 12, 1e-3, 32, None, None),
    "dscnn_takes": Study(4, 1e-4, 12, 1e-3, 32, None, None),
    "mobilenet_v2": Study(3, 3e-4, 10, 3e-3, 64, 6400, 5000),
}
TITLES = {
    "resnet8": "ResNet-8, CIFAR-10",
    "dscnn": "DS-CNN, spoken digits, unseen speakers",
    "dscnn_takes": "DS-CNN, spoken digits, official split",
    "mobilenet_v2": "MobileNetV2 0.35, CIFAR-10",
}


class Batches:
    """Training batches whose order and augmentation depend on the seed and the epoch, and on nothing else.

    A DataLoader draws from the global random state, which dropout draws from too; this keeps the data the same whatever
    the network does.

    Args:
        samples: Inputs (N, ...), any type, and labels (N,).
        batch_size: Samples in a batch.
        seed: Seed of all epochs.
        augment: Whether to mirror and shift images.
    """

    def __init__(self, samples: Samples, batch_size: int, seed: int, augment: bool) -> None:
        self.inputs, self.labels = samples
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.epoch = 0

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[Samples]:
        """Go through the samples once, in the order of the next epoch."""
        seed = 1000 * self.seed + self.epoch
        self.epoch += 1
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        for number in range(len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            inputs = self.inputs[chosen].float()
            if self.augment:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(100_000 * seed + number)
                    inputs = mirror_and_shift(inputs, 4)
            yield inputs, self.labels[chosen]


def cifar10(folder: Path, study: Study) -> Callable[[int], tuple[Samples, Samples]]:
    """Read the fixed parts of CIFAR-10: the same for every seed."""

    def part(split: Any, size: int | None) -> Samples:
        images, labels = (torch.from_numpy(array) for array in read_images(folder, split))
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:size]
        return images[chosen], labels[chosen]

    train, test = part("train", study.train_samples), part("test", study.test_samples)
    return lambda seed: (train, test)


def spoken_digits(path: Path, by_speaker: bool) -> Callable[[int], tuple[Samples, Samples]]:
    """Read the features of the spoken digits; a seed holds out two speakers, or the first five takes are held out."""
    with np.load(path) as arrays:
        features = torch.from_numpy(arrays["mfcc"].astype(np.float32))[:, None]
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
        speakers = torch.from_numpy(arrays["speaker"].astype(np.int64))
        takes = torch.from_numpy(arrays["index"].astype(np.int64))

    def split(seed: int) -> tuple[Samples, Samples]:
        held_out = speakers // 2 == seed % 3 if by_speaker else takes < 5
        return (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])

    return split


def train(network: nn.Module, batches: Batches, epochs: int, learning_rate: float, phases: list[Quantize]) -> L.Trainer:
    """Train a classifier in place; AdamW without weight decay, cosine schedule to 0."""
    torch.manual_seed(batches.seed)  # dropout
    module = Classifier(network, learning_rate=learning_rate, weight_decay=0.0)
    module.train()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[EdgeCompressionCallback(list(phases))] if phases else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    return trainer


def right(network: nn.Module, samples: Samples) -> Tensor:
    """Which samples (N,) a network classifies right."""
    with torch.no_grad():
        pairs = zip(samples[0].split(250), samples[1].split(250), strict=True)
        return torch.cat([network(inputs.float()).argmax(1) == labels for inputs, labels in pairs])


def packed(correct: Tensor) -> str:
    """Write (N,) of true and false as hexadecimal, for differences sample by sample."""
    return np.packbits(correct.numpy()).tobytes().hex()


def run(name: str, study: Study, seed: int, data: tuple[Samples, Samples], weights: Path, output: Path) -> None:
    """Run what is missing of one network and seed, and write one JSON for each."""
    paths = {variant: output / f"{name}-seed{seed}-{variant}.json" for variant in VARIANTS}
    missing = [variant for variant in VARIANTS if not paths[variant].exists()]
    for path in (paths[variant] for variant in VARIANTS if variant not in missing):
        settings = json.loads(path.read_text())["settings"]
        if settings != vars(study):
            raise SystemExit(f"{path} was run with {settings}, not {vars(study)}; give another --output")
    if not missing:
        return
    samples, test = data
    augment = not name.startswith("dscnn")
    began = time.process_time()
    torch.manual_seed(seed)
    start: nn.Module
    if name == "resnet8":
        start = ResNet8()
        load_reference_weights(start, weights)
    else:
        start = DSCNN(num_classes=10) if name.startswith("dscnn") else MobileNetV2(0.35)
        batches = Batches(samples, study.batch_size, seed + 500, augment)
        train(start, batches, study.float_epochs, study.float_learning_rate, [])
    for variant in missing:
        network = copy.deepcopy(start)
        batches = Batches(samples, study.batch_size, seed, augment)
        phases = {
            "folded": [Quantize(start=0)],
            "live": [Quantize(start=0, fold_batch_norm=study.epochs - 1)],
        }.get(variant, [])
        if variant != "start":
            began = time.process_time()
            trainer = train(network, batches, study.epochs, study.learning_rate, phases)
        spent = time.process_time() - began
        line: dict[str, Any] = {"network": name, "seed": seed, "variant": variant, "settings": vars(study)}
        if phases:
            quantized: nn.Module = trainer.lightning_module
        else:
            line["float_correct"] = packed(right(network.eval(), test))
            calibration = Batches(samples, study.batch_size, seed, augment)
            quantized = quantize(
                network, [inputs for (inputs, _), _ in zip(calibration, range(CALIBRATION_BATCHES), strict=False)]
            )
        line["int8_correct"] = packed(right(convert(quantized), test))
        line |= {"train_samples": len(samples[1]), "test_samples": len(test[1]), "training_cpu_seconds": round(spent)}
        staged = paths[variant].with_suffix(".part")
        staged.write_text(json.dumps(line, indent=1) + "\n")
        os.replace(staged, paths[variant])
        accuracy = unpacked(line, "int8_correct").mean()
        print(f"{name} seed {seed} {variant}: int8 {accuracy:.4f}, {spent:.0f} s of CPU time", flush=True)


def unpacked(line: dict[str, Any], key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Read which samples (N,) were classified right, 1.0 or 0.0."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(line[key]), np.uint8))
    return bits[: line["test_samples"]].astype(np.float64)


def report(output: Path) -> str:
    """Give the two tables in Markdown, of the networks that are there; in percent and percentage points."""
    lines = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
    found = {(line["network"], line["seed"], line["variant"]): line for line in lines}
    accuracies = [
        "| network | seeds | float start | its PTQ | float, trained on | (a) its PTQ | (b) QAT, folded at the start |"
        " (c) QAT, BatchNorm learning | standard error of one |",
        "|" + " --- |" * 9,
    ]
    differences = [
        "| network | difference | mean | each seed | deviation over seeds | standard error from test samples |",
        "|" + " --- |" * 6,
    ]
    for name, title in TITLES.items():
        seeds = sorted({seed for network, seed, _ in found if network == name})
        seeds = [seed for seed in seeds if all((name, seed, variant) in found for variant in VARIANTS)]
        if not seeds:
            continue
        results = {
            key: [100 * unpacked(found[name, seed, variant], f"{kind}_correct") for seed in seeds]
            for key, variant, kind in (
                ("start", "start", "float"),
                ("start_ptq", "start", "int8"),
                ("float", "ptq", "float"),
                ("ptq", "ptq", "int8"),
                ("folded", "folded", "int8"),
                ("live", "live", "int8"),
            )
        }
        cells = [spread([values.mean() for values in result]) for result in results.values()]
        share = mean(values.mean() for values in results["ptq"]) / 100
        error = 100 * math.sqrt(share * (1 - share) / len(results["ptq"][0]))
        accuracies.append(f"| {title} | {len(seeds)} | {' | '.join(cells)} | {error:.2f} |")
        for label, one, other in (
            ("(b) - (a)", "folded", "ptq"),
            ("(c) - (a)", "live", "ptq"),
            ("(c) - (b)", "live", "folded"),
        ):
            pairs = [mine - theirs for mine, theirs in zip(results[one], results[other], strict=True)]
            each = [pair.mean() for pair in pairs]
            # The same test samples for every seed are averaged first; different ones are simply more samples.
            joined = np.concatenate(pairs) if name == "dscnn" else np.mean(pairs, axis=0)
            error = joined.std(ddof=1) / math.sqrt(len(joined))
            deviation = f"{stdev(each):.2f}" if len(each) > 1 else "-"
            values = ", ".join(f"{value:+.2f}" for value in each)
            differences.append(f"| {title} | {label} | {mean(each):+.2f} | {values} | {deviation} | {error:.2f} |")
    return "\n".join([*accuracies, "", *differences])


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description="Folded QAT, QAT with BatchNorm, and float training with PTQ")
    parser.add_argument("--images", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="ic01_resnet8_fp32_weights.npz")
    parser.add_argument("--speech", type=Path, help="fsdd_mfcc_f16.npz")
    parser.add_argument("--networks", default=",".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate-factor", type=float, default=1.0, help="of the learning rate of the three trainings")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    parser.add_argument("--output", type=Path, default=Path("artifacts/when_qat"))
    options = parser.parse_args()
    if not options.report:
        for name in options.networks.split(","):
            needed = {"dscnn": ["speech"], "dscnn_takes": ["speech"], "resnet8": ["images", "weights"]}
            for argument in needed.get(name, ["images"]):
                if getattr(options, argument) is None:
                    parser.error(f"{name} needs --{argument}")
            if name not in STUDIES:
                parser.error(f"--networks names {name!r}; there are {', '.join(STUDIES)}")
        torch.set_num_threads(1)
        options.output.mkdir(parents=True, exist_ok=True)
        for name in options.networks.split(","):
            study = replace(STUDIES[name], learning_rate=STUDIES[name].learning_rate * options.rate_factor)
            speech = name.startswith("dscnn")
            split = spoken_digits(options.speech, name == "dscnn") if speech else cifar10(options.images, study)
            for seed in range(options.seeds):
                run(name, study, seed, split(seed), options.weights, options.output)
    print(report(options.output))


if __name__ == "__main__":
    main()
