"""How files are called: names, layout, and what is kept of that in the file, for every target."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import batches, network
from torch import Tensor, nn

from lightning_edge import Interface
from lightning_edge.exporters import TARGETS, Artifact, ExportWarning, contents_of, export, load, target
from lightning_edge.exporters import input_adapter as front
from lightning_edge.exporters.default_names import RESERVED, with_names
from lightning_edge.exporters.verify.agreement import reference_outputs
from lightning_edge.network import Deployable, Inputs, Precision


def without(*names: str) -> list[Any]:
    """All targets, some of them slow ones."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in names else name for name in TARGETS]


NAMED = Interface(inputs=("picture", "extra"), outputs=("logits", "hidden"), layout="nhwc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interface")


@cache
def written(folder: Path, name: str, target_name: str, precision: Precision, interface: Interface) -> Artifact:
    """A file of one of the test networks, proven on its batches."""
    path = folder / f"{name}-{precision}-{abs(hash(interface))}{target(target_name).suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        given: dict[str, Any] = {"interface": interface, "isolated": False}
        return export(network(name, precision), target_name, path, batches=batches(name), **given)


class Pair(nn.Module):
    """An image and some numbers, in; two outputs with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor, extra: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.layer(images))
        return {"b": hidden.mean((2, 3)) + extra, "a": hidden}


# The description


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": ("a", "b", "a")}, "names a twice; every input and output needs its own name"),
        ({"inputs": ("image",), "outputs": ("image",)}, "names image twice"),
        ({"outputs": ("class scores",)}, "'class scores' is no name that every format takes; give letters"),
        ({"inputs": ("0",)}, "'0' is no name"),
        ({"inputs": "image"}, "inputs='image'.: give a list of texts"),
        ({"outputs": ("",)}, "give a list of texts that are not empty"),
        ({"layout": "nchw "}, "layout='nchw '. is not one of .'nchw', 'nhwc'."),
    ],
)
def test_what_no_file_can_have_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interface(**given)


def test_notes_are_read_back() -> None:
    assert Interface().notes() == {}
    assert NAMED.notes()["lightning_edge.layout"] == "nhwc"
    assert Interface.of_notes({**NAMED.notes(), "author": "someone"}) == NAMED
    with pytest.raises(ValueError, match="layout='nwhc'"):
        Interface.of_notes({"lightning_edge.layout": "nwhc"})


def test_one_channel_has_the_strides_of_its_shape() -> None:
    """ExecuTorch reads the order of dimensions off them, which one channel leaves open."""
    last = front.as_file_takes(torch.rand(1, 1, 8, 8), Interface(layout="nhwc"))
    assert (last.shape, last.stride()) == ((1, 8, 8, 1), (64, 8, 1, 1))


# The files


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize("name", without("coreml"))
def test_images_may_have_their_channels_last(folder: Path, name: str, precision: Precision) -> None:
    artifact = written(folder, "two_inputs", name, precision, Interface(layout="nhwc"))
    assert [end.shape for end in artifact.contents.inputs] == [(1, 8, 8, 3), (1, 4)]
    assert [spec.shape for spec in artifact.inputs] == [(1, 3, 8, 8), (1, 4)]
    again = load(artifact.path, isolated=False)
    assert [spec.shape for spec in again.inputs] == [(1, 3, 8, 8), (1, 4)]
    inputs = batches("two_inputs")[0]
    wanted = reference_outputs(network("two_inputs", precision), inputs)
    step = max(scale or 0.0 for scale in (*network("two_inputs", precision).output_scales, 0.0))
    for output, reference in zip(again(*inputs.args, **inputs.kwargs), wanted, strict=True):
        torch.testing.assert_close(output, reference, rtol=0.0, atol=2.01 * step or 1e-5)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize("name", without("executorch", "coreml", "onnx"))
@pytest.mark.parametrize("model", ["two_inputs", pytest.param("residual", marks=pytest.mark.slow)])
def test_channels_last_leaves_nothing_more_outside_the_delegate(
    folder: Path, model: str, name: str, precision: Precision
) -> None:
    last, first = (
        written(folder, model, name, precision, Interface(layout=layout)).contents for layout in ("nhwc", "nchw")
    )
    assert last.undelegated_ops == first.undelegated_ops
    assert (last.float_compute_ops, last.float_ops) == (first.float_compute_ops, first.float_ops)
    if last.placements is not None and first.placements is not None:  # an ONNX file does not tell
        assert last.placements.fallback == first.placements.fallback
    if name == "tflite":  # LiteRT computes so itself
        assert last.ops.get("TRANSPOSE", 0) < first.ops["TRANSPOSE"]


@pytest.mark.parametrize("name", without("coreml"))
def test_inputs_and_outputs_are_named(tmp_path: Path, name: str) -> None:
    inputs = (torch.rand(2, 3, 6, 5), torch.rand(2, 4))
    path = tmp_path / f"net{target(name).suffix}"
    artifact = export(Pair(), name, path, inputs=inputs, batches=[inputs], interface=NAMED, isolated=False)
    contents = contents_of(path)
    assert [end.name for end in contents.inputs] == ["picture", "extra"]
    assert [end.name for end in contents.outputs] == ["logits", "hidden"]
    assert contents.interface == NAMED
    assert [tuple(output.shape) for output in artifact(*inputs)] == [(2, 4), (2, 4, 6, 5)]


def test_names_are_those_that_the_runtimes_give(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    given = (torch.rand(1, 3, 6, 5), torch.rand(1, 4))
    paths = {name: tmp_path / f"net{target(name).suffix}" for name in ("onnx", "tflite")}
    network = Pair()
    wanted, _ = (export(network, name, path, inputs=given, interface=NAMED)(*given)[0] for name, path in paths.items())
    feed = {"picture": given[0].permute(0, 2, 3, 1).contiguous().numpy(), "extra": given[1].numpy()}
    session = onnxruntime.InferenceSession(str(paths["onnx"]))
    torch.testing.assert_close(torch.from_numpy(session.run(["logits"], feed)[0]), wanted)
    signature = interpreter.Interpreter(str(paths["tflite"])).get_signature_runner()
    torch.testing.assert_close(torch.from_numpy(signature(**feed)["logits"]), wanted)


class Odd(nn.Module):
    """Outputs whose keys are no names everywhere, and one that is called as an input is."""

    def forward(self, x: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        return {"state": x * mask, "mask": x + 1, "a.b": x - 1, "a b": x * 3, "0": x * 2}


ODD = Inputs((torch.rand(1, 4),), {"mask": torch.rand(1, 4)})
ODD_NAMES = (["input", "mask"], ["output_state", "output_mask", "a_b", "output_a_b", "output_0"])


def test_default_names_are_names_in_every_format() -> None:
    found = with_names(Interface(), Deployable(Odd(), ODD, "fp32"))
    assert ([*found.inputs], [*found.outputs]) == ODD_NAMES
    two = Deployable(nn.Bilinear(4, 4, 2), Inputs((torch.rand(1, 4), torch.rand(1, 4))), "fp32")
    assert with_names(Interface(), two).inputs == ("input_0", "input_1")
    assert with_names(Interface(outputs=("input",)), two).outputs == ("input",)
    assert with_names(Interface(), two).outputs == ("output",)


def test_the_words_that_are_no_names_are_core_mls() -> None:
    package = pytest.importorskip("lightning_edge.exporters.coreml.package")
    pytest.importorskip("coremltools")
    assert all(package.feature_names([word], []) != [word] for word in RESERVED)
    assert package.feature_names(ODD_NAMES[1], ODD_NAMES[0]) == ODD_NAMES[1]


@pytest.mark.filterwarnings("ignore::lightning_edge.exporters.ExportWarning")
@pytest.mark.parametrize("name", without("executorch"))
def test_default_names_are_the_same_for_all_targets(tmp_path: Path, name: str) -> None:
    pytest.importorskip(target(name).needs[0])
    contents = export(Odd(), name, tmp_path / f"net{target(name).suffix}", inputs=ODD, isolated=False).contents
    assert ([end.name for end in contents.inputs], [end.name for end in contents.outputs]) == ODD_NAMES
    assert (list(contents.interface.inputs), list(contents.interface.outputs)) == ODD_NAMES


def test_names_may_be_those_of_what_is_inside(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    given = (torch.rand(2, 3, 6, 5), torch.rand(2, 4))
    plain = export(Pair(), "onnx", tmp_path / "plain.onnx", inputs=given)
    swapped = Interface(inputs=("input_1", "input_0"), outputs=("relu", "conv2d"))
    artifact = export(Pair(), "onnx", tmp_path / "net.onnx", inputs=given, interface=swapped, batches=[given])
    assert [end.name for end in artifact.contents.inputs] == ["input_1", "input_0"]
    assert [end.name for end in artifact.contents.outputs] == ["relu", "conv2d"]
    assert [end.name for end in plain.contents.inputs] == ["input_0", "input_1"]


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        (Interface(inputs=("image",)), r"names 1 inputs, and the network takes 2: \[1, 3, 6, 5\], \[1, 4\]"),
        (Interface(outputs=("one", "two", "three")), "names 3 outputs, and the network gives 2: b, a"),
    ],
)
def test_an_interface_of_another_network_is_refused(tmp_path: Path, interface: Interface, message: str) -> None:
    given = (torch.rand(1, 3, 6, 5), torch.rand(1, 4))
    with pytest.raises(ValueError, match=message):
        export(Pair(), "onnx", tmp_path / "net.onnx", inputs=given, interface=interface)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_without_images_is_refused(tmp_path: Path) -> None:
    interface = Interface(layout="nhwc")
    with pytest.raises(ValueError, match=r"layout='nhwc'. is for 4-D inputs, and the network takes \[1, 6\]"):
        export(nn.Linear(6, 2), "onnx", tmp_path / "n.onnx", inputs=torch.rand(1, 6), interface=interface)


def test_a_word_of_core_ml_is_no_name(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    interface = Interface(outputs=("state",))
    with pytest.raises(ValueError, match="Core ML has 'state' for a word of its own"):
        export(nn.Linear(6, 2), "coreml", tmp_path / "n.mlpackage", inputs=torch.rand(1, 6), interface=interface)
    assert list(tmp_path.iterdir()) == []
