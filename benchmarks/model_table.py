"""Which networks pass on which target: trained in int8 by a real fit, exported, checked and run.

    python benchmarks/model_table.py [--models resnet8,vit] [--targets tflite] [--samples 64] [--output docs/models.md]

Every network trains, is exported and run in a process of its own: 192 steps in float, 48 in int8, to tell noisy random
patterns apart (from the reference weights of MLPerf Tiny with --weights FOLDER). The table is about conversion, not
about accuracy: the agreement columns compare each file with the converted int8 graph on inputs it has not seen, in
steps of the output's quantization.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFERENCE = {
    "resnet8": "ic01_resnet8_fp32_weights.npz",
    "dscnn": "kws01_dscnn_fp32_weights.npz",
    "mobilenet_v1": "vww01_mobilenetv1_025_fp32_weights.npz",
    "autoencoder": "ad01_fc_ae_fp32_weights.npz",
}
PAGE = """# Which networks pass where

Made by `python benchmarks/model_table.py --output docs/models.md`. Every network is trained for 192 steps in float and
48 in int8 by a real `fit`, to tell noisy random patterns apart; then each file is exported, checked from its own
contents and run. The table is about conversion, not accuracy: "top-1", "max steps" and "mean steps" compare the int8
file with the converted graph on {samples} inputs it has not seen, in steps of the output's quantization. Sizes are
bytes on disk. ExecuTorch files run in its own runtime (XNNPACK), TFLite files in LiteRT (XNNPACK delegate), Core ML
packages in the reference interpreter. `hf_vit` and `hf_resnet` are small networks built from `transformers`
configurations.

{table}
"""
HEADER = "| network | parameters | target | result | top-1 | max steps | mean steps | int8 bytes | fp32 bytes | note |"


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

    return {
        "resnet8": (zoo.ResNet8, (3, 32, 32)),
        "dscnn": (zoo.DSCNN, (1, 49, 10)),
        "mobilenet_v1": (zoo.MobileNetV1, (3, 96, 96)),
        "autoencoder": (zoo.Autoencoder, (640,)),
        "mobilenet_v2": (zoo.MobileNetV2, (3, 32, 32)),
        "mobilenet_v3_small": (zoo.MobileNetV3Small, (3, 32, 32)),
        "hf_vit": (vit, (3, 32, 32)),
        "hf_resnet": (resnet, (3, 64, 64)),
    }


def fit(network: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Patterns]:
    """Train a network in float, then in int8; return the float network at the switch, the trained one and the data."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_edge import EdgeCompressionCallback, Quantize

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
    return compression.baseline(task), task, patterns


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


def measure(name: str, targets: list[str], samples: int, weights: Path | None) -> list[dict[str, Any]]:
    """Export one network to every target, and compare each file with the network it came from."""
    import torch

    from lightning_edge import convert, exporters
    from lightning_edge.errors import EdgeError
    from lightning_edge.exporters import checks
    from lightning_edge.measure import Tolerance
    from lightning_edge.network import Inputs
    from lightning_edge.zoo.networks import load_reference_weights

    torch.manual_seed(0)
    build, shape = networks()[name]
    network = build()
    if weights is not None and name in REFERENCE:
        load_reference_weights(network, weights / REFERENCE[name])
    baseline, task, patterns = fit(network, shape)
    quantized = convert(task)
    batches = [Inputs.of(patterns.draw(16)[0]) for _ in range(samples // 16)]
    rows = []
    for target in targets:
        suffix = exporters.target(target).SUFFIX
        row: dict[str, Any] = {"network": name, "target": target, "note": ""}
        row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                with exporters.stage(quantized, target, Path(folder) / f"int8{suffix}") as staged:
                    agreement = checks.agreement_of(staged.network, staged.artifact, batches)
                    row |= {
                        "int8_bytes": staged.artifact.size_bytes,
                        "top1": None if patterns.regression else agreement.top1,
                        "max_steps": agreement.max_steps,
                        "mean_steps": agreement.mean_steps,
                    }
                    contents = staged.artifact.contents
                violations = Tolerance().violations(agreement, "int8")
                row["result"] = "outside tolerance" if violations else "pass"
                if contents.float_ops:
                    row["note"] = f"{len(contents.float_ops)} operations in float"
                file = exporters.export(baseline, target, Path(folder) / f"fp32{suffix}", inputs=batches[0].sample())
                row["fp32_bytes"] = file.size_bytes
            except EdgeError as error:
                row["result"] = type(error).__name__
                row["note"] = str(error).splitlines()[0]
        row["warnings"] = [str(w.message) for w in told if issubclass(w.category, exporters.ExportWarning)]
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table for the docs."""

    def cell(value: Any, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    for row in rows:
        cells = [
            row["network"],
            f"{row['parameters']:,}" if "parameters" in row else "-",
            row["target"],
            row["result"],
            cell(row.get("top1"), ".3f"),
            cell(row.get("max_steps"), ".1f"),
            cell(row.get("mean_steps"), ".2f"),
            cell(row.get("int8_bytes"), ","),
            cell(row.get("fp32_bytes"), ","),
            row["note"].replace("|", "/"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every network in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="")
    parser.add_argument("--targets", default="executorch,coreml,tflite")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--one", default=None, help="measure this network here and print JSON (used by this program)")
    options = parser.parse_args()
    if options.one:
        rows = measure(options.one, options.targets.split(","), options.samples, options.weights)
        print("ROWS " + json.dumps(rows), flush=True)
        return
    rows = []
    for name in options.models.split(",") if options.models else networks():
        arguments = ["--one", name, "--targets", options.targets, "--samples", str(options.samples)]
        arguments += ["--weights", str(options.weights)] if options.weights else []
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
        if found:
            rows += json.loads(found[-1].removeprefix("ROWS "))
        else:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            rows.append({"network": name, "target": options.targets, "result": "crash", "note": last[0]})
        print(f"{name}: {', '.join(row['result'] for row in rows if row['network'] == name)}", file=sys.stderr)
    table = markdown(rows)
    print(table)
    if options.output:
        options.output.write_text(PAGE.format(samples=options.samples, table=table.rstrip()))


if __name__ == "__main__":
    main()
