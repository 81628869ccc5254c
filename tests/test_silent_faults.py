"""Each silent fault of a plain PT2E set-up, shown on torchao's and the converters' own flow, and its absence here.

The first half of each test is the fault: when a new version of torchao mends it, that half fails and the test has
done its work.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from lightning_edge.exporters import tflite
from lightning_edge.network import Inputs
from lightning_edge.quantization import attach, calibrate, convert, quantize

aten = torch.ops.aten


class Network(nn.Module):
    """BatchNorm and dropout with settings that are not torch's defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.layer(x))).mean((2, 3))
        logits: Tensor = self.head(self.dropout(x))
        return logits


def network() -> Network:
    torch.manual_seed(0)
    return Network().train()


def images(batch: int = 8) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def plain_pt2e(module: nn.Module) -> GraphModule:
    """What torchao's tutorial does."""
    batch = torch.export.Dim("batch", min=1)
    graph = torch.export.export(module, (images(),), dynamic_shapes=({0: batch},), strict=False).module()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_qat_pt2e(graph, quantizer)


def settings(graph: GraphModule, target: object, positions: slice) -> list[tuple[object, ...]]:
    return [tuple(node.args[positions]) for node in graph.graph.nodes if node.target is target]


@pytest.mark.slow  # torchao's own flow is what takes the time, and changes with its pin only
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
class TestPlainPT2E:
    def test_batch_norm_gets_its_eps_and_momentum_reset(self) -> None:
        plain = plain_pt2e(network())
        assert settings(plain, aten.batch_norm.default, slice(6, 8)) == [(0.1, 1e-5)]

        # Small variances make eps matter, as in MobileNetV3 and EfficientNet.
        module = network()
        with torch.no_grad():
            module.layer.weight.mul_(0.02)
            features = module.layer(images(64))
            module.norm.running_mean.copy_(features.mean((0, 2, 3)))
            module.norm.running_var.copy_(features.var((0, 2, 3)))
        reference, inputs = copy.deepcopy(module), images()
        child = attach(module, Inputs.of(inputs), live_batch_norm=True)
        calibrate(module, Inputs.of(inputs))
        module.dropout.p = reference.dropout.p = 0.0
        for part in child.added.children():
            if hasattr(part, "probability"):
                part.probability = 0.0
        for _ in range(2):  # over a train/eval round trip
            out, expected = module.train()(inputs), reference.train()(inputs)
            torch.testing.assert_close(out, expected, rtol=0, atol=0.15 * float(expected.detach().abs().max()))
            torch.testing.assert_close(module.norm.running_var, reference.norm.running_var, rtol=0.05, atol=1e-6)
            module.eval()
            reference.eval()
        out, expected = module(inputs), reference(inputs)
        torch.testing.assert_close(out, expected, rtol=0, atol=0.15 * float(expected.detach().abs().max()))
        converted = convert(module)(inputs)
        torch.testing.assert_close(converted, expected, rtol=0, atol=0.15 * float(expected.detach().abs().max()))

    def test_dropout_gets_its_probability_reset(self) -> None:
        plain = allow_exported_model_train_eval(plain_pt2e(network()))
        assert settings(plain, aten.dropout.default, slice(1, 3)) == [(0.1, True)]
        plain.eval()
        plain.train()
        assert settings(plain, aten.dropout.default, slice(1, 3)) == [(0.5, True)]

        module = network()
        child = attach(module, Inputs.of(images()))
        (dropout,) = (part for part in child.added.children() if hasattr(part, "probability"))
        module.eval()
        assert torch.equal(dropout(torch.ones(9)), torch.ones(9))
        module.train()
        assert float((dropout(torch.ones(100_000)) == 0).float().mean()) == pytest.approx(0.1, abs=0.01)

    def test_train_and_eval_are_not_supported(self) -> None:
        plain = plain_pt2e(network())
        with pytest.raises(NotImplementedError, match=r"train\(\) or eval\(\) is not supported"):
            nn.ModuleDict({"net": plain}).train()

        module = network()
        attach(module, Inputs.of(images()))
        parent = nn.ModuleDict({"net": module})
        assert not parent.eval()["net"].edge_quantizers.training
        assert parent.train()["net"].edge_quantizers.training

    def test_validation_data_moves_the_ranges(self) -> None:
        plain = allow_exported_model_train_eval(plain_pt2e(network()))
        plain(images())
        before = plain.activation_post_process_0.scale.clone()
        plain.eval()
        plain(100 * images())
        assert not torch.equal(plain.activation_post_process_0.scale, before)

        module = network()
        child = attach(module, Inputs.of(images()))
        calibrate(module, Inputs.of(images()))
        ranges = [part.scale.clone() for part in child.fake_quantizers()]  # type: ignore[operator, union-attr]
        module.eval()
        module(100 * images())
        assert all(torch.equal(a, b.scale) for a, b in zip(ranges, child.fake_quantizers(), strict=True))

    def test_bfloat16_autocast_fails(self) -> None:
        plain = plain_pt2e(network())
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="BFloat16"):
            plain(images())

        module = network()
        attach(module, Inputs.of(images()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(module(images())).all()

    def test_weights_train_with_another_scale_than_they_ship_with(self) -> None:
        plain = plain_pt2e(network())
        plain(images())
        weights = plain.get_submodule(
            next(str(n.target) for n in plain.graph.nodes if n.op == "call_module" and "head" in str(n.args[0]))
        )
        relative = weights.scale / weights.calculate_qparams()[0]
        assert float((relative - 1).abs().max()) == pytest.approx(1 / 254, abs=1e-4)

        module = network()
        child = attach(module, Inputs.of(images()))
        calibrate(module, Inputs.of(images()))
        for part in child.fake_quantizers():
            assert torch.equal(part.scale.flatten(), part.calculate_qparams()[0].flatten())  # type: ignore[operator, union-attr]

    def test_an_int8_file_holds_float_weights(self, tmp_path: Path) -> None:
        import litert_torch

        plain = allow_exported_model_train_eval(plain_pt2e(network()))
        plain(images())
        plain.eval()
        converted = convert_pt2e(plain, fold_quantize=False)
        program = torch.export.export(converted, (images(1),), strict=False).module()
        litert_torch.convert(program, (images(1),), strict_export=False).export(str(tmp_path / "plain.tflite"))
        assert tflite.TARGET.inspect(tmp_path / "plain.tflite").float_compute_ops

        tflite.TARGET.write(convert(quantize(network(), [images()])), tmp_path / "ours.tflite")
        contents = tflite.TARGET.inspect(tmp_path / "ours.tflite")
        assert contents.float_compute_ops == ()
        assert contents.float_weight_bytes == 0
        assert contents.int8_weight_bytes == 8 * 3 * 9 + 8 * 4
