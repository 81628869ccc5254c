"""ExecuTorch files: what is written, what is read back of them, and what the runtime computes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from deployables import batches, exported, module, network, weight_count
from torch import Tensor, nn

from lightning_edge.errors import ExportError, RunnerError
from lightning_edge.exporters import Artifact, deployable, export, load
from lightning_edge.exporters.verify.agreement import agreement_of, reference_outputs
from lightning_edge.network import Precision
from lightning_edge.quantization import quantize

pytest.importorskip("executorch")

WHOLE = ("residual", "two_inputs", "difference", "digits", "pooled")
# Joined inputs, a pool that leaves out a row and others in int8 hold nothing that is not tested elsewhere.
QUICK = {("residual", "int8"), ("residual", "fp32"), ("difference", "fp32"), ("digits", "fp32")}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executorch")


@cache
def written(folder: Path, name: str, precision: Precision) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    path = folder / f"{name}-{precision}.pte"
    return exported(network(name, precision), "executorch", path, batches=batches(name))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=() if (name, precision) in QUICK else slow)
        for name in WHOLE
        for precision in ("fp32", "int8")
    ],
)
def test_the_whole_network_is_delegated(folder: Path, name: str, precision: Precision) -> None:
    artifact, warned = written(folder, name, precision)
    contents = artifact.contents
    assert warned == []
    assert contents.undelegated_ops == ()
    assert contents.delegated_ops == sum(contents.ops.values()) > 0
    assert contents.precision == artifact.precision == precision
    assert (contents.float_compute_ops == ()) == (precision == "int8")
    if precision == "int8":
        assert contents.float_ops == ()


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(name, marks=slow) for name in ("two_inputs", "difference", "pooled"))]
)
def test_weight_bytes_are_those_of_the_network(folder: Path, name: str) -> None:
    int8, fp32 = written(folder, name, "int8")[0].contents, written(folder, name, "fp32")[0].contents
    assert (int8.int8_weight_bytes, int8.float_weight_bytes) == (weight_count(name), 0)
    assert (fp32.int8_weight_bytes, fp32.float_weight_bytes) == (0, 4 * weight_count(name))


@pytest.mark.parametrize(
    ("name", "precision"),
    [("residual", "int8"), *(pytest.param(name, "int8", marks=slow) for name in ("pooled", "attention"))],
)
def test_outputs_lie_within_steps_of_the_network(folder: Path, name: str, precision: Precision) -> None:
    artifact, _ = written(folder, name, precision)
    agreement = agreement_of(network(name, precision), artifact, batches(name))
    assert agreement.samples == 16
    assert agreement.max_steps is not None
    assert agreement.max_steps <= 2


@pytest.mark.parametrize("name", ["residual", "difference", "tokens", pytest.param("attention", marks=slow)])
def test_float_outputs_are_those_of_the_network(folder: Path, name: str) -> None:
    artifact, _ = written(folder, name, "fp32")
    inputs = batches(name)[0]
    for output, wanted in zip(
        artifact(*inputs.args, **inputs.kwargs), reference_outputs(network(name, "fp32"), inputs), strict=True
    ):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


def test_planned_memory_is_told(folder: Path) -> None:
    planned = written(folder, "residual", "int8")[0].contents.planned_memory_bytes
    assert planned is not None
    assert planned >= (3 * 8 * 8 + 5) * 4  # at least its float input and output


def test_what_stays_outside_the_delegate_is_warned_of(tmp_path: Path) -> None:
    # 7x7: too large a window to be a convolution. Its padding counts: ExecuTorch 1.5 delegates the pool without one.
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(7, stride=1, padding=3), nn.Conv2d(4, 2, 1)).eval()
    images = [torch.randn(4, 3, 8, 8)]
    artifact, warned = exported(quantize(layers, images), "executorch", tmp_path / "net.pte", batches=images)
    assert artifact.contents.undelegated_ops == ("aten::avg_pool2d",)
    assert artifact.contents.float_ops == ("aten::avg_pool2d",)
    assert len(warned) == 2
    assert all("aten::avg_pool2d" in warning for warning in warned)


def test_integers_and_truth_values_are_taken(folder: Path) -> None:
    artifact, _ = written(folder, "tokens", "fp32")
    assert [spec.dtype for spec in artifact.runner.inputs] == [torch.int64, torch.bool]
    ids, mask = batches("tokens")[0].args
    assert torch.equal(artifact(ids.int(), mask)[0], artifact(ids, mask)[0])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=slow)])
def test_channels_last_memory_is_not_mistaken_for_another_image(tmp_path: Path, precision: Precision) -> None:
    images = batches("residual")[0].args[0].to(memory_format=torch.channels_last)
    model = copy.deepcopy(module("residual")).to(memory_format=torch.channels_last)
    made = deployable(quantize(model, [images])) if precision == "int8" else deployable(model, images)
    artifact = export(made, "executorch", tmp_path / "net.pte", batches=[images, images.contiguous()])
    assert torch.equal(artifact(images)[0], artifact(images.contiguous())[0])


def test_threads_are_those_asked_for_whoever_ran_before(folder: Path) -> None:
    path = written(folder, "residual", "int8")[0].path
    one, two = load(path), load(path, threads=2)
    images = batches("residual")[0].args[0]
    first = one(images)[0]
    assert one.runner.runtime.endswith("XNNPACK, 1 thread")
    assert two.runner.runtime.endswith("XNNPACK, 2 threads")
    from executorch.extension.pybindings import portable_lib

    for artifact, threads in ((two, 2), (one, 1), (two, 2)):
        assert torch.equal(artifact(images)[0], first)
        assert portable_lib._threadpool_get_thread_count() == threads


def test_a_cut_or_foreign_file_is_refused(folder: Path, tmp_path: Path) -> None:
    data = written(folder, "residual", "int8")[0].path.read_bytes()
    path = tmp_path / "cut.pte"
    for cut in (0, 20, len(data) // 2, len(data) - 8):
        path.write_bytes(data[:cut])
        with pytest.raises(RunnerError, match=r"cut\.pte is no \.pte file: .*Export it again"):
            load(path)
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(RunnerError, match="it does not begin as one"):
        load(path)


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(x)
        return values


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


def test_an_operation_it_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^executorch: .*_linalg_svd.* not in Core ATen.*Replace that operation"):
        export(Unsupported(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3, 4))
    with pytest.raises(ExportError, match=r"^executorch: .*data-dependent.*write it without if and \.item"):
        export(Branches(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_xnnpack_takes_nothing_of_is_an_error(tmp_path: Path) -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(dim=1).values

    with pytest.raises(ExportError, match=r"none of the file's operations .*aten::sort"):
        export(Sorted(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_layers_named_by_numbers_are_taken(folder: Path) -> None:
    # ExecuTorch cannot fold the BatchNorm of a parameter named "0.weight", as those of a bare nn.Sequential are.
    assert any(name.startswith("0.") for name, _ in module("digits").named_parameters())
    assert written(folder, "digits", "fp32")[0].contents.ops["Conv2d"] > 0
