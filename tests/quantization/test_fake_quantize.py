"""Our fake-quantizer against torch's own operations and against what conversion writes."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantize as StockFakeQuantize
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver

from lightning_edge.errors import CompressionError
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate, convert
from lightning_edge.quantization.network import QuantizedForward
from lightning_edge.quantization.train.fake_quantize import FakeQuantize, _RoundToScales
from lightning_edge.quantization.train.layers import LiveBatchNorm
from lightning_edge.quantization.train.specs import PerChannelMinMaxNow
from lightning_edge.quantization.train.weights import LayerWeights


def per_tensor() -> FakeQuantize:
    return FakeQuantize(
        MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.int8,
        qscheme=torch.per_tensor_affine,
        averaging_constant=0.5,
    )


def per_channel() -> FakeQuantize:
    return FakeQuantize(
        PerChannelMinMaxNow,
        quant_min=-127,
        quant_max=127,
        dtype=torch.int8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def test_values_and_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours = per_tensor()
    ours(torch.randn(64, 8))
    ours.disable_observer()
    x = (3 * torch.randn(1000, 8)).requires_grad_()
    theirs = torch.fake_quantize_per_tensor_affine(x, ours.scale, ours.zero_point, -128, 127)
    out = ours(x)
    torch.testing.assert_close(out, theirs, rtol=0, atol=1e-6)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    (reference,) = torch.autograd.grad((theirs * weights).sum(), x)
    assert torch.equal(gradient, reference)
    assert bool((gradient == 0).any())  # some values were clipped, or the test would say nothing


def test_the_path_for_devices_computes_the_same() -> None:
    torch.manual_seed(0)
    ours = per_tensor()
    ours(torch.randn(64, 8))
    ours.disable_observer()
    x = (3 * torch.randn(1000, 8)).requires_grad_()
    with_tensors = _RoundToScales.apply(x, ours.scale, ours.zero_point, -128, 127)  # type: ignore[no-untyped-call]
    assert isinstance(with_tensors, torch.Tensor)
    assert torch.equal(with_tensors, ours(x))
    (a,) = torch.autograd.grad(with_tensors.sum(), x)
    (b,) = torch.autograd.grad(ours(x).sum(), x)
    assert torch.equal(a, b)


def test_large_tensors_are_rounded_piece_by_piece_to_the_same_bits() -> None:
    torch.manual_seed(0)
    ours = per_tensor()
    ours(torch.randn(64, 8))
    ours.disable_observer()
    x = 3 * torch.randn(5, 60_001)  # no whole number of pieces
    large = ours(x)
    assert torch.equal(large, torch.cat([ours(row) for row in x.split(1)]))
    assert torch.equal(large, ours(x.t().contiguous().t()))


@pytest.mark.parametrize("make", [per_tensor, per_channel])
def test_training_rounds_to_the_values_that_conversion_writes(make: object) -> None:
    torch.manual_seed(0)
    fake = make()  # type: ignore[operator]
    x = torch.randn(16, 32)
    out = fake(x)
    scale, zero_point = fake.calculate_qparams()
    ops = torch.ops.quantized_decomposed
    if fake.is_per_channel:
        quantized = ops.quantize_per_channel(x, scale, zero_point, 0, -127, 127, torch.int8)
        converted = ops.dequantize_per_channel(quantized, scale, zero_point, 0, -127, 127, torch.int8)
    else:
        quantized = ops.quantize_per_tensor(x, float(scale), int(zero_point), -128, 127, torch.int8)
        converted = ops.dequantize_per_tensor(quantized, float(scale), int(zero_point), -128, 127, torch.int8)
    assert torch.equal(out, converted)


def test_weights_keep_no_memory_of_larger_ones() -> None:
    fake = per_channel()
    fake(torch.full((4, 2), 100.0))
    fake(torch.full((4, 2), 1.0))
    torch.testing.assert_close(fake.scale, torch.full((4,), 2 / 254))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_float_type_goes_in_and_comes_out(dtype: torch.dtype) -> None:
    fake = per_tensor()
    x = torch.randn(64, 8, dtype=dtype, requires_grad=True)
    out = fake(x)
    out.sum().backward()
    assert out.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert fake.scale.dtype == torch.float32


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("averaging", [0.01, 0.3, 1.0])
def test_ranges_are_bitwise_those_of_torchao(symmetric: bool, averaging: float) -> None:
    torch.manual_seed(0)
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    settings = {"dtype": torch.int8, "qscheme": scheme, "averaging_constant": averaging}
    ours = FakeQuantize(MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, **settings)
    theirs = MovingAverageMinMaxObserver(quant_min=-128, quant_max=127, **settings)
    for index in range(300):
        x = torch.randn(7, 5) * 10 ** (4 * torch.rand(1) - 2) + 3 * torch.randn(1)
        x = (x.abs(), -x.abs(), x, torch.zeros_like(x))[index % 4]
        ours(x)
        theirs(x)
        scale, zero_point = theirs.calculate_qparams()
        assert torch.equal(ours.activation_post_process.min_val, theirs.min_val)
        assert torch.equal(ours.activation_post_process.max_val, theirs.max_val)
        assert torch.equal(ours.scale, scale)
        assert torch.equal(ours.zero_point, zero_point.int())


def test_state_dict_is_that_of_the_stock_fake_quantizer() -> None:
    settings = {"dtype": torch.int8, "qscheme": torch.per_tensor_affine}
    stock = StockFakeQuantize(MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, **settings)
    stock(torch.randn(8, 8))
    ours = per_tensor()
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    for a, b in zip(ours.calculate_qparams(), stock.calculate_qparams(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("activation", "low", "high"), [(nn.ReLU(), 0.0, None), (nn.ReLU6(), 0.0, 6.0)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_a_clip_inside_the_quantizer_is_the_activation_in_front_of_it(
    activation: nn.Module, low: float, high: float | None, spread: float
) -> None:
    torch.manual_seed(0)
    clip = (low, torch.finfo(torch.float32).max if high is None else high)
    inside, behind = per_tensor(), per_tensor()
    for frozen in (False, True):
        x = (spread * torch.randn(500, 8)).requires_grad_()
        weights = torch.randn_like(x)
        ours, theirs = inside(x, *clip), behind(activation(x))
        assert torch.equal(ours, theirs)
        (a,) = torch.autograd.grad((ours * weights).sum(), x)
        (b,) = torch.autograd.grad((theirs * weights).sum(), x)
        assert torch.equal(a, b)
        assert all(torch.equal(v, behind.state_dict()[k]) for k, v in inside.state_dict().items())
        if not frozen:
            inside.disable_observer()
            behind.disable_observer()
            spread *= 2  # so that values are clipped by the frozen range, too


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e31])
@pytest.mark.parametrize("make", [per_tensor, per_channel])
def test_values_without_a_range_are_refused(make: Any, value: float) -> None:
    x = torch.randn(4, 4)
    x[1, 2] = value
    with pytest.raises(CompressionError, match="not finite"):
        make()(x)


@pytest.mark.parametrize("learns", [False, True], ids=["folded", "live"])
@pytest.mark.parametrize("frozen", [False, True], ids=["observing", "frozen"])
def test_layer_weights_are_the_spelled_out_expression(learns: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    quantizer = per_channel()
    live = LiveBatchNorm(0.1, 1e-3, "norm")
    live.training = learns
    layer = LayerWeights(quantizer, None, 1e-3, live)
    weight, *others = (torch.randn(shape, requires_grad=True) for shape in ((4, 3, 3, 3), 4, 4, 4))
    bias, gamma, beta = others
    mean, variance = torch.randn(4), torch.rand(4)
    layer(weight, bias, gamma, beta, mean, variance)
    if frozen:
        quantizer.disable_observer()
        weight = (1.5 * weight).detach().requires_grad_()  # beyond the range
    rounded, folded_bias = layer(weight, bias, gamma, beta, mean, variance)

    scale = torch.rsqrt(variance + 1e-3) * gamma
    expected = quantizer(weight * scale.view(-1, 1, 1, 1))
    if learns:
        expected = expected / scale.view(-1, 1, 1, 1)
    expected_bias = (bias - mean) * scale + beta
    assert torch.equal(rounded, expected)
    assert folded_bias is not None
    assert torch.equal(folded_bias, expected_bias)
    factors = torch.randn_like(weight), 0.0 if learns else 1.0
    inputs = (weight, gamma) if learns else (weight, gamma, bias, beta)
    ours = torch.autograd.grad((rounded * factors[0]).sum() + (folded_bias * factors[1]).sum(), inputs)
    theirs = torch.autograd.grad((expected * factors[0]).sum() + (expected_bias * factors[1]).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """Everything that the graph which is run has in fewer operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        pools = nn.Sequential(nn.AvgPool2d(6, 2), nn.AdaptiveAvgPool2d(1))  # the first is too large to be written out
        self.head = nn.Sequential(pools, nn.Flatten(), nn.Linear(8, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.first(images)
        features = torch.relu(self.second(nn.functional.pad(features, (1, 1, 1, 1))) + features)
        logits: torch.Tensor = self.head(features)
        return logits


def quantized_twice() -> tuple[Small, Small]:
    torch.manual_seed(0)
    network = Small().train()
    images = torch.randn(8, 3, 8, 8)
    for _ in range(3):
        network(images)
    copies = network, copy.deepcopy(network)
    for quantized in copies:
        attach(quantized, Inputs.of(images))
        calibrate(quantized, Inputs.of(images))
    return copies


def child_of(network: nn.Module) -> QuantizedForward:
    child = network.edge_quantizers
    assert isinstance(child, QuantizedForward)
    return child


def test_the_graph_that_is_run_computes_what_the_prepared_graph_does() -> None:
    ours, theirs = quantized_twice()
    child_of(ours).freeze_observers()
    child_of(theirs).freeze_observers()
    images = 2 * torch.randn(8, 3, 8, 8)
    a, b = ours(images), child_of(theirs).bind()(images)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_means_and_moved_values_do_not_narrow_the_range_they_share() -> None:
    network, _ = quantized_twice()
    child = child_of(network)
    images = torch.randn(8, 3, 8, 8)
    for _ in range(300):
        network(images)
    relu = [n for n in child.bind().graph.nodes if n.target is torch.ops.aten.relu.default][-1]
    module = child.bind().get_submodule(str(next(iter(relu.users)).target))
    seen = []
    hook = module.register_forward_hook(lambda _, args, output: seen.append(args[0].max()))
    network(images)
    hook.remove()
    # The first call is that behind the ReLU, the last that behind the pool of 36 values.
    assert seen[-1] < 0.7 * seen[0]
    largest = module.get_submodule("activation_post_process").get_buffer("max_val")
    torch.testing.assert_close(largest, seen[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trains_and_converts_under_autocast(dtype: torch.dtype) -> None:
    network, _ = quantized_twice()
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            loss = network(torch.randn(8, 3, 8, 8)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    images = torch.randn(4, 3, 8, 8)
    network.eval()
    torch.testing.assert_close(convert(network)(images), network(images), rtol=0, atol=0.1)


@pytest.mark.slow
def test_two_processes_observe_the_global_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_fake_quantize import per_tensor
rank, port, folder = int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
fake = per_tensor()
for batch in range(5):
    fake(torch.randn(8, 4)[4 * rank : 4 * rank + 4])
torch.save(fake.state_dict(), f"{folder}/{rank}.pt")
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    processes = [subprocess.Popen([*command, str(rank), str(port), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    alone = per_tensor()
    for _ in range(5):
        alone(torch.randn(8, 4))
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())


class Branches(nn.Module):
    """Two branches of very different range, concatenated, and a BatchNorm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Conv2d(8, 2, 1)
        nn.init.normal_(self.wide.weight, std=4.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([torch.relu(self.norm(self.narrow(images))), torch.relu(self.wide(images))], 1)
        pooled = nn.functional.avg_pool2d(joined, 4, divisor_override=1)
        out: torch.Tensor = self.head(pooled)
        return out


@pytest.mark.parametrize("batches", [1, 50])
def test_a_shared_range_holds_all_that_is_concatenated(batches: int) -> None:
    torch.manual_seed(0)
    network, images = Branches(), torch.randn(8, 3, 10, 10)
    expected = network.eval()(images)
    child = attach(network.train(), Inputs((images,)), averaging=0.01)
    for _ in range(batches):
        network(images).sum().backward()
    error = (network.eval()(images) - expected).norm() / expected.norm()
    assert error < 0.03
    joint = [module for module in child.fake_quantizers() if module.joint]  # type: ignore[union-attr]
    assert joint
    assert float(joint[0].activation_post_process.max_val) > 10  # type: ignore[union-attr, arg-type]
    converted = convert(network)
    torch.testing.assert_close(converted(images), network(images), rtol=0, atol=1e-4)
