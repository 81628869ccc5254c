"""What all targets share: files whole or not at all, checked contents and outputs, one clear error for each fault."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import batches, module, network
from disk import files_of_at_most
from torch import Tensor, nn

from lightning_edge.contents import Contents
from lightning_edge.errors import AgreementError, ExportError, MissingExtraError, RunnerError
from lightning_edge.exporters import (
    TARGETS,
    ExportWarning,
    TensorSpec,
    deployable,
    export,
    load,
    onnx,
    stage,
    target,
    tflite,
)
from lightning_edge.exporters.artifact import compressed_bytes, size_bytes
from lightning_edge.exporters.program import in_file_form
from lightning_edge.exporters.run.calls import conform
from lightning_edge.exporters.target import explain
from lightning_edge.exporters.verify import contents as checks
from lightning_edge.exporters.verify.agreement import reference_outputs
from lightning_edge.files import StagedPath
from lightning_edge.measure import Tolerance
from lightning_edge.network import Deployable, Inputs
from lightning_edge.quantization import quantize

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")
pytest.importorskip("onnxruntime")

SMALL = "difference"


def left(folder: Path) -> list[str]:
    """Everything under a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "small.tflite"
    export(network(SMALL, "int8"), "tflite", path, batches=batches(SMALL))
    return path


def writes(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    monkeypatch.setattr(tflite.TFLite, "write", staticmethod(write))


def zeroed(name: str) -> Deployable:
    other = copy.deepcopy(module(name))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    return deployable(other, batches(name)[0])


# Targets and models


def test_every_target_offers_the_three_functions() -> None:
    suffixes = {target(name).suffix for name in TARGETS}
    assert suffixes == {".pte", ".mlpackage", ".tflite", ".onnx"}
    assert all(callable(getattr(target(name), part)) for name in TARGETS for part in ("write", "inspect", "open"))


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="target='tvm' is not one of 'executorch', 'coreml', 'tflite', 'onnx'"):
        target("tvm")


def test_deployable_copies_a_float_module_and_leaves_it_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train().half()
    made = deployable(model, torch.randn(4, 3, dtype=torch.float64))
    assert model.training
    assert model[0].weight.dtype == torch.float16
    assert made.precision == "fp32"
    assert made.inputs.batch_size == 1
    torch.testing.assert_close(made(*made.inputs.args), made(*made.inputs.args))  # no dropout


def test_deployable_converts_a_network_quantized_inside_a_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = quantize(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    assert deployable(Outer()).precision == "int8"


def test_deployable_does_not_copy_the_trainer() -> None:
    class Uncopyable:
        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("copied")

    model = nn.Sequential(nn.Linear(3, 2))
    model.__dict__["_trainer"] = Uncopyable()
    assert deployable(model, torch.randn(1, 3)).precision == "fp32"


def test_buffers_are_in_the_state_dict_of_what_is_written() -> None:
    """ExecuTorch refuses a file whose convolution has weights that are not, or writes one that does not load."""
    network = nn.Sequential(nn.Linear(3, 2))
    network.register_buffer("fixed", torch.ones(2), persistent=False)
    assert "fixed" in deployable(network, torch.randn(1, 3)).graph.state_dict()
    assert "fixed" not in network.state_dict()


def test_deployable_says_that_inputs_are_missing_or_too_many() -> None:
    with pytest.raises(ValueError, match="inputs are missing: to export Linear in float"):
        deployable(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="leave inputs out"):
        deployable(network(SMALL, "fp32"), torch.randn(1, 3))


# Arguments


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("net.pte", {}, r"has the suffix '.pte'; tflite writes .tflite"),
        ("net", {}, r"has the suffix ''; tflite writes .tflite"),
        ("net.tflite", {"quantise": True}, r"tflite has no option 'quantise'; it has io, integer_only, scheme"),
        ("net.tflite", {"io": "int4"}, r"io='int4' is not one of \('int8', 'float'\)"),
        ("net.tflite", {"io": "int8"}, r"io='int8' needs an int8 network"),
        ("net.tflite", {"threads": 0}, r"threads=0 is not allowed; give 1 or more"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, path: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "new" / path, **arguments)
    assert left(tmp_path) == []


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize(
    ("network", "shape", "what", "advice"),
    [
        (Branches(), (1, 3), "data-dependent", "write it without if and .item() on tensors."),
        (Singular(), (1, 3, 4), "svd", "or leave the target out."),
    ],
    ids=["branches", "operation"],
)
def test_what_no_target_takes_is_one_error_of_one_line(
    target_name: str, network: nn.Module, shape: tuple[int, ...], what: str, advice: str, tmp_path: Path
) -> None:
    path = tmp_path / f"net{target(target_name).suffix}"
    with pytest.raises(ExportError) as refused:
        export(network, target_name, path, inputs=torch.randn(*shape))
    message = str(refused.value)
    assert message.startswith(f"{target_name}: ")
    assert what in message
    assert message.endswith(advice)
    assert message.isprintable()
    assert left(tmp_path) == []


def test_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "litert_torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-edge\[tflite\]'"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "net.tflite")
    assert left(tmp_path) == []


# Files whole or not at all


def test_export_makes_missing_folders_and_leaves_one_file(tmp_path: Path) -> None:
    artifact = export(network(SMALL, "fp32"), "onnx", tmp_path / "a" / "b" / "net.onnx", batches=batches(SMALL))
    assert left(tmp_path) == ["a", "a/b", "a/b/net.onnx"]
    assert artifact.path == tmp_path / "a" / "b" / "net.onnx"
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert 0 < artifact.compressed_bytes < artifact.size_bytes
    assert artifact.load_ms > 0
    assert artifact.precision == "fp32"


def test_export_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    artifact = export(network(SMALL, "fp32"), "onnx", path)
    assert path.stat().st_size == artifact.size_bytes
    assert left(tmp_path) == ["net.onnx"]


def test_full_disk_is_one_error_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(network: Deployable, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    path = tmp_path / "net.tflite"
    path.write_bytes(b"old")
    writes(monkeypatch, write)
    with pytest.raises(
        ExportError, match=r"cannot write .*net\.tflite: the disk is full.* The old net\.tflite is as it"
    ):
        export(network(SMALL, "fp32"), "tflite", path)
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == ["net.tflite"]
    with pytest.raises(ExportError, match=r"the disk is full; free some space or choose another folder\.$"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "new" / "net.tflite")
    assert left(tmp_path) == ["net.tflite"]


def test_what_the_system_refuses_in_the_middle_of_a_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_the_system = []

    def write_file(network: Deployable, path: Path) -> None:
        with files_of_at_most(4096):
            try:
                path.write_bytes(bytes(100_000))
            finally:
                left_by_the_system.append(path.stat().st_size)

    writes(monkeypatch, write_file)
    with pytest.raises(ExportError, match=r"cannot write .*: it is larger than a file may be here \(ulimit -f\)"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "new" / "net.tflite")
    assert left_by_the_system == [4096]

    package = tmp_path / "package"
    folder(package, "x" * 100_000)

    def copy_package(network: Deployable, path: Path) -> None:
        with files_of_at_most(4096):
            shutil.copytree(package, path)

    # Many files at once fail with a list of errors in the place of a number.
    writes(monkeypatch, copy_package)
    with pytest.raises(ExportError, match=r"cannot write .*net\.tflite: it is larger than a file may be here"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "new" / "net.tflite")
    assert left(tmp_path) == ["package", "package/part"]


def test_disk_full_at_the_last_step_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with stage(network(SMALL, "fp32"), "onnx", path) as staged:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(ExportError, match="the disk is full"):
            staged.accept()
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == ["net.onnx"]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a file")
    with pytest.raises(ExportError, match="a part of its path is a file; choose another folder"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "file" / "net.tflite")
    with pytest.raises(ExportError, match="a part of its path is a file"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "file" / "deep" / "net.tflite")
    assert left(tmp_path) == ["file"]


def test_a_read_only_folder_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ExportError, match="the folder is read-only; choose another one"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "new" / "net.tflite")
    assert left(tmp_path) == []


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.tflite").mkdir()
    with pytest.raises(ExportError, match="a folder is there"):
        export(network(SMALL, "fp32"), "tflite", tmp_path / "net.tflite")


def test_staged_file_waits_until_it_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with stage(network(SMALL, "fp32"), "onnx", path) as staged:
        assert not path.exists()
        before = staged.artifact(**batches(SMALL)[0].kwargs)
        artifact = staged.accept()
        staged.discard()
    assert left(tmp_path) == ["net.onnx"]
    for one, other in zip(before, artifact(**batches(SMALL)[0].kwargs), strict=True):
        assert torch.equal(one, other)
    with stage(network(SMALL, "fp32"), "onnx", tmp_path / "new" / "net.onnx"):
        pass
    assert left(tmp_path) == ["net.onnx"]


def folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "part").write_text(text)


def test_a_package_replaces_the_old_one(tmp_path: Path) -> None:
    folder(tmp_path / "net.mlpackage", "old")
    place = StagedPath(tmp_path / "net.mlpackage")
    folder(place.staged, "new")
    place.accept()
    assert (tmp_path / "net.mlpackage" / "part").read_text() == "new"
    assert left(tmp_path) == ["net.mlpackage", "net.mlpackage/part"]


def test_a_package_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "net.mlpackage", "old")
    place = StagedPath(tmp_path / "net.mlpackage")
    folder(place.staged, "new")
    rename = os.rename

    def fail(source: Path, destination: Path) -> None:
        if source == place.staged:
            raise OSError(errno.EACCES, "no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ExportError, match="not yours to write"):
        place.accept()
    assert (tmp_path / "net.mlpackage" / "part").read_text() == "old"
    assert left(tmp_path) == ["net.mlpackage", "net.mlpackage/part"]


# What is in the file, and what it computes


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = onnx.TARGET.write
    monkeypatch.setattr(
        type(onnx.TARGET), "write", staticmethod(lambda network, path: write(in_file_form(zeroed(SMALL)), path))
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(
        AgreementError, match=r"largest difference 1 of the largest output, allowed 0\.001.* 16 samples"
    ):
        export(network(SMALL, "fp32"), "onnx", path, batches=batches(SMALL))
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == ["net.onnx"]
    export(network(SMALL, "fp32"), "onnx", path, batches=batches(SMALL), tolerance=Tolerance(max_relative=1, top1=0))
    assert path.read_bytes() != b"old"


def test_a_file_that_differs_is_written_with_a_warning(tmp_path: Path) -> None:
    strict = Tolerance(max_relative=0.0, mean_steps=0.0, max_steps=0.0, top1=None)
    path = tmp_path / "net.onnx"
    with pytest.warns(ExportWarning, match=r"net\.onnx differs: .* \(over 16 samples\)\. Leave the target out"):
        artifact = export(network(SMALL, "fp32"), "onnx", path, batches=batches(SMALL), tolerance=strict, scheme="fp16")
    assert artifact.judgement is not None
    assert artifact.judgement.grade == "differs"
    assert path.is_file()


@pytest.mark.parametrize(("given", "kept"), [(100, 32), (5, 5)])
def test_files_are_compared_on_samples_of_the_calibration_where_no_batches_are_given(
    tmp_path: Path, given: int, kept: int
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    artifact = export(quantize(model, [torch.randn(given, 4), torch.randn(9, 4)]), "onnx", tmp_path / "net.onnx")
    assert artifact.agreement is not None
    assert artifact.agreement.samples == kept


def test_an_int8_network_in_a_float_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = tflite.TARGET.write
    writes(monkeypatch, lambda network_, path: write(in_file_form(network(SMALL, "fp32")), path))
    with pytest.raises(ExportError, match=r"int8 but the file holds no int8 weights .* 2 x FULLY_CONNECTED"):
        export(network(SMALL, "int8"), "tflite", tmp_path / "net.tflite")
    assert left(tmp_path) == []


def contents(**changes: Any) -> Contents:
    return Contents(**{"int8_weight_bytes": 10, "float_weight_bytes": 0, "ops": {"Conv2d": 2}, **changes})


def test_float_layers_in_an_int8_file_are_an_error() -> None:
    with pytest.raises(ExportError, match="computes in float: 2 x Conv2d, FullyConnected"):
        checks.check_contents(
            network(SMALL, "int8"), contents(float_compute_ops=("Conv2d", "FullyConnected", "Conv2d")), "executorch"
        )


def test_float_islands_in_an_int8_file_are_a_warning() -> None:
    with pytest.warns(ExportWarning, match="compute in float: 2 x MUL"):
        checks.check_contents(network(SMALL, "int8"), contents(float_ops=("MUL", "MUL")), "tflite")


def test_nothing_delegated_is_an_error_and_something_left_out_a_warning() -> None:
    with pytest.raises(ExportError, match=r"none of the file's operations \(aten::mm\) is handed to the delegate"):
        checks.check_contents(
            network(SMALL, "fp32"), contents(delegated_ops=0, undelegated_ops=("aten::mm",)), "executorch"
        )
    with pytest.warns(ExportWarning, match="run outside the delegate, on slower kernels: aten::mean"):
        checks.check_contents(
            network(SMALL, "fp32"), contents(delegated_ops=3, undelegated_ops=("aten::mean",)), "executorch"
        )


def test_a_good_file_says_nothing() -> None:
    int8, fp32 = network(SMALL, "int8"), network(SMALL, "fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check_contents(int8, contents(delegated_ops=3, undelegated_ops=()), "executorch")
        checks.check_contents(fp32, contents(int8_weight_bytes=0, float_ops=("ADD",)), "tflite")


def test_layers_that_the_network_leaves_in_float_are_a_warning_only() -> None:
    graph = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
    partly = Deployable(graph, Inputs((torch.randn(1, 3),)), "int8")
    assert checks.float_products(graph) == ["linear"]
    assert checks.float_products(network(SMALL, "int8").graph) == []
    with pytest.warns(ExportWarning, match="compute in float: FULLY_CONNECTED"):
        checks.check_contents(partly, contents(float_compute_ops=("FULLY_CONNECTED",)), "tflite")
    with pytest.raises(ExportError, match=r"of the network itself, linear may stay in float"):
        checks.check_contents(partly, contents(float_compute_ops=("FULLY_CONNECTED",) * 2), "tflite")


def test_outputs_without_a_batch_are_compared_sample_by_sample(tmp_path: Path) -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().mean()

    artifact = export(Score(), "onnx", tmp_path / "net.onnx", inputs=torch.randn(1, 3), batches=[torch.randn(5, 3)])
    assert artifact(torch.randn(4, 3))[0].shape == (4,)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("tflite", 0.0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("executorch", 1.5), ("tflite", 1.5), ("executorch", 0.0))
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:1, 2 gave nothing but 0")
def test_a_network_that_always_gives_the_same_is_exact(name: str, bias: float, tmp_path: Path) -> None:
    pytest.importorskip({"tflite": "ai_edge_litert"}.get(name, name))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, bias)
    samples = torch.randn(8, 3)
    path = tmp_path / f"net{target(name).suffix}"
    artifact = export(quantize(model.eval(), [samples]), name, path, batches=[samples])
    torch.testing.assert_close(artifact(samples)[0], torch.full((8, 2), bias), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "name", ["executorch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tflite", "onnx"))]
)
@pytest.mark.filterwarnings("ignore:2, 3 gave nothing but 0")
def test_a_layer_that_gives_nothing_leaves_a_file_that_loads(name: str, tmp_path: Path) -> None:
    """Steps as small as the range made XNNPACK refuse the convolution before it, whose factor was above 256."""
    pytest.importorskip({"tflite": "ai_edge_litert", "onnx": "onnxruntime"}.get(name, name))
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head).eval()
    nn.init.constant_(model[0].bias, -1e3)
    samples = torch.randn(4, 3, 8, 8)
    path = tmp_path / f"net{target(name).suffix}"
    artifact = export(quantize(model, [samples]), name, path, batches=[samples])
    torch.testing.assert_close(artifact(samples)[0], model(samples), rtol=0, atol=0.01)


# Loading and running


def test_load_gives_what_export_gave(exported: Path) -> None:
    artifact = load(exported)
    assert (artifact.target, artifact.precision, artifact.path) == ("tflite", "int8", exported)
    inputs = batches(SMALL)[0]
    expected = reference_outputs(network(SMALL, "int8"), inputs)
    for output, wanted, scale in zip(
        artifact(**inputs.kwargs), expected, network(SMALL, "int8").output_scales, strict=True
    ):
        assert output.shape == wanted.shape
        assert scale is not None
        assert (output - wanted).abs().max() <= 4 * scale


def test_keywords_may_come_in_any_order(exported: Path) -> None:
    artifact = load(exported)
    zebra, ape = torch.randn(3, 6), torch.randn(3, 6)
    for one, other in zip(artifact(zebra=zebra, ape=ape), artifact(ape=ape, zebra=zebra), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(artifact(zebra=zebra, ape=ape)[0], artifact(zebra=ape, ape=zebra)[0])


def test_a_batch_is_run_sample_by_sample(exported: Path) -> None:
    artifact = load(exported)
    zebra, ape = torch.randn(5, 6), torch.randn(5, 6)
    whole = artifact(zebra=zebra, ape=ape)
    for index in range(5):
        single = artifact(zebra=zebra[index : index + 1], ape=ape[index : index + 1])
        assert all(torch.equal(one[index : index + 1], other) for one, other in zip(whole, single, strict=True))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"ape": torch.zeros(2, 6)},
            r"was given \[1, 6\] float32 per sample but takes \[1, 6\] float32, \[1, 6\] float32",
        ),
        ({"ape": torch.zeros(2, 6), "zebra": torch.zeros(2, 5)}, r"was given \[1, 6\] float32, \[1, 5\] float32 per"),
        ({"ape": torch.zeros(2, 6), "zebra": torch.zeros(2, 6, dtype=torch.int32)}, r"\[1, 6\] int32 per sample but"),
        ({"ape": torch.zeros(0, 6), "zebra": torch.zeros(0, 6)}, "batch of 0 samples"),
        ({}, "was given nothing"),
    ],
)
def test_wrong_inputs_are_told_against_the_expected(exported: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        load(exported)(**tensors)


def test_float64_inputs_are_taken(exported: Path) -> None:
    artifact = load(exported)
    zebra, ape = torch.randn(1, 6), torch.randn(1, 6)
    for one, other in zip(artifact(zebra=zebra.double(), ape=ape), artifact(zebra=zebra, ape=ape), strict=True):
        assert torch.equal(one, other)


def test_a_runtime_that_fails_says_so(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load(exported)
    monkeypatch.setattr(artifact.runner, "_interpreter", None)
    with pytest.raises(RunnerError, match=r"small\.tflite failed in LiteRT .*, XNNPACK, 1 thread: 'NoneType'"):
        artifact(zebra=torch.zeros(1, 6), ape=torch.zeros(1, 6))


def test_load_refuses_what_it_cannot_read(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(RunnerError, match="does not exist; export"):
        load(tmp_path / "none.tflite")
    (tmp_path / "net.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has the suffix '.h5'; load\(\) reads .pte \(executorch\), .mlpackage"):
        load(tmp_path / "net.h5")
    for cut in (0, 8, 100, exported.stat().st_size - 8):
        (tmp_path / "cut.tflite").write_bytes(exported.read_bytes()[:cut])
        with pytest.raises(RunnerError, match=r"cut\.tflite is no \.tflite file: .*Export it again"):
            load(tmp_path / "cut.tflite")
    (tmp_path / "foreign.tflite").write_bytes(b"something else altogether" * 100)
    with pytest.raises(RunnerError, match=r"foreign\.tflite is no \.tflite file: it does not begin as one"):
        load(tmp_path / "foreign.tflite")


# Small parts


def test_sizes_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(bytes(5000))
    (tmp_path / "a" / "two").write_bytes(os.urandom(300))
    assert size_bytes(tmp_path / "a") == 5300
    assert 300 < compressed_bytes(tmp_path / "a") < 1000
    assert size_bytes(tmp_path / "a" / "two") == 300


def test_conform_converts_within_a_kind_only() -> None:
    taken = conform([torch.tensor([3], dtype=torch.int64)], (TensorSpec((1,), torch.int32),), "net")
    assert taken[0].dtype == torch.int32
    with pytest.raises(RunnerError, match=r"net was given \[1\] float32 per sample but takes \[1\] int32"):
        conform([torch.zeros(1)], (TensorSpec((1,), torch.int32),), "net")


def test_explain_puts_the_innermost_message_first() -> None:
    try:
        try:
            raise KeyError("Lowering not found: aten.svd.default")
        except KeyError as error:
            raise RuntimeError("pass 7 failed\nwith much text") from error
    except RuntimeError as error:
        told = str(explain("tflite", error, "LiteRT", "Do this."))
    assert told.startswith("tflite: 'Lowering not found: aten.svd.default'.")
    assert "The converter said: pass 7 failed. Do this." in told


def test_explain_leaves_out_what_developers_of_a_converter_may_do() -> None:
    error = RuntimeError(
        "Failed to convert. \x1b[96mThis is step 3/3\x1b[0m of exporting the model to ONNX. Next steps:"
    )
    error.__cause__ = ValueError("No ONNX function found for aten.linalg_eig.default")
    told = str(explain("onnx", error, "ONNX"))
    assert told.startswith("onnx: No ONNX function found for aten.linalg_eig.default. Replace that operation by one")


def test_a_converters_own_fault_is_no_operation_to_replace() -> None:
    for said in ("Unsupported fx node lgamma, kind lgamma", "node fft_rfft (fft_rfft) got 1 input(s), expected [4]"):
        assert "Replace that operation" in str(explain("coreml", ValueError(said), "coremltools"))
    told = str(explain("onnx", AttributeError("'NoneType' object has no attribute 'shape'"), "ONNX"))
    assert "No operation is named" in told
    assert "Replace" not in told


def test_weights_that_are_no_numbers_are_refused_but_masks_are_not(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    assert deployable(model, torch.randn(1, 3)).precision == "fp32"
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match="parameter 'weight' holds values that are not finite"):
        export(model, "tflite", tmp_path / "net.tflite", inputs=torch.randn(1, 3))
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "executorch")) for name in TARGETS]
)
def test_outputs_that_are_none_are_left_out(name: str, tmp_path: Path) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            return {"loss": None, "hidden": (None, torch.relu(x)), "scores": self.layer(x)}

    model, inputs = Scores(), torch.randn(4, 3)
    artifact = export(model, name, tmp_path / f"net{target(name).suffix}", inputs=inputs)
    expected = model.eval()(inputs)
    hidden, scores = artifact(inputs)
    torch.testing.assert_close(hidden, expected["hidden"][1])
    torch.testing.assert_close(scores, expected["scores"].detach())


def test_numpy_inputs_are_told_what_to_do(exported: Path) -> None:
    with pytest.raises(RunnerError, match=r"was given a numpy array; give tensors"):
        load(exported)(batches(SMALL)[0].tensors[0].numpy())


def test_arguments_that_are_no_tensors_are_built_in(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, times: int, y: Tensor, *, flip: bool, add: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * times + (y if flip else -y) + add
            return out

    call = Inputs((torch.randn(1, 3), 3, torch.randn(1, 2)), {"flip": True, "add": torch.randn(1, 2)})
    artifact = export(Scaled(), "tflite", tmp_path / "net.tflite", inputs=call)
    assert len(artifact(*call.args, **call.kwargs)) == 1
    assert len(artifact.runner.inputs) == 3
