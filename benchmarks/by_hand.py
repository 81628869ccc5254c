"""The same trained network quantized by each library's own tutorial, and by lightning-edge: accuracy, bytes, latency.

    python benchmarks/by_hand.py --images FOLDER --weights ic01_resnet8_fp32_weights.npz [--samples 2000]

ResNet-8 with the MLPerf Tiny reference's weights, quantized after training on the same calibration images: by
litert-torch with ai-edge-quantizer's static recipe, by coremltools.optimize, by ExecuTorch's XNNPACK tutorial, by ONNX
Runtime's static quantizer; and once by `quantize`, exported to each target. All files are run on the same test images
by the same runner in this process, and those of one runtime are timed in turn. coremltools quantizes activations on
macOS only, so that its file has int8 weights and float activations.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge import exporters, quantize
from lightning_edge.errors import EdgeError
from lightning_edge.measure import interleaved_latency
from lightning_edge.zoo.image_files import read_images
from lightning_edge.zoo.networks import ResNet8, load_reference_weights

# Takes the float network, calibration images of one batch each, and where to write.
Flow = Callable[[nn.Module, Sequence[Tensor], Path], None]


def litert(network: nn.Module, batches: Sequence[Tensor], path: Path) -> None:
    """Convert in float with litert-torch, then quantize the file with ai-edge-quantizer's static int8 recipe."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    sample = batches[0][:1]
    litert_torch.convert(network, (sample,)).export(str(path))
    work = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    fed = [{"args_0": image[None].numpy()} for batch in batches for image in batch]
    result = work.quantize(work.calibrate({"serving_default": fed}))
    path.unlink()
    result.export_model(str(path))


def core_ml(network: nn.Module, batches: Sequence[Tensor], path: Path) -> None:
    """Convert with coremltools and quantize the weights, with its default settings."""
    import coremltools
    from coremltools.optimize import coreml

    program = torch.export.export(network, (batches[0][:1],)).run_decompositions({})
    model = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17, skip_model_load=True)
    config = coreml.OptimizationConfig(global_config=coreml.OpLinearQuantizerConfig(mode="linear_symmetric"))
    coreml.linear_quantize_weights(model, config).save(str(path))


def executorch(network: nn.Module, batches: Sequence[Tensor], path: Path) -> None:
    """Follow ExecuTorch's XNNPACK tutorial: PT2E with its XNNPACKQuantizer, then the XNNPACK partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    sample = (batches[0][:1],)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(network, sample).module(), quantizer)
    for batch in batches:
        for image in batch:
            prepared(image[None])
    program = torch.export.export(convert_pt2e(prepared), sample)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)


def onnx_runtime(network: nn.Module, batches: Sequence[Tensor], path: Path) -> None:
    """Export in float, run ONNX Runtime's pre-processing, and quantize statically in QDQ form, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.fed: Iterator[Any] = iter([{"images": image[None].numpy()} for batch in batches for image in batch])

        def get_next(self) -> Any:
            return next(self.fed, None)

    raw = path.with_name("float.onnx")
    program = torch.onnx.export(network, (batches[0][:1],), dynamo=True, input_names=["images"])
    assert program is not None
    program.save(str(raw))
    quant_pre_process(str(raw), str(raw))
    quantize_static(str(raw), str(path), Reader(), per_channel=True)
    raw.unlink()


FLOWS: dict[str, Flow] = {"tflite": litert, "coreml": core_ml, "executorch": executorch, "onnx": onnx_runtime}


def accuracy(artifact: exporters.Artifact, images: Tensor, labels: Tensor) -> float:
    """Share of images that a file classifies right."""
    return float((artifact(images)[0].argmax(1) == labels).float().mean())


def main() -> None:
    """Quantize, run and time every pair, and print a table."""
    parser = argparse.ArgumentParser(description="Quantization by hand, library by library, against lightning-edge")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2000, help="test images")
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    network = ResNet8()
    load_reference_weights(network, options.weights)
    network.eval().requires_grad_(False)
    train = torch.from_numpy(read_images(options.images, "train")[0])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    batches = list(train[order[:512]].float().split(16))
    images, labels = (torch.from_numpy(array) for array in read_images(options.images, "test"))
    images, labels = images[: options.samples].float(), labels[: options.samples]
    with torch.no_grad():
        share = float((network(images).argmax(1) == labels).float().mean())
    print(f"float network: {share:.2%} of {len(labels)} test images; {len(batches) * 16} calibration images\n")
    print("| target | by | accuracy | bytes | int8 weights | float operations | p50 ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    quantized = quantize(network, batches)
    with tempfile.TemporaryDirectory() as folder:
        for name in exporters.TARGETS:
            files: dict[str, exporters.Artifact] = {}
            for who in ("hand", "lightning-edge"):
                path = Path(folder) / f"{who}{exporters.target(name).suffix}"
                try:
                    if who == "hand":
                        FLOWS[name](network, batches, path)
                        files[who] = exporters.load(path)
                    else:
                        files[who] = exporters.export(quantized, name, path, batches=batches[:2])
                except EdgeError as error:
                    print(f"| {name} | {who} | {error} | | | | |")
            calls = {who: file.timed_call([images[:1]]) for who, file in files.items()}
            times = interleaved_latency(calls, 20, options.repeats)
            for who, file in files.items():
                contents = file.contents
                weights = contents.int8_weight_bytes + contents.float_weight_bytes
                latency = "not its own runtime" if file.runner.is_reference else f"{times[who].p50_ms:.3f}"
                print(
                    f"| {name} | {who} | {accuracy(file, images, labels):.2%} | {file.size_bytes:,} "
                    f"| {contents.int8_weight_bytes / weights:.0%} "
                    f"| {len(contents.float_compute_ops) + len(contents.float_ops)} | {latency} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
