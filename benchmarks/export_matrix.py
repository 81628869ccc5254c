"""Which networks pass on which target in which scheme: trained by a real fit, exported, checked, run and timed.

    python benchmarks/export_matrix.py [--models resnet8,recipe:quickstart] [--targets tflite] [--schemes fp16,sparse]
        [--samples 512] [--repeats 100] [--weights FOLDER] [--output docs/models.md]

Every network trains, is exported and run in a process of its own: 192 steps in float, 48 in int8, to tell noisy random
patterns apart (from the reference weights of MLPerf Tiny with --weights FOLDER); those of recipes train as these say,
on digits. The table is about conversion, not about accuracy: the agreement columns compare each file with the network
it came from on inputs it has not seen, for int8 in steps of the output's quantization. Latencies are of one sample on
one thread, the files of a target in turn; seconds are those of the export alone, the network being converted already.
Schemes are those of the float network that the target has, all if none are named; for ``sparse`` the smaller half of
each weight is set to zero first.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REFERENCE = {
    "resnet8": "ic01_resnet8_fp32_weights.npz",
    "dscnn": "kws01_dscnn_fp32_weights.npz",
    "mobilenet_v1": "vww01_mobilenetv1_025_fp32_weights.npz",
    "autoencoder": "ad01_fc_ae_fp32_weights.npz",
}
RECIPES = ("recipe:quickstart", "recipe:digits-pruned-int8")
PAGE = """# Which networks pass where

Made by `python benchmarks/export_matrix.py --output docs/models.md`. Every network is trained for 192 steps in float
and 48 in int8 by a real `fit`, to tell noisy random patterns apart; then each file is exported, checked from its own
contents and run. Those of recipes are trained as these say. The table is about conversion, not accuracy.

- **top-1, max, mean**: agreement of the file with the network it came from (int8: the converted graph) on {samples}
  inputs it has not seen; max and mean of int8 files in steps of the output's quantization, of others as the largest
  difference over the largest output.
- **its own rounding moves it by**: the worst value lies more than 3 steps off, and the network in float32 from
  itself in float64 as far ([evaluation](evaluation.md#agreement)).
- **bytes**: bytes on disk.
- **float**: operations of an int8 file that compute in float.
- **outside**: share of the multiply-accumulates that run outside the target's delegate, as far as runtime or file tell.
- **/ fp32**: median latency of the file over that of the float file on the same runtime, {repeats} calls of each file
  of a target in turn, one thread, in a process of each, all pinned to one CPU of a shared machine: {cpu}. Core ML's is
  not measured, its packages run in the reference interpreter.
- **s**: seconds to export, the network being converted already.

`hf_*` are small networks built from `transformers` configurations.

{table}

## Schemes

The float networks of the table above in each [scheme](schemes.md) that the target has, held against the float network
within the scheme's own tolerance; for `sparse` the smaller half of each weight is set to zero first. What is refused by
the gate has lost too much in so few bits without training.

{schemes}
"""
COLUMNS = (
    "network",
    "target",
    "scheme",
    "result",
    "top-1",
    "max",
    "mean",
    "bytes",
    "float",
    "outside",
    "/ fp32",
    "s",
)


def networks() -> dict[str, tuple[Callable[[], Any], tuple[int, ...]]]:
    """Every network of the table, with the shape of one sample."""
    from torch import nn

    from lightning_edge.zoo import networks as zoo

    class Logits(nn.Module):
        """A transformers classifier that returns its logits."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return self.model(pixel_values=pixel_values).logits

    def vit() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
            num_labels=10,
            attn_implementation="sdpa",
        )
        return Logits(ViTForImageClassification(config))

    def resnet() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10
        )
        return Logits(ResNetForImageClassification(config))

    def mobilenet_v2() -> nn.Module:
        from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

        # Its TensorFlow padding pads every depthwise layer by an operation of its own.
        config = MobileNetV2Config(depth_multiplier=0.35, image_size=32, num_labels=10, tf_padding=False)
        return Logits(MobileNetV2ForImageClassification(config))

    def mobilevit() -> nn.Module:
        from transformers import MobileViTConfig, MobileViTForImageClassification

        config = MobileViTConfig(
            image_size=64,
            hidden_sizes=[32, 48, 64],
            neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 128],
            num_labels=10,
        )
        return Logits(MobileViTForImageClassification(config))

    return {
        "digits_cnn": (zoo.DigitsCNN, (1, 8, 8)),
        "resnet8": (zoo.ResNet8, (3, 32, 32)),
        "dscnn": (zoo.DSCNN, (1, 49, 10)),
        "mobilenet_v1": (zoo.MobileNetV1, (3, 96, 96)),
        "autoencoder": (zoo.Autoencoder, (640,)),
        "mobilenet_v2": (zoo.MobileNetV2, (3, 32, 32)),
        "mobilenet_v2_96": (zoo.MobileNetV2, (3, 96, 96)),
        "mobilenet_v3_small": (zoo.MobileNetV3Small, (3, 32, 32)),
        "mobilenet_v3_small_224": (partial(zoo.MobileNetV3Small, width=1.0), (3, 224, 224)),
        "hf_vit": (vit, (3, 32, 32)),
        "hf_resnet": (resnet, (3, 64, 64)),
        "hf_mobilenet_v2": (mobilenet_v2, (3, 32, 32)),
        "hf_mobilevit": (mobilevit, (3, 64, 64)),
    }


@dataclass
class Trained:
    """What a fit left.

    Attributes:
        baseline: The float network, as it was at the switch to int8.
        task: The module that was trained, its network quantized.
        batches: Inputs it has not seen.
        regression: Whether its outputs are no classes.
    """

    baseline: Any
    task: Any
    batches: list[Any]
    regression: bool


def fit_recipe(name: str, samples: int) -> Trained:
    """Train as a recipe says, without the exports at its end."""
    from lightning_edge import DeviceEvaluationCallback, EdgeCompressionCallback
    from lightning_edge.cli.main import EdgeCLI, EdgeParser
    from lightning_edge.cli.trainer import EdgeTrainer
    from lightning_edge.network import Inputs

    quiet = [f"--trainer.{part}=false" for part in ("logger", "enable_checkpointing", "enable_progress_bar")]
    arguments = ["--config", name, *quiet]
    cli = EdgeCLI(
        trainer_class=EdgeTrainer, parser_class=EdgeParser, save_config_callback=None, args=arguments, run=False
    )
    trainer: Any = cli.trainer
    trainer.callbacks = [part for part in trainer.callbacks if not isinstance(part, DeviceEvaluationCallback)]
    trainer.fit(cli.model, datamodule=cli.datamodule)
    (compression,) = (part for part in trainer.callbacks if isinstance(part, EdgeCompressionCallback))
    batches = [Inputs.of(images) for images, _ in cli.datamodule.val_dataloader()]
    return Trained(compression.baseline(cli.model), cli.model, batches[: samples // len(batches[0].tensors[0])], False)


def fit(network: Any, shape: tuple[int, ...], samples: int) -> Trained:
    """Train a network in float, then in int8, on patterns."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_edge import EdgeCompressionCallback, Quantize
    from lightning_edge.network import Inputs

    class Task(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.mse_loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    with torch.no_grad():
        outputs = network.eval()(torch.randn(2, *shape)).shape[1:]
    patterns = Patterns(shape, outputs)
    data = DataLoader(TensorDataset(*patterns.draw(48 * 16)), 16)
    compression = EdgeCompressionCallback([Quantize(start=4)])
    trainer = L.Trainer(
        max_epochs=5,
        callbacks=[compression],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Task()
    task.train()
    trainer.fit(task, data)
    batches = [Inputs.of(patterns.draw(16)[0]) for _ in range(samples // 16)]
    return Trained(compression.baseline(task), task, batches, patterns.regression)


class Patterns:
    """Random patterns, one a class, with noise; a network of the inputs' own shape is to give back its input."""

    def __init__(self, shape: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        import torch

        self.prototypes = torch.randn(outputs[0], *shape)
        self.regression = outputs == shape

    def draw(self, samples: int) -> tuple[Any, Any]:
        """Draw inputs (samples, ...) and what the network shall answer."""
        import torch

        labels = torch.randint(0, len(self.prototypes), (samples,))
        inputs = self.prototypes[labels] + torch.randn(samples, *self.prototypes.shape[1:])
        targets = inputs if self.regression else 4 * torch.nn.functional.one_hot(labels, len(self.prototypes)).float()
        return inputs, targets


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one network, and export it to every target in float, in int8 and in every scheme that it has."""
    import torch

    from lightning_edge import convert, exporters
    from lightning_edge.exporters import deployable
    from lightning_edge.zoo.networks import load_reference_weights

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # this process and those of the files: each CPU has neighbors of its own
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if name in RECIPES:
        trained = fit_recipe(name, options.samples)
    else:
        build, shape = networks()[name]
        network = build()
        if options.weights is not None and name in REFERENCE:
            load_reference_weights(network, options.weights / REFERENCE[name])
        trained = fit(network, shape, options.samples)
    batches, regression = trained.batches, trained.regression
    forms = {"fp32": deployable(trained.baseline, batches[0].sample()), "int8": convert(trained.task)}
    forms["sparse"] = deployable(halved(trained.baseline), batches[0].sample())
    rows: list[dict[str, Any]] = []
    for target in options.targets.split(","):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
            loaded: dict[str, tuple[int, Any]] = {}
            taken = exporters.target(target).schemes
            asked = taken if options.schemes is None else options.schemes.split(",")
            for scheme in ("fp32", "int8", *(scheme for scheme in taken if scheme in asked)):
                row: dict[str, Any] = {"network": name, "target": target, "scheme": scheme}
                path = Path(folder) / scheme
                staged = write(row, forms.get(scheme, forms["fp32"]), target, path, batches, regression)
                if staged is not None:
                    loaded[scheme] = (len(rows), files.enter_context(staged))
                rows.append(row)
            times = timed({scheme: staged for scheme, (_, staged) in loaded.items()}, batches[0], options.repeats)
            for scheme in loaded:
                if scheme in times and "fp32" in times and scheme != "fp32":
                    rows[loaded[scheme][0]]["/ fp32"] = times[scheme] / times["fp32"]
    return rows


def halved(network: Any) -> Any:
    """Give a copy with the smaller half of each weight set to zero."""
    import torch

    network = copy.deepcopy(network)
    with torch.no_grad():
        for weight in (parameter for parameter in network.parameters() if parameter.dim() > 1):
            weight[weight.abs() < weight.abs().median()] = 0.0
    return network


def write(
    row: dict[str, Any], network: Any, target: str, path: Path, batches: list[Any], regression: bool
) -> Any | None:
    """Export one network, and put into its row what came of it; gives the file, loaded, if there is one."""
    from lightning_edge import exporters
    from lightning_edge.errors import EdgeError
    from lightning_edge.exporters.verify import schemes
    from lightning_edge.exporters.verify.agreement import agreement_of, judge_file, rounding_of
    from lightning_edge.measure import Tolerance

    scheme = row["scheme"]
    chosen: dict[str, Any] = {} if scheme in ("fp32", "int8") else {"scheme": scheme}
    if (target, scheme) == ("coreml", "int4_weight_only"):
        chosen["minimum_ios"] = 18
    suffix = exporters.target(target).suffix
    staged = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            start = time.perf_counter()
            staged = exporters.stage(network, target, path.with_suffix(suffix), **chosen)
            row["s"] = time.perf_counter() - start
            agreement = agreement_of(staged.network, staged.artifact, batches)
        except (EdgeError, ValueError) as error:
            if staged is not None:
                staged.discard()
            row["result"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            return None
    artifact, contents = staged.artifact, staged.artifact.contents
    tolerance = schemes.tolerance(scheme) if chosen else Tolerance()
    judgement = judge_file(network, artifact, agreement, tolerance, lambda: rounding_of(network, artifact, batches))
    passed = judgement.grade in ("exact", "close")
    places = contents.placements
    row |= {
        "result": f"pass: {judgement.grade}" if passed else str(judgement),
        "top-1": None if regression else agreement.top1,
        "max": agreement.max_steps if scheme == "int8" else agreement.max_relative,
        "mean": agreement.mean_steps if scheme == "int8" else None,
        "bytes": artifact.size_bytes,
        "float": len(contents.float_compute_ops) + len(contents.float_ops) if scheme == "int8" else None,
        "outside": None if places is None else places.fallback_share,
    }
    return staged


def timed(files: dict[str, Any], inputs: Any, repeats: int) -> dict[str, float]:
    """Time one sample on every file that its target's own runtime runs, in turn; median milliseconds."""
    from lightning_edge.measure import interleaved_latency
    from lightning_edge.network import sort_keywords

    sample = sort_keywords(inputs.sample()).tensors
    runs = {
        scheme: staged.artifact.timed_call(sample)
        for scheme, staged in files.items()
        if not staged.artifact.runner.is_reference
    }
    return {scheme: found.p50_ms for scheme, found in interleaved_latency(runs, 10, repeats).items()} if runs else {}


FORMS = {"top-1": ".3f", "max": ".2g", "mean": ".2f", "bytes": ",", "outside": ".0%"}
FORMS |= {"/ fp32": ".2f", "s": ".1f"}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for the docs."""

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        return "-" if value is None else format(value, FORMS.get(column, "")).replace("|", "/")

    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * 4 + " ---: |" * (len(COLUMNS) - 4)]
    lines += [f"| {' | '.join(cell(row, column) for column in COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cpu() -> str:
    """Name this machine's processor, with the instructions that int8 kernels are chosen by."""
    import torch

    found = torch.cpu.get_capabilities()
    kinds = [
        kind
        for kind in ("avx2", "avx512_f", "avx_vnni", "avx512_vnni", "amx_int8", "dotprod", "i8mm")
        if found.get(kind)
    ]
    return f"{found.get('cpu_name') or platform.machine()} ({', '.join(kinds)})"


def main() -> None:
    """Run every network in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="")
    parser.add_argument("--targets", default="executorch,coreml,tflite,onnx")
    parser.add_argument(
        "--schemes", default=None, help="schemes of the float network beside fp32 and int8; all if none"
    )
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--one", default=None, help="measure this network here and print JSON (used by this program)")
    options = parser.parse_args()
    if options.one:
        print("ROWS " + json.dumps(measure(options.one, options)), flush=True)
        return
    rows = []
    for name in options.models.split(",") if options.models else (*networks(), *RECIPES):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", name], capture_output=True, text=True, check=False
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
        if found:
            rows += json.loads(found[-1].removeprefix("ROWS "))
        else:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            rows.append({"network": name, "result": f"crash: {last[0]}"})
        print(f"{name}: {', '.join(row['result'] for row in rows if row['network'] == name)}", file=sys.stderr)
    plain = [row for row in rows if row.get("scheme") in ("fp32", "int8", None)]
    tables = {"table": markdown(plain), "schemes": markdown([row for row in rows if row not in plain])}
    print("\n".join(tables.values()))
    if options.output:
        tables = {name: table.rstrip() for name, table in tables.items()}
        options.output.write_text(PAGE.format(samples=options.samples, repeats=options.repeats, cpu=cpu(), **tables))


if __name__ == "__main__":
    main()
