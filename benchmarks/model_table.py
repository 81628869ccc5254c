"""Which networks pass on which target: int8 by post-training quantization, exported, checked and run.

    python benchmarks/model_table.py [--models resnet8,vit] [--targets tflite] [--samples 64] [--output docs/models.md]

Every network is exported in a process of its own. Weights are random with BatchNorm statistics of random images (and
the reference weights of MLPerf Tiny with --weights FOLDER): the table is about conversion, not about accuracy, so the
agreement columns compare each file with the converted int8 graph, in steps of the output's quantization.
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


def measure(name: str, targets: list[str], samples: int, weights: Path | None) -> list[dict[str, Any]]:
    """Export one network to every target, and compare each file with the network it came from."""
    import torch

    from lightning_edge import exporters, quantize
    from lightning_edge.errors import EdgeError
    from lightning_edge.exporters import checks
    from lightning_edge.measure import Tolerance
    from lightning_edge.network import Inputs
    from lightning_edge.zoo.networks import load_reference_weights

    torch.manual_seed(0)
    build, shape = networks()[name]
    network = build().train()
    with torch.no_grad():
        for _ in range(8):
            network(torch.randn(16, *shape))
    network.eval()
    if weights is not None and name in REFERENCE:
        load_reference_weights(network, weights / REFERENCE[name])
    quantized = quantize(network, [torch.randn(16, *shape) for _ in range(8)])
    batches = [Inputs.of(torch.randn(16, *shape)) for _ in range(samples // 16)]
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
                        "top1": agreement.top1,
                        "max_steps": agreement.max_steps,
                        "mean_steps": agreement.mean_steps,
                    }
                    contents = staged.artifact.contents
                violations = Tolerance().violations(agreement, "int8")
                row["result"] = "outside tolerance" if violations else "pass"
                if contents.float_ops:
                    row["note"] = f"{len(contents.float_ops)} operations in float"
                file = exporters.export(network, target, Path(folder) / f"fp32{suffix}", inputs=batches[0].sample())
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
        options.output.write_text(table)


if __name__ == "__main__":
    main()
