"""Layers that stay float or get 16-bit activations, how much each costs, what to choose, and the calibration guard."""

from __future__ import annotations

import copy
import json
import warnings
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

from lightning_edge.errors import CompressionError, ExportError
from lightning_edge.exporters import ExportWarning, export
from lightning_edge.network import Inputs
from lightning_edge.quantization import Quantize, convert, float_copy, is_quantized, quantize, quantized_forward
from lightning_edge.quantization.calibration_check import CalibrationWarning, check_calibration
from lightning_edge.quantization.choose.bar_chart import bar_chart
from lightning_edge.quantization.choose.mixed import mixed_plan, plan_increase
from lightning_edge.quantization.choose.sensitivity import LayerSensitivity, Sensitivities, difference, sensitivity
from lightning_edge.quantization.plan import check_plan, precision_of
from lightning_edge.schedule import Change, Clock


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


SUFFIXES = {"executorch": ".pte", "coreml": ".mlpackage", "tflite": ".tflite", "onnx": ".onnx"}


class Outlier(nn.Module):
    """Three layers, the second of which has one weight so large that int8 leaves nothing of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.broken = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)
        with torch.no_grad():
            self.broken.weight[:, 0] = 40.0
            self.first.weight[0] = 0.0
            self.first.bias[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.broken(torch.relu(self.first(x)))))
        return logits


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(8, 8) for _ in range(count)]


def quantizers(network: nn.Module) -> int:
    return len(list(quantized_forward(network)[1].fake_quantizers()))


class TestPlan:
    def test_the_last_pattern_that_matches_decides_and_skip_comes_last(self) -> None:
        plan = check_plan({"features.*": "float", "features.3": "int8", "head": "int8_a16"}, ["head"])
        assert precision_of(["features", "features.3"], plan) == "int8"
        assert precision_of(["features.0"], plan) == "float"
        assert precision_of(["head"], plan) == "float"
        assert precision_of(["stem"], plan) == "int8"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"skip": "head"}, "skip='head' is no list of patterns"),
            ({"skip": [""]}, "skip=.* is no list of patterns"),
            ({"precisions": {"head": "int4"}}, "'head': 'int4' is not one of"),
            ({"precisions": ["head"]}, "is no mapping"),
            ({"precisions": {"": "int8"}}, "'' is no pattern"),
        ],
    )
    def test_bad_settings_are_refused_at_construction(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Quantize(**arguments)
        with pytest.raises(ValueError, match=message):
            quantize(Outlier(), batches(), **arguments)

    def test_settings_show_them(self) -> None:
        settings = Quantize(skip=["head"], precisions={"stem": "int8_a16"}).settings()
        assert settings["skip"] == ["head"]
        assert settings["precisions"] == {"stem": "int8_a16"}


class TestSkip:
    def test_a_skipped_layer_has_no_quantizers_and_keeps_its_weights(self) -> None:
        network = Outlier()
        whole, skipped = quantize(network, batches()), quantize(network, batches(), skip=["broken"])
        assert quantizers(skipped) < quantizers(whole)
        weights = dict(convert(skipped).graph.named_buffers()) | dict(convert(skipped).graph.named_parameters())
        assert sum(value.dtype == torch.int8 for value in weights.values()) == 2
        assert any(torch.equal(value, network.broken.weight) for value in weights.values())

    def test_it_keeps_a_layer_that_int8_breaks(self) -> None:
        network, x = Outlier(), torch.randn(64, 8)
        expected = network(x)
        whole = difference("mse", quantize(network, [x])(x), expected)
        skipped = difference("mse", quantize(network, [x], skip=["bro*"])(x), expected)
        assert skipped < whole / 5

    def test_what_moves_the_input_to_a_skipped_layer_is_left_alone(self) -> None:
        network = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        images = torch.randn(4, 3, 8, 8)
        names = [str(node.target) for node in convert(quantize(network, [images], skip=["1"])).graph.graph.nodes]  # type: ignore[union-attr]
        assert not any("quantize_per_tensor" in name for name in names[: names.index("aten.conv2d.default")])
        wide = convert(quantize(network, [images], precisions={"1": "int8_a16"})).graph.graph.nodes  # type: ignore[union-attr]
        first = next(node for node in wide if "quantize_per_tensor" in str(node.target))
        assert first.args[5] == torch.int16

    def test_a_module_is_skipped_with_all_in_it_and_what_follows_it(self) -> None:
        model = MODELS["plain"]
        network = quantize(model.build(), [model.inputs(4)], skip=["features"])
        graph = convert(network).graph
        operations = [str(node.target) for node in graph.graph.nodes]  # type: ignore[union-attr]
        first = next(index for index, name in enumerate(operations) if "quantize_per_tensor" in name)
        assert [name for name in operations[:first] if "conv2d" in name or "relu" in name or "hardtanh" in name]
        assert not [name for name in operations[first:] if "conv2d" in name]

    def test_the_parts_of_a_split_in_a_skipped_module_stay_float(self) -> None:
        class Gate(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                first, second = x.chunk(2, 1)
                return first * second

        network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), Gate()), nn.Conv2d(4, 4, 3))
        graph = convert(quantize(network, [torch.randn(4, 3, 8, 8)], skip=["0"])).graph.graph  # type: ignore[union-attr]
        names = [str(node.target) for node in graph.nodes]
        assert not any("quantize_per_tensor" in name for name in names[: names.index("aten.mul.Tensor")])

    def test_a_pool_is_no_layer_to_choose_for(self) -> None:
        """It is written out as a convolution, and stays with what is before it."""
        model = MODELS["plain"]
        network, inputs = model.build(), model.inputs(4)
        found = sensitivity(network, [inputs], [inputs])
        assert {layer.name for layer in found.layers} == {"features.0", "features.3", "head.3"}
        with pytest.raises(CompressionError, match="all 3 layers"):
            quantize(network, [inputs], skip=["features", "head.3"])

    @pytest.mark.parametrize(
        ("target", "skip"),
        [("onnx", ["shortcut"])]
        + [pytest.param(name, ["branch", "head"], marks=pytest.mark.slow) for name in SUFFIXES]
        + [pytest.param(name, ["shortcut"], marks=pytest.mark.slow) for name in ("executorch", "coreml", "tflite")],
        ids=str,
    )
    def test_it_rides_through_every_exporter(self, target: str, skip: list[str], tmp_path: Path) -> None:
        suffix = SUFFIXES[target]
        model = MODELS["residual"]
        network, inputs = model.build(), model.inputs(8)
        quantized = quantize(network, [inputs], skip=skip)
        with pytest.warns(ExportWarning, match="compute in float"):
            artifact = export(quantized, target, tmp_path / f"net{suffix}", batches=[inputs])
        kept = sum(
            4 * layer.weight.numel()
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear) and name.split(".")[0] in skip
        )
        assert artifact.contents.float_weight_bytes == kept
        assert artifact.contents.int8_weight_bytes > 0

    def test_a_pattern_that_matches_nothing_is_refused_with_the_names(self) -> None:
        with pytest.raises(CompressionError, match=r"'heda' in skip or precisions matches no .*first, broken, last"):
            quantize(Outlier(), batches(), skip=["heda"])

    def test_skipping_everything_is_refused(self) -> None:
        network = Outlier()
        with pytest.raises(CompressionError, match="all 3 layers of the network in float"):
            quantize(network, batches(), skip=["*"])
        assert not is_quantized(network)


class _Batch:
    """The batch at hand of a loop of our own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def inputs(self) -> Inputs:
        return Inputs.of(self.x)

    def gradients(self, *, per_sample: bool = False) -> Any:
        raise AssertionError


class TestPhase:
    def train(self, network: nn.Module, phase: Quantize, changes: list[Change], steps: range) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        network.train()
        for step in steps:
            torch.manual_seed(step)
            batch = _Batch(torch.randn(8, 8))
            while (change := phase.plan(network, Clock(step // 4, None), changes, batch)) is not None:  # type: ignore[arg-type]
                Quantize.perform(network, change)
                phase.prime(network, change, batch)  # type: ignore[arg-type]
                changes.append(change)
            optimizer.zero_grad()
            network(batch.x).square().mean().backward()
            optimizer.step()

    def test_training_with_a_plan_resumes_exactly(self, tmp_path: Path) -> None:
        phase = Quantize(start=1, skip=["last"], precisions={"broken": "int8_a16"})
        network = Outlier()
        fresh = copy.deepcopy(network)
        changes: list[Change] = []
        self.train(network, phase, changes, range(6))
        assert phase.describe(changes[0]).endswith("int8_a16: broken, float: last")
        torch.save({"changes": changes, "weights": network.state_dict()}, tmp_path / "checkpoint.pt")
        self.train(network, phase, changes, range(6, 9))

        stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        for change in stored["changes"]:
            Quantize.perform(fresh, change)
        fresh.load_state_dict(stored["weights"])
        self.train(fresh, phase, stored["changes"], range(6, 9))
        for (name, ours), (_, theirs) in zip(fresh.state_dict().items(), network.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), name
        x = torch.randn(4, 8)
        assert torch.equal(convert(fresh)(x), convert(network)(x))

    def test_a_wrong_name_is_told_at_the_first_batch(self) -> None:
        with pytest.raises(CompressionError, match="'heda'"):
            Quantize(start=100, skip=["heda"]).plan(Outlier(), Clock(0, 0.0), [], _Batch(torch.randn(2, 8)))  # type: ignore[arg-type]


class TestWideActivations:
    @pytest.mark.parametrize(
        "precisions",
        [
            pytest.param({"*": "int8_a16"}, marks=pytest.mark.slow),
            pytest.param({"branch": "int8_a16"}, marks=pytest.mark.slow),
            {"stem": "float", "head": "int8_a16"},
        ],
        ids=str,
    )
    def test_litert_runs_them(self, precisions: dict[str, str], tmp_path: Path) -> None:
        model = MODELS["residual"]
        network, inputs = model.build(), model.inputs(8)
        quantized = quantize(network, [inputs], precisions=precisions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExportWarning)
            artifact = export(quantized, "tflite", tmp_path / "net.tflite", batches=[inputs], io="float")
        assert artifact.contents.int8_weight_bytes > 0
        torch.testing.assert_close(artifact(*inputs.args)[0], convert(quantized)(*inputs.args), atol=2e-3, rtol=0)

    def test_they_are_closer_than_8_bits(self) -> None:
        model = MODELS["residual"]
        network, inputs = model.build(), model.inputs(8)
        narrow = plan_increase(network, {}, [inputs], [inputs])
        assert plan_increase(network, {"*": "int8_a16"}, [inputs], [inputs]) < narrow / 3

    @pytest.mark.parametrize("target", ["executorch", "coreml", "onnx"])
    def test_other_targets_refuse_them_before_writing(self, target: str, tmp_path: Path) -> None:
        suffix = {"executorch": ".pte", "coreml": ".mlpackage", "onnx": ".onnx"}[target]
        quantized = quantize(Outlier(), batches(), precisions={"first": "int8_a16"})
        with pytest.raises(ExportError, match=rf"{target}: layers of the network have 16-bit activations.*tflite"):
            export(quantized, target, tmp_path / f"net{suffix}")
        assert not list(tmp_path.iterdir())


class TestSensitivity:
    def test_the_broken_layer_comes_first_and_the_numbers_are_those_of_that_layer_alone(self) -> None:
        network, data = Outlier(), batches()
        state = copy.deepcopy(network.state_dict())
        found = sensitivity(network, data, data)
        assert found.layers[0].name == "broken"
        assert {layer.name: layer.weights for layer in found.layers} == {"first": 128, "broken": 256, "last": 64}
        assert found.samples == 24
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        # By hand: the network with one layer's weight rounded to 127 steps each side, its input left alone.
        rounded = float_copy(network)
        for weight in (rounded.last.weight,):  # type: ignore[union-attr]
            step = weight.detach().abs().amax(1, keepdim=True) / 127  # type: ignore[union-attr]
            weight.data = (weight / step).round() * step  # type: ignore[union-attr, operator]
        by_hand = sum(difference("mse", rounded(x), network(x)) for x in data) / 3
        last = next(layer for layer in found.layers if layer.name == "last")
        assert last.increase_a16 == pytest.approx(by_hand, rel=1e-3)
        assert last.increase > last.increase_a16

    def test_the_whole_network_is_that_of_quantize(self) -> None:
        network, data = Outlier(), batches()
        assert sensitivity(network, data, data).all_int8 == pytest.approx(plan_increase(network, {}, data, data))

    def test_a_loss_of_the_user(self) -> None:
        network, data = Outlier(), batches()
        pairs = [(x, torch.randint(0, 4, (8,))) for x in data]
        found = sensitivity(network, data, pairs, loss=nn.functional.cross_entropy)
        expected = sum(nn.functional.cross_entropy(network(x), y).item() for x, y in pairs) / 3
        assert found.baseline == pytest.approx(expected)
        assert found.loss == "cross_entropy"
        assert sensitivity(network, data, data, loss="kl").layers[0].name == "broken"

    def test_table_markdown_json_and_picture(self) -> None:
        found = sensitivity(Outlier(), batches(), batches())
        head, *body = found.table().splitlines()
        assert head.startswith("layer")
        assert [line.split()[0] for line in body] == [*(layer.name for layer in found.layers), "the"]
        assert found.markdown().count("\n") == 6
        assert Sensitivities.from_dict(json.loads(found.json())) == found
        texts = [element.text for element in ElementTree.fromstring(found.svg()).iter() if element.tag.endswith("text")]
        assert {"broken", "first", "last", "layer"} <= set(texts)
        assert any("increase of mse" in str(text) for text in texts)

    def test_a_chart_of_names_that_xml_reserves(self) -> None:
        root = ElementTree.fromstring(bar_chart({"a<b>&": 1.0, "c": -1.0}, title="t", axis="x", rows="y"))
        bars = [element for element in root if element.tag.endswith("rect")][1:]
        assert [float(bar.get("width") or -1) for bar in bars] == [420.0, 0.0]
        with pytest.raises(ValueError, match="values is empty"):
            bar_chart({}, title="t", axis="x", rows="y")

    def test_what_cannot_be_measured_is_refused(self) -> None:
        with pytest.raises(ValueError, match="calibration_batches is empty"):
            sensitivity(Outlier(), [], batches())
        with pytest.raises(ValueError, match="evaluation_batches is empty"):
            sensitivity(Outlier(), batches(), [])
        with pytest.raises(ValueError, match="loss='accuracy' is not one of"):
            sensitivity(Outlier(), batches(), batches(), loss="accuracy")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pair"):
            sensitivity(Outlier(), batches(), batches(), loss=nn.functional.cross_entropy)
        with pytest.raises(CompressionError, match="no operation that can run in int8"):
            sensitivity(nn.Softplus(), batches(), batches())


class TestMixedPlan:
    def test_a_size_is_kept_and_goes_to_the_layer_that_gains_most(self) -> None:
        network, data = Outlier(), batches()
        chosen = mixed_plan(network, data, data, weight_bytes=128 + 64 + 4 * 256)
        assert chosen.precisions["broken"] == "float"
        assert chosen.weight_bytes <= 128 + 64 + 4 * 256
        assert chosen.measured_increase == pytest.approx(plan_increase(network, chosen.precisions, data, data))
        assert chosen.measured_increase < chosen.sensitivities.all_int8
        Quantize(precisions=dict(chosen.precisions))

    def test_a_loss_is_kept_with_few_bytes(self) -> None:
        network, data = Outlier(), batches()
        found = sensitivity(network, data, data)
        chosen = mixed_plan(network, data, data, loss_increase=found.all_int8 / 5, sensitivities=found)
        assert chosen.measured_increase <= found.all_int8 / 5
        assert chosen.precisions == {"broken": "float"}
        assert mixed_plan(network, data, data, loss_increase=found.all_int8, sensitivities=found).precisions == {}

    def test_wide_activations_cost_no_bytes(self) -> None:
        model = MODELS["residual"]
        network, data = model.build(), [model.inputs(8)]
        found = sensitivity(network, data, data)
        size = sum(layer.weights for layer in found.layers)
        chosen = mixed_plan(network, data, data, weight_bytes=size, sensitivities=found, wide_activations=True)
        assert set(chosen.precisions.values()) == {"int8_a16"}
        assert chosen.weight_bytes == size

    def test_greedy_by_increase_for_each_byte(self) -> None:
        layers = (LayerSensitivity("broken", 3.0, 3.0, 256), LayerSensitivity("last", 2.0, 2.0, 64))
        given = Sensitivities((*layers, LayerSensitivity("first", 0.1, 0.1, 128)), "mse", 0.0, 5.0, 1)
        size = 256 + 128 + 64 + 3 * 64
        chosen = mixed_plan(Outlier(), batches(), batches(), weight_bytes=size, sensitivities=given)
        assert chosen.precisions == {"last": "float"}
        assert chosen.predicted_increase == pytest.approx(3.1)
        assert chosen.weight_bytes == size

    @pytest.mark.parametrize(
        ("limits", "error", "message"),
        [
            ({}, ValueError, "either weight_bytes"),
            ({"weight_bytes": 1, "loss_increase": 1.0}, ValueError, "either weight_bytes"),
            ({"weight_bytes": 447}, CompressionError, "weight_bytes=447 is below the 448 bytes"),
            ({"loss_increase": -1.0}, ValueError, "limit of -1.0"),
            ({"loss_increase": 0.0}, CompressionError, "no plan keeps the increase of mse at 0"),
        ],
    )
    def test_limits_that_cannot_be_kept_are_refused(
        self, limits: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            mixed_plan(Outlier(), batches(), batches(), **limits)


class Narrow(nn.Module):
    """A few weights that int8 spoils, and many that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Linear(8, 4)
        self.many = nn.Linear(4, 256)
        with torch.no_grad():
            self.few.weight[:, 0] = 40.0

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.many(torch.tanh(self.few(x) / 40))
        return outputs


class TestMixedWhereInt8Begins:
    @pytest.mark.parametrize(
        ("settings", "layers"),
        [
            ({"precisions": "mixed"}, {"few": "float"}),
            ({"precisions": "int8"}, {}),
            ({"precisions": "mixed", "skip": ["few"]}, {"few": "float"}),
            # What is left is too small a network to leave any of it in float.
            ({"precisions": "mixed", "skip": ["many"]}, {"many": "float"}),
        ],
    )
    def test_layers_that_cost_little_and_lose_much_stay_float(
        self, settings: dict[str, Any], layers: dict[str, str]
    ) -> None:
        network, phase = Narrow().train(), Quantize(start=0, **settings)
        before = copy.deepcopy(network.state_dict())
        change = phase.plan(network, Clock(0, None), [], _Batch(torch.randn(16, 8)))  # type: ignore[arg-type]
        assert change is not None
        assert change["layers"] == layers
        assert network.training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        Quantize.perform(network, change)
        assert is_quantized(network)

    def test_another_word_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"precisions='mixde' is not known; give 'int8' or 'mixed', or patterns"):
            Quantize(precisions="mixde")  # type: ignore[arg-type]


class TestGuard:
    def test_the_data_it_was_calibrated_on_fits(self) -> None:
        data = batches(8)
        assert check_calibration(quantize(Outlier(), data), data) == []

    def test_wider_data_is_clipped_and_narrower_data_uses_little(self) -> None:
        data = batches(8)
        quantized = quantize(Outlier(), data)
        wide = check_calibration(quantized, [4 * x for x in data])
        assert wide[0].clipped > 0.3
        assert "input x" in [finding.layer for finding in wide]
        assert all(first.clipped >= second.clipped for first, second in pairwise(wide))
        narrow = check_calibration(quantized, [0.05 * x for x in data])
        assert [finding.layer for finding in narrow if finding.used < 0.1] == ["input x"]
        assert narrow[0].clipped == 0
        assert "input x: calibrated for" in str(narrow[0])

    def test_it_moves_nothing(self) -> None:
        data = batches()
        quantized = quantize(Outlier(), data)
        state, modes = copy.deepcopy(quantized.state_dict()), [module.training for module in quantized.modules()]
        check_calibration(quantized, [10 * x for x in data])
        assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())
        assert [module.training for module in quantized.modules()] == modes
        assert not any(module._forward_pre_hooks for module in quantized.modules())

    def test_quantize_warns_with_the_layers_and_what_to_do(self) -> None:
        data = batches()
        with pytest.warns(CalibrationWarning, match=r"(?s)input x: calibrated.*Calibrate with batches drawn as"):
            quantize(Outlier(), data, validation_batches=[5 * x for x in data])
        with warnings.catch_warnings():
            warnings.simplefilter("error", CalibrationWarning)
            quantize(Outlier(), data, validation_batches=data)

    def test_a_layer_that_gave_nothing_but_zeros_is_told_at_conversion(self) -> None:
        network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        with torch.no_grad():
            network[0].bias.fill_(-1e3)
        data = [torch.randn(8, 4)]
        with pytest.warns(CalibrationWarning, match=r"^1 gave nothing but 0 .*look for a dead ReLU.*skip=") as told:
            convert(quantize(network, data))
        assert [one.category for one in told].count(CalibrationWarning) == 1
        with torch.no_grad():
            network[0].bias.fill_(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CalibrationWarning)
            convert(quantize(network, data))

    def test_bad_arguments_are_refused(self) -> None:
        quantized = quantize(Outlier(), batches())
        with pytest.raises(ValueError, match="validation_batches is empty"):
            check_calibration(quantized, [])
        with pytest.raises(ValueError, match=r"max_clipped=2 is not allowed"):
            check_calibration(quantized, batches(), max_clipped=2)
        with pytest.raises(ValueError, match=r"max_used=0.5 is not allowed"):
            check_calibration(quantized, batches(), max_used=0.5)
        with pytest.raises(CompressionError, match="holds no quantized network"):
            check_calibration(Outlier(), batches())
