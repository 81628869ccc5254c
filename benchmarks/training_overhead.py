"""What an int8 or distillation training step costs against the same network's float step: CPU time, one thread.

    python benchmarks/training_overhead.py [--rounds 15] [--network resnet8] [--compile]

Every variant trains its own copy on the same batch, in turn; medians over rounds, as ratios to float. Beside ours
stand torchao's PT2E flow with ExecuTorch's XNNPACKQuantizer, torch's FX flow, and NNCF where it is installed (``pip
install nncf``; a C++ compiler builds its kernels, for which the environment's bin must be on the PATH and
``NNCF_EXTENSION_LOAD_TIMEOUT=0`` gives it time). ``--compile`` adds torch.compile, which takes minutes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lightning_edge.distillation import Distill, Distillation
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate
from lightning_edge.schedule import Clock
from lightning_edge.zoo.networks import MobileNetV2, ResNet8

# Makes a network to train from a float one and a batch; raises ImportError where its library is missing.
Variant = Callable[[nn.Module, Tensor], nn.Module]


def ours(network: nn.Module, images: Tensor, *, live: bool = False, frozen: bool = False) -> nn.Module:
    """Attach quantizers to a copy."""
    network = copy.deepcopy(network)
    child = attach(network, Inputs.of(images), live_batch_norm=live)
    calibrate(network, Inputs.of(images))
    if frozen:
        child.freeze_observers()
    return network.train()


def compiled(variant: Variant, network: nn.Module, images: Tensor) -> nn.Module:
    """Compile what a variant makes."""
    result: nn.Module = torch.compile(variant(network, images))  # type: ignore[assignment]
    return result


def plain(network: nn.Module, images: Tensor) -> nn.Module:
    """Copy the float network."""
    return copy.deepcopy(network)


class _ChannelsLast(nn.Module):
    """A network whose images come with channels innermost in memory, as ours have them inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits


def channels_last(network: nn.Module, images: Tensor) -> nn.Module:
    """Copy the float network, for a user who knows of torch's memory formats."""
    return _ChannelsLast(copy.deepcopy(network).to(memory_format=torch.channels_last))  # type: ignore[call-overload, unused-ignore]


def torchao_pt2e(network: nn.Module, images: Tensor) -> nn.Module:
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


def torch_fx(network: nn.Module, images: Tensor) -> nn.Module:
    """Prepare a copy with torch's own FX flow, which torchao's PT2E succeeds."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    mapping = get_default_qat_qconfig_mapping("x86")
    prepared: nn.Module = prepare_qat_fx(copy.deepcopy(network).train(), mapping, (images,))
    return prepared


class _Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def nncf_quantize(network: nn.Module, images: Tensor) -> nn.Module:
    """Prepare a copy with NNCF's default settings."""
    import nncf  # type: ignore[import-not-found]

    # NNCF hangs a submodule of its own on what it quantizes, which an nn.Sequential would call as its last layer.
    wrapped = _Wrapped(copy.deepcopy(network)).eval()
    quantized: nn.Module = nncf.quantize(wrapped, nncf.Dataset([images]), fast_bias_correction=True)
    return quantized.train()


def stepper(network: nn.Module, images: Tensor, labels: Tensor, teacher: nn.Module | None = None) -> Callable[[], None]:
    """One training step of a network, with an optimizer of its own, by hand with a teacher if one is given."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-5, momentum=0.9)

    def step() -> None:
        logits = network(images)
        loss = nn.functional.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                target = teacher(images).div(4.0).softmax(1)
            loss = loss + 16.0 * nn.functional.kl_div(logits.div(4.0).log_softmax(1), target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def distill_stepper(network: nn.Module, images: Tensor, labels: Tensor, teacher: nn.Module) -> Callable[[], None]:
    """One training step under our Distill phase, as the callback's wiring does it."""
    distillation = Distillation(Distill(teacher), network)
    optimizer = torch.optim.SGD(network.parameters(), 1e-5, momentum=0.9)
    distillation.adapters.join(optimizer)

    def step() -> None:
        with distillation.watching():
            task_loss = nn.functional.cross_entropy(network(images), labels)
            loss = distillation.total(task_loss, distillation.compute(Clock(0, 0.0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def medians_ms(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Time every step in turn, CPU milliseconds, after one or two steps that are not timed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def variants(with_compile: bool) -> dict[str, Variant]:
    """Every way to train, by the name in the table."""
    found: dict[str, Variant] = {
        "float": plain,
        "float, channels last": channels_last,
        "int8, folded": ours,
        "int8, folded, frozen": partial(ours, frozen=True),
        "int8, live BatchNorm": partial(ours, live=True),
        "torchao PT2E": torchao_pt2e,
        "torch FX": torch_fx,
        "NNCF": nncf_quantize,
    }
    if with_compile:
        for name in ("float", "int8, folded", "int8, folded, frozen", "int8, live BatchNorm"):
            found[f"{name}, compiled"] = partial(compiled, found[name])
    return found


def steps_of(network: nn.Module, images: Tensor, labels: Tensor, with_compile: bool) -> dict[str, Callable[[], None]]:
    """Prepare every variant; say which cannot run here, and why."""
    steps: dict[str, Callable[[], None]] = {}
    for name, variant in variants(with_compile).items():
        try:
            steps[name] = stepper(variant(network, images), images, labels)
        except ImportError as error:
            advice = ": pip install nncf" if name == "NNCF" else ""
            print(f"  {name:28} not installed{advice} ({error})")
        if name.endswith("compiled") and name in steps:
            start = time.perf_counter()
            steps[name]()
            print(f"  {name:28} first step {time.perf_counter() - start:.0f} s")
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    steps["float + teacher by hand"] = stepper(copy.deepcopy(network), images, labels, teacher)
    steps["float + Distill"] = distill_stepper(copy.deepcopy(network), images, labels, teacher)
    return steps


def main() -> None:
    """Print one table per network."""
    parser = argparse.ArgumentParser(description="CPU time of an int8 or distillation step against a float one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--network", choices=["resnet8", "mobilenetv2"], help="one of the two only")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: minutes for each variant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    cases: dict[str, tuple[str, nn.Module, tuple[int, ...]]] = {
        "resnet8": ("ResNet-8, 32x32, batch 64", ResNet8(), (64, 3, 32, 32)),
        "mobilenetv2": ("MobileNetV2 0.35, 96x96, batch 32", MobileNetV2(), (32, 3, 96, 96)),
    }
    for key, (title, network, shape) in cases.items():
        if arguments.network not in (None, key):
            continue
        print(title)
        network.train()
        images, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])
        with torch.no_grad():
            for _ in range(30):  # statistics that fit the weights: a fresh BatchNorm's running variance is one
                network(images)
        times = medians_ms(steps_of(network, images, labels, arguments.compile), arguments.rounds)
        for name, milliseconds in times.items():
            print(f"  {name:32} {milliseconds:8.1f} ms CPU  {milliseconds / times['float']:.2f}x")


if __name__ == "__main__":
    main()
