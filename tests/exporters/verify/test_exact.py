"""A converted network in float64: the values that integer kernels compute, whatever the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deployables import batches, network
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge.exporters.passes.graph import operation
from lightning_edge.exporters.verify.exact import exact
from lightning_edge.network import Deployable, flatten_outputs
from lightning_edge.quantization import convert, quantize


def test_it_computes_what_integers_do() -> None:
    """One convolution by hand: a sum of integers, a bias in its steps, one rescaling to the output's."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 3)
    images = torch.randn(4, 16, 9, 9)
    converted = convert(quantize(nn.Sequential(layer).eval(), [images]))
    nodes = {operation(node): node for node in converted.graph.graph.nodes}  # type: ignore[union-attr]
    into, out = (
        node.args[1:3]
        for node in converted.graph.graph.nodes  # type: ignore[union-attr]
        if operation(node) == "quantize_per_tensor"
    )
    stored, scales = (
        converted.graph.get_buffer(str(argument.target)).double()
        for argument in nodes["dequantize_per_channel"].args[:2]
    )
    bias = nodes["conv2d"].args[2]
    steps: Any = into[0] * scales
    biases = torch.round(converted.graph.get_parameter(str(bias.target)).double() / steps)
    levels = torch.round(images / into[0]).add(into[1]).clamp(-128, 127).double()
    sums = functional.conv2d(levels - into[1], stored, biases)
    results = torch.round(sums * (steps / out[0]).view(-1, 1, 1)).add(out[1]).clamp(-128, 127)
    expected = ((results - out[1]) * out[0]).float()
    assert torch.equal(exact(converted)(images), expected)


def test_it_does_not_depend_on_the_batch() -> None:
    # A value between two integers, the last bit of which is that of the order of a sum.
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3, padding=1, groups=groups) for groups in (1, 8, 1, 8)]
    images = torch.randn(32, 8, 16, 16)
    found = exact(convert(quantize(nn.Sequential(*layers).eval(), [images])))
    assert torch.equal(found(images), torch.cat([found(image) for image in images.split(1)]))


@pytest.mark.parametrize("name", ["residual", "two_inputs", "difference", "tokens", "attention", "pooled"])
def test_it_takes_and_gives_what_the_network_does(name: str) -> None:
    converted = network(name, "int8")
    found = exact(converted)
    assert found.output_names() == converted.output_names()
    for batch in batches(name):
        expected = converted(*batch.args, **batch.kwargs)
        given = found(*batch.args, **batch.kwargs)
        assert type(given) is type(expected)
        for output, wanted, scale in zip(
            flatten_outputs(given), flatten_outputs(expected), converted.output_scales, strict=True
        ):
            assert output.dtype == wanted.dtype == torch.float32
            assert float((output - wanted).detach().abs().max()) <= 1.01 * (scale or 0.01)


def test_a_float_network_is_its_own_reference() -> None:
    plain = network("residual", "fp32")
    assert exact(plain) is plain
    pretended = Deployable(nn.Linear(2, 2), plain.inputs, "int8")
    assert exact(pretended) is pretended


def test_the_network_itself_stays_as_it_was() -> None:
    converted = network("residual", "int8")
    before = converted.graph.state_dict()
    exact(converted)
    assert {value.dtype for value in before.values()} <= {torch.float32, torch.int8, torch.int64}
    images: Tensor = batches("residual")[0].args[0]
    assert converted(images).dtype == torch.float32


class Ramp(nn.Module):
    """A layer that is fed constants of the default type, made in forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.other(torch.linspace(0, 1, 4) + torch.full((4,), 0.5) + torch.arange(0.0, 4.0))


def test_constants_of_the_default_type_are_wide() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    converted = convert(quantize(Ramp().eval(), [x]))
    found = exact(converted)(x)
    assert found.dtype == torch.float32
    assert float((found - converted(x)).abs().max()) <= 1.01 * converted.output_scales[0]  # type: ignore[operator]
