"""Activations written out at capture: the same function, int8 in every file, trained as it ships, resumed as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from deployables import Branches, beyond
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge import exporters
from lightning_edge.exporters.verify import contents as checks
from lightning_edge.exporters.verify.agreement import agreement_of
from lightning_edge.network import Deployable, Inputs
from lightning_edge.quantization import Quantize, attach, calibrate, convert, quantize, quantized_forward
from lightning_edge.quantization.capture.graph import capture
from lightning_edge.quantization.feature_taps import add_taps
from lightning_edge.schedule import Clock

# What is written out is the same for every target, and ONNX Runtime says what it made of it fastest.
TARGETS = [pytest.param(name, marks=() if name == "onnx" else pytest.mark.slow) for name in sorted(exporters.TARGETS)]


class Gated(nn.Module):
    """Squeeze-and-excitation between hard-swishes, behind BatchNorm, behind layers and behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1, bias=False), nn.Hardsigmoid()
        )
        self.mix = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False), nn.Hardsigmoid())
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        features = features * self.weigh(features)
        features = functional.hardswish(features + self.mix(features))
        logits: Tensor = self.head(functional.hardswish(self.hidden(features.mean((2, 3)))))
        return logits


class Numbers(nn.Module):
    """Sums and products with numbers, differences from them, a hard-sigmoid, and a ReLU behind a product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = 0.75 - self.layer(images)
        gates = functional.hardsigmoid(features * -2.0 + 0.5)
        logits: Tensor = self.head((1.5 - (torch.relu(features * gates) / 3 - 0.25)).mean((2, 3)))
        return logits


class Swish(nn.Module):
    """SiLU, and GLU, which halves the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 16, 1), nn.GLU(1)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(images).mean((2, 3)))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"gated": Gated, "numbers": Numbers, "swish": Swish}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    built = NETWORKS[name]().train()
    with torch.no_grad():
        for _ in range(20):  # running statistics that are not 0 and 1
            built(images(16))
    return built.eval()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_captured_graph_is_the_network(name: str) -> None:
    graph = capture(network(name), Inputs.of(images(4))).graph
    operations = {str(node.target) for node in graph.graph.nodes}
    written_out = ("hardswish.default", "hardsigmoid.default", "silu.default", "glu.default", "rsub.Scalar")
    assert not operations & {f"aten.{name}" for name in written_out}
    for batch in (1, 5):
        x = images(batch)
        assert torch.allclose(graph(x), network(name)(x), atol=1e-5)


@cache
def together() -> Deployable:
    """All networks, and averages of windows, in one."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)]
    windows = nn.Sequential(*layers, nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.LazyLinear(3))
    with torch.no_grad():
        windows(images(16))
    networks = {name: copy.deepcopy(network(name)) for name in NETWORKS}
    return convert(quantize(Branches({**networks, "windows": windows}).eval(), [images(16) for _ in range(3)]))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_computes_in_float_and_values_agree(target: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{exporters.target(target).suffix}"
    with exporters.stage(together(), target, path) as staged:
        contents = staged.artifact.contents
        assert (contents.float_compute_ops, contents.float_ops) == ((), ())
        assert not contents.undelegated_ops
        agreement = agreement_of(staged.network, staged.artifact, [Inputs.of(images(8))])
    assert beyond([*NETWORKS, "windows"], agreement, steps=1.01) == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_trained_is_what_ships(name: str) -> None:
    trained = copy.deepcopy(network(name)).train()
    x = images(8)
    attach(trained, Inputs.of(x))
    calibrate(trained, Inputs.of(x))
    optimizer = torch.optim.SGD(trained.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())
        optimizer.step()
    trained.eval()
    graph = convert(trained)
    (scale,) = graph.output_scales
    assert scale is not None
    assert float((trained(x) - graph(x)).detach().abs().max()) <= 1.01 * scale


def test_gradients_are_those_of_the_network() -> None:
    """The graph's parameters are the network's own, with the activations' factors between them and the layers."""
    built = copy.deepcopy(network("gated"))
    x, direction = images(8), torch.randn(8, 5)
    expected = torch.autograd.grad((built(x) * direction).sum(), list(built.parameters()))
    graph = capture(built, Inputs.of(x)).graph
    given = torch.autograd.grad((graph(x) * direction).sum(), list(built.parameters()))
    for (name, _), ours, theirs in zip(built.named_parameters(), given, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())), name


@pytest.mark.parametrize("live", [False, True])
def test_features_are_those_of_the_users_layers(live: bool) -> None:
    """The weights in front of an activation are scaled; who reads the layer's output does not see that."""
    quantized = copy.deepcopy(network("gated"))
    x = images(8)
    names = ["stem.0", "stem.1", "stem", "weigh.3", "weigh.4", "mix.1", "hidden"]
    seen: dict[str, Tensor] = {}
    modules = dict(quantized.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out)) for name in names
    ]
    quantized(x)
    for hook in hooks:
        hook.remove()
    child = attach(quantized, Inputs.of(x), live_batch_norm=live)
    calibrate(quantized, Inputs.of(x))
    tapped: dict[str, Tensor] = {}
    add_taps(child, names, tapped.__setitem__)
    quantized(x)
    for name in names:
        span = float((seen[name].max() - seen[name].min()).detach())
        # A hard-sigmoid's step is that of the range from 0 to 1.
        allowed = max(0.03 * span, 1.01 / 255)
        assert float((tapped[name] - seen[name]).detach().abs().max()) < allowed, name


class Given:
    """A batch at hand."""

    def inputs(self) -> Inputs:
        return Inputs.of(images(4))

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Tensor]]:
        raise AssertionError("no phase here asks for gradients")


def attached(written_out: bool) -> nn.Module:
    built = copy.deepcopy(network("gated"))
    x = Inputs.of(images(4))
    attach(built, x, written_out=written_out)
    calibrate(built, x)
    return built


def test_a_checkpoint_from_before_is_read_as_it_was_written() -> None:
    """Its record does not say that activations were written out: the quantizers are those of the whole operations."""
    before = attached(written_out=False)
    fresh = copy.deepcopy(network("gated"))
    change = Quantize(start=0).plan(fresh, Clock(0, 0.0), [], Given())
    assert change is not None
    assert change["written_out"] is True
    old = {key: value for key, value in change.items() if key != "written_out"}
    restored = copy.deepcopy(network("gated"))
    Quantize.perform(restored, old)
    restored.load_state_dict(before.state_dict())
    x = images(4)
    assert torch.equal(restored.eval()(x), before.eval()(x))


def test_quantizers_of_the_two_forms_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(RuntimeError, match="edge_quantizers"):
        attached(written_out=True).load_state_dict(attached(written_out=False).state_dict())


def test_state_goes_on_under_the_same_keys() -> None:
    first, second = attached(written_out=True), attached(written_out=True)
    assert [key for key in first.state_dict() if "edge_quantizers" not in key] == list(network("gated").state_dict())
    second.load_state_dict(first.state_dict())
    x = images(4)
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert quantized_forward(second)[1].frozen is False


@pytest.mark.parametrize(
    ("pool", "becomes"),
    [
        (nn.AdaptiveAvgPool2d(1), ["mean.dim"]),
        (nn.AvgPool2d(8), ["mean.dim"]),
        (nn.AvgPool2d((6, 8), stride=5), ["slice.Tensor", "mean.dim"]),
        (nn.AvgPool2d(8, padding=1), ["avg_pool2d.default"]),
        (nn.AvgPool2d(8, divisor_override=9), ["avg_pool2d.default"]),
        (nn.AvgPool2d(3, ceil_mode=True), ["avg_pool2d.default"]),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), ["avg_pool2d.default"]),
        (nn.AdaptiveAvgPool2d(3), ["adaptive_avg_pool2d.default"]),
        (nn.Sequential(nn.AvgPool2d(8), nn.AvgPool2d(1), nn.AdaptiveAvgPool2d(1)), ["mean.dim"]),
    ],
    ids=str,
)
def test_an_average_over_the_image_has_a_range_of_its_own(pool: nn.Module, becomes: list[str]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = images(4)
    expected = network(x)
    graph = capture(network, Inputs.of(x)).graph
    kinds = {"mean.dim", "slice.Tensor", "avg_pool2d.default", "adaptive_avg_pool2d.default"}
    names = [str(node.target).removeprefix("aten.") for node in graph.graph.nodes]
    assert [name for name in names if name in kinds] == becomes
    torch.testing.assert_close(graph(x), expected)
    child = attach(network, Inputs.of(x))
    ranges = {module for name, module in child.bind().named_modules() if "activation_post_process" in name}
    with torch.no_grad():
        calibrate(network, Inputs.of(x))
    scales = {float(module.scale) for module in ranges if getattr(module, "is_per_channel", True) is False}
    # Of the images, the layer and the output, and of the mean.
    assert len(scales) == (4 if "mean.dim" in becomes else 3)


@pytest.mark.parametrize(
    ("pool", "taps"),
    [
        (nn.AvgPool2d(4), (4, 4)),
        (nn.AvgPool2d((3, 2), stride=(2, 1)), (3, 2)),
        (nn.AvgPool2d(3, stride=1, padding=1), (3, 3)),
        (nn.AvgPool2d(2, divisor_override=3), (2, 2)),
        (nn.AdaptiveAvgPool2d((2, 4)), (4, 2)),
        (nn.Sequential(nn.Flatten(2), nn.AvgPool1d(4), nn.AdaptiveAvgPool1d(8)), (4,)),
    ],
    ids=str,
)
def test_an_average_of_windows_is_a_convolution(pool: nn.Module, taps: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = images(4)
    expected = network(x)
    graph = capture(network, Inputs.of(x)).graph
    names = [str(node.target) for node in graph.graph.nodes]
    assert not [name for name in names if name.startswith("aten.") and "pool" in name]
    windows = [tuple(buffer.shape[2:]) for name, buffer in graph.named_buffers() if name.startswith("window_of")]
    assert windows[0] == taps
    torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)], ids=str)
def test_a_pool_of_images_without_a_batch_stays(pool: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(1, 2), pool, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.randn(4, 1, 4, 4)
    expected = network(x)
    torch.testing.assert_close(capture(network, Inputs.of(x)).graph(x), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_bilinear_upsampling_is_int8_or_between_int8_values(target: str, tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")]
    network = nn.Sequential(*layers, nn.Conv2d(8, 4, 3)).eval()
    batches = [images(16) for _ in range(3)]
    path = tmp_path / f"m{exporters.target(target).suffix}"
    # XNNPACK has it in int8, and ExecuTorch writes it in float only; ONNX Runtime has the nearest in int8 only.
    floats = {"executorch": ("StaticResizeBilinear2D",), "onnx": ("Resize",)}.get(target, ())
    with pytest.warns(checks.ExportWarning) if floats else nullcontext():
        artifact = exporters.export(quantize(network, batches), target, path, batches=batches)
    assert artifact.contents.float_ops == floats
    assert not artifact.contents.undelegated_ops
    assert artifact.agreement is not None
    assert artifact.agreement.max_steps is not None
    # A pixel between four is often half a step from two integers, which LiteRT rounds up.
    assert artifact.agreement.max_steps <= (2.01 if target == "tflite" else 1.01)


def test_with_16_bit_activations_nothing_is_written_out() -> None:
    x = Inputs.of(images(4))
    child = attach(copy.deepcopy(network("gated")), x, plan={"head": "int8_a16"})
    operations = {str(node.target) for node in child.bind().graph.nodes}
    assert {"aten.hardswish.default", "aten.hardsigmoid.default"} <= operations
