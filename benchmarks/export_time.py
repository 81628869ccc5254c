"""From a float network to int8 files: seconds of ours and of each library's own flow, on the same networks and images.

    python benchmarks/export_time.py [--networks resnet50,mobilenet_v3_small] [--targets onnx,tflite] [--cores 2]
        [--rounds 3] [--samples 16] [--output FILE.json]

Every figure is of a process of its own that has imported torch, built the network and then begins to count, with what a
flow imports; the flows of a target take turns, and medians are told. Ours is `quantize` and `export`, which also reads
the file back, runs it and compares it with the network. Theirs:

- PT2E: torch.export, prepare, calibrate and convert with ExecuTorch's XNNPACKQuantizer;
- ExecuTorch, Core ML: that network by ``to_edge_transform_and_lower`` and coremltools' ``convert``;
- TFLite: PT2E with LiteRT's quantizer, and its ``convert``;
- ONNX: ``torch.onnx.export`` of the float network and ``quantize_static`` of ONNX Runtime, calibration included.

PT2E exports for a batch of one, as a file needs it, and is calibrated image by image; ours takes batches of eight.
Figures are seconds of wall time, and of CPU time with processes that have ended, which a busy machine changes less. The
last rows are all targets from one network, one after the other and two at once (with ``--cores 2``), with the peak
memory of the user's process, beside that of a float training of the same network.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

TARGETS = ("executorch", "coreml", "tflite", "onnx")
BATCH = 8
TRAINING_STEPS = 3
LIMIT_S = 3600


def networks() -> dict[str, tuple[Callable[[], Any], tuple[int, ...]]]:
    """Networks by name, with the shape of one sample."""
    import transformers
    from torch import nn

    from lightning_edge.zoo.networks import DigitsCNN, MobileNetV3Small

    class Chosen(nn.Module):
        """A network of transformers that takes images and gives some of its outputs."""

        def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
            super().__init__()
            self.model, self.names = model, names

        def forward(self, images: Any) -> Any:
            outputs = self.model(pixel_values=images)
            found = tuple(getattr(outputs, name) for name in self.names)
            return found if len(found) > 1 else found[0]

    def resnet50() -> nn.Module:
        return Chosen(
            transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)), ("logits",)
        )

    def vit_tiny() -> nn.Module:
        config = transformers.ViTConfig(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
        )
        return Chosen(transformers.ViTForImageClassification(config), ("logits",))

    def detr_small() -> nn.Module:
        backbone = transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 32, 64, 128],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        )
        config = transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_queries=20,
            num_labels=10,
        )
        return Chosen(transformers.DetrForObjectDetection(config), ("logits", "pred_boxes"))

    return {
        "digits": (DigitsCNN, (1, 8, 8)),
        "mobilenet_v3_small": (partial(MobileNetV3Small, width=1.0), (3, 224, 224)),
        "resnet50": (resnet50, (3, 224, 224)),
        "vit_tiny": (vit_tiny, (3, 224, 224)),
        "detr_small": (detr_small, (3, 128, 128)),
    }


def settled(network: Any, images: Any) -> Any:
    """Give running statistics to the BatchNorm of a network that is not trained."""
    import torch

    with torch.no_grad():
        for _ in range(20):
            network.train()(images)
    return network.eval()


def pt2e(network: Any, images: Any, quantizer: Any, *, fold: bool = True) -> Any:
    """Quantize with torchao's PT2E, as its tutorial does; ``fold`` stores weights as integers."""
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(network, (images[:1],)).module()
    prepared = prepare_pt2e(exported, quantizer)
    move_exported_model_to_eval(prepared)
    with torch.no_grad():
        for image in images.split(1):
            prepared(image)
    return convert_pt2e(prepared, fold_quantize=fold)


def xnnpack_quantizer() -> Any:
    """Make ExecuTorch's quantizer, int8 by channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def own_executorch(network: Any, images: Any, folder: Path, step: Callable[[str], None]) -> None:
    """ExecuTorch's tutorial for XNNPACK."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    converted = pt2e(network, images, xnnpack_quantizer())
    step("quantize")
    program = torch.export.export(converted, (images[:1],))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "own.pte").write_bytes(lowered.buffer)


def own_coreml(network: Any, images: Any, folder: Path, step: Callable[[str], None]) -> None:
    """The converter of coremltools, on a network that PT2E has quantized."""
    import coremltools
    import torch

    converted = pt2e(network, images, xnnpack_quantizer())
    step("quantize")
    program = torch.export.export(converted, (images[:1],)).run_decompositions({})
    target = coremltools.target.iOS17
    coremltools.convert(program, minimum_deployment_target=target, skip_model_load=True).save(
        str(folder / "own.mlpackage")
    )


def own_tflite(network: Any, images: Any, folder: Path, step: Callable[[str], None]) -> None:
    """LiteRT's tutorial for PT2E."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    quantizer = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False))
    converted = pt2e(network, images, quantizer, fold=False)
    step("quantize")
    config = QuantConfig(pt2e_quantizer=quantizer)
    litert_torch.convert(converted, (images[:1],), quant_config=config).export(str(folder / "own.tflite"))


def own_onnx(network: Any, images: Any, folder: Path, step: Callable[[str], None]) -> None:
    """ONNX Runtime's tutorial: a float file, quantized with calibration."""
    import torch
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Any] = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image.numpy()}

    step("quantize")
    given, prepared, written = (str(folder / f"{name}.onnx") for name in ("float", "prepared", "own"))
    torch.onnx.export(network, (images[:1],), given, input_names=["images"], dynamo=True, external_data=False)
    quant_pre_process(given, prepared)
    int8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, written, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **int8)


OWN = {"executorch": own_executorch, "coreml": own_coreml, "tflite": own_tflite, "onnx": own_onnx}


def ours(network: Any, images: Any, folder: Path, step: Callable[[str], None], target: str) -> None:
    """`quantize` and `export`."""
    from lightning_edge import exporters
    from lightning_edge.quantization import convert, quantize

    converted = convert(quantize(network, list(images.split(BATCH))))
    step("quantize")
    exporters.export(converted, target, folder / f"ours{exporters.target(target).suffix}", strict=False)


def together(
    network: Any, images: Any, folder: Path, step: Callable[[str], None], targets: list[str], jobs: int
) -> None:
    """All targets of one network, as an evaluation writes them."""
    from lightning_edge import exporters
    from lightning_edge.exporters.jobs import Writers
    from lightning_edge.quantization import convert, quantize

    converted = convert(quantize(network, list(images.split(BATCH))))
    step("quantize")
    with Writers(jobs, lambda line: None) as writers:
        places = [(target, folder / f"all{exporters.target(target).suffix}") for target in targets]
        for file in [writers.begin(converted, target, path, label=target) for target, path in places]:
            file.staged().accept()


def training(network: Any, images: Any, folder: Path, step: Callable[[str], None]) -> None:
    """A few float steps, for the memory that they take."""
    import torch
    from torch.utils import _pytree as pytree

    optimizer = torch.optim.AdamW(network.train().parameters(), 1e-5)
    for _ in range(TRAINING_STEPS):
        loss = sum(output.float().square().mean() for output in pytree.tree_leaves(network(images)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def cpu_s() -> float:
    """Seconds that this process and those that it has ended have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextmanager
def steps_timed() -> Iterator[tuple[dict[str, float], Callable[[str], None]]]:
    """Give a function that ends a step by its name, and what each took; the last step is the export."""
    found: dict[str, float] = {}
    start = time.perf_counter(), cpu_s()

    def step(name: str) -> None:
        nonlocal start
        now = time.perf_counter(), cpu_s()
        found[f"{name}_s"], found[f"{name}_cpu_s"] = now[0] - start[0], now[1] - start[1]
        start = now

    yield found, step
    gc.collect()  # ends the processes of files
    step("export")


def measure(name: str, flow: str, options: argparse.Namespace) -> dict[str, float]:
    """Make one run in this process: seconds of each step, and the peak memory of this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(options.cores)
    build, shape = networks()[name]
    images = torch.randn(options.samples, *shape)
    network = settled(build(), images[:BATCH])
    kind, _, target = flow.partition(":")
    targets = options.targets.split(",")
    runs: dict[str, Callable[..., None]] = {
        "ours": partial(ours, target=target),
        "own": OWN.get(target, own_onnx),
        "together": partial(together, targets=targets, jobs=options.cores),
        "in turn": partial(together, targets=targets, jobs=0),
        "training": training,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with steps_timed() as (found, step):
            runs[kind](network, images, Path(folder), step)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "peak_mb": peak_kib / 1024}


def ask(name: str, flow: str) -> dict[str, float] | str:
    """Make one run in a process of its own; gives what went wrong where it fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, flow]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT_S} s"
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if found:
        result: dict[str, float] = json.loads(found[-1].removeprefix("FOUND "))
        return result
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Give the median of each figure."""
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def main() -> None:
    """Print a line for each flow of each network, and the ratios of ours to the library's own."""
    parser = argparse.ArgumentParser(description="seconds from a float network to int8 files")
    parser.add_argument("--networks", default="mobilenet_v3_small,resnet50,vit_tiny,detr_small")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cores", type=int, choices=(1, 2), default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "FLOW"), help="one run here (used by this program)")
    options = parser.parse_args()
    if options.one:
        name, flow = options.one
        print("FOUND " + json.dumps(measure(name, flow, options)), flush=True)
        return
    results: dict[str, dict[str, Any]] = {}
    for name in options.networks.split(","):
        results[name] = of_network(name, options)
        if options.output is not None:
            settings = {"cores": options.cores, "rounds": options.rounds, "samples": options.samples}
            options.output.write_text(json.dumps({"settings": settings, "networks": results}, indent=1) + "\n")


def of_network(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all flows of a network in turn, as often as asked."""
    flows = [f"{who}:{target}" for target in options.targets.split(",") for who in ("ours", "own")]
    flows += ["in turn", "together"] * (options.cores > 1) + ["training"]
    runs: dict[str, list[dict[str, float]]] = {flow: [] for flow in flows}
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        for flow in flows:
            if flow not in failed:
                answer = ask(name, flow)
                if isinstance(answer, str):
                    failed[flow] = answer
                else:
                    runs[flow].append(answer)
    found: dict[str, Any] = {flow: failed.get(flow) or medians(runs[flow]) for flow in flows}
    for flow, figures in found.items():
        print(f"{name:20} {flow:18} {figures}", flush=True)
    return found


if __name__ == "__main__":
    main()
