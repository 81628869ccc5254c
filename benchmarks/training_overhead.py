"""What an int8 training step costs against the same network's float step: CPU time, interleaved, one thread.

    python benchmarks/training_overhead.py [--rounds 15]

Beside ours (BatchNorm folded, folded with ranges frozen, live) stands torchao's own PT2E flow with ExecuTorch's
XNNPACKQuantizer. Every variant trains its own copy on the same batch; medians over rounds, as ratios to float.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate
from lightning_edge.zoo.networks import MobileNetV2, ResNet8


def ours(network: nn.Module, images: torch.Tensor, *, live: bool = False, frozen: bool = False) -> nn.Module:
    """Attach quantizers to a copy."""
    network = copy.deepcopy(network)
    child = attach(network, Inputs.of(images), live_batch_norm=live)
    calibrate(network, Inputs.of(images))
    if frozen:
        child.freeze_observers()
    return network.train()


def torchao_pt2e(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Prepare a copy as torchao's tutorial does."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(copy.deepcopy(network), (images,), dynamic_shapes=({0: batch},), strict=False)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    prepared: nn.Module = prepare_qat_pt2e(exported.module(), quantizer)
    return prepared


def stepper(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One training step of a network, with an optimizer of its own."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-5, momentum=0.9)

    def step() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def medians_ms(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Time every step in turn, CPU milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print one table per network."""
    parser = argparse.ArgumentParser(description="CPU time of an int8 training step against a float one")
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    cases: list[tuple[str, nn.Module, Any]] = [
        ("ResNet-8, 32x32, batch 64", ResNet8(), (64, 3, 32, 32)),
        ("MobileNetV2 0.35, 96x96, batch 32", MobileNetV2(), (32, 3, 96, 96)),
    ]
    for title, network, shape in cases:
        network.train()
        images, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])
        with torch.no_grad():
            for _ in range(30):  # statistics that fit the weights: a fresh BatchNorm's running variance is one
                network(images)
        variants = {
            "float": copy.deepcopy(network),
            "int8, folded": ours(network, images),
            "int8, folded, frozen": ours(network, images, frozen=True),
            "int8, live BatchNorm": ours(network, images, live=True),
            "torchao PT2E": torchao_pt2e(network, images),
        }
        times = medians_ms({name: stepper(variant, images, labels) for name, variant in variants.items()}, rounds)
        print(title)
        for name, milliseconds in times.items():
            print(f"  {name:24} {milliseconds:8.1f} ms CPU  {milliseconds / times['float']:.2f}x")


if __name__ == "__main__":
    main()
