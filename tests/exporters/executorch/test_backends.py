"""ExecuTorch's other backends: what is lowered, what is read of the file, what is said of one that cannot run here."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from deployables import batches, exported, module, network, weight_count
from torch import Tensor, nn

from lightning_edge.cli import verify as verify_command
from lightning_edge.contents import Contents
from lightning_edge.errors import ExportError, RunnerError
from lightning_edge.exporters import Artifact, ExportWarning, executorch, export, load, stage
from lightning_edge.exporters.executorch.backends import Backend, lowering
from lightning_edge.exporters.executorch.read import coreml as pte_coreml
from lightning_edge.exporters.executorch.read import vulkan as pte_vulkan
from lightning_edge.exporters.executorch.read.tally import Tally
from lightning_edge.network import Precision
from lightning_edge.reporting import verification
from lightning_edge.reporting.report import Report
from lightning_edge.reporting.rows import of_artifact, write_manifest

pytest.importorskip("executorch")
pytest.importorskip("coremltools")

# Not on this machine: the tests below are of what is said then.
ELSEWHERE = pytest.mark.skipif(sys.platform == "darwin", reason="ExecuTorch's runtime has Core ML there")
MACS = 24104  # of "residual", by hand: 64 * 8 * 27 + 16 * 8 * 72 + 16 * 8 * 8 + 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


@cache
def written(folder: Path, backend: Backend, precision: Precision) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    path = folder / f"{backend}-{precision}.pte"
    return exported(network("residual", precision), "executorch", path, backend=backend)


def test_portable_kernels_run_here_and_compute_the_network(folder: Path) -> None:
    artifact, warned = written(folder, "portable", "fp32")
    assert warned == []
    assert artifact.not_run is None
    assert artifact.agreement is not None
    assert artifact.runner.runtime.endswith("portable kernels, 1 thread")
    assert artifact.contents.delegates == ()
    assert artifact.contents.float_weight_bytes == 4 * weight_count("residual")
    placements = artifact.contents.placements
    assert placements is not None
    assert (placements.macs, placements.fallback_share) == (MACS, 1.0)
    images = batches("residual")[0].args[0]
    torch.testing.assert_close(artifact(images)[0], module("residual")(images), rtol=1e-5, atol=1e-6)


def test_portable_kernels_have_no_int8(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"backend='portable' takes float networks only.*backend='xnnpack'"):
        export(network("residual", "int8"), "executorch", tmp_path / "net.pte", backend="portable")
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_what_falls_back_holds_for_portable_kernels_too(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"100\.0% of the multiply-accumulates run outside the delegate"):
        stage(network("residual", "fp32"), "executorch", tmp_path / "net.pte", backend="portable", max_fallback=0.5)


@ELSEWHERE
@pytest.mark.parametrize(
    ("backend", "precision", "delegate"),
    [
        ("coreml", "int8", "CoreMLBackend"),
        pytest.param("coreml", "fp32", "CoreMLBackend", marks=pytest.mark.slow),
        pytest.param("vulkan", "int8", "VulkanBackend", marks=pytest.mark.slow),
    ],
)
def test_what_is_for_another_machine_is_whole_looked_into_and_not_run(
    folder: Path, backend: Backend, precision: Precision, delegate: str
) -> None:
    artifact, warned = written(folder, backend, precision)
    assert artifact.path.is_file()
    assert artifact.not_run is not None
    assert f"no {delegate} on this machine" in artifact.not_run
    assert artifact.agreement is None
    assert artifact.load_ms is None
    assert sum("it was NOT run: ExecuTorch" in warning for warning in warned) == 1
    assert not any("outside the delegate" in warning for warning in warned)
    with pytest.raises(RunnerError, match=rf"{artifact.path.name} cannot run here: .*{delegate}"):
        artifact(batches("residual")[0].args[0])
    assert artifact.contents.delegates == (delegate,)
    assert artifact.precision == precision
    placements = artifact.contents.placements
    assert placements is not None
    assert (placements.told_by, placements.macs, placements.fallback_share) == ("the file", MACS, 0.0)
    count = weight_count("residual")
    if precision == "int8":
        padded = 8 if backend == "vulkan" else 0  # the first layer's rows of 27 to 28 for the GPU
        assert (artifact.contents.int8_weight_bytes, artifact.contents.float_weight_bytes) == (count + padded, 0)
        assert artifact.contents.float_compute_ops == ()
    else:
        assert artifact.contents.float_weight_bytes == 4 * count
    assert load(artifact.path).not_run == artifact.not_run


@pytest.mark.slow
@ELSEWHERE
def test_equal_networks_give_equal_files_without_maps_for_debuggers(folder: Path, tmp_path: Path) -> None:
    artifact, _ = written(folder, "coreml", "int8")
    with pytest.warns(ExportWarning, match="NOT run"):
        again = export(network("residual", "int8"), "executorch", tmp_path / "net.pte", backend="coreml")
    assert again.path.read_bytes() == artifact.path.read_bytes()
    assert artifact.size_bytes < 20_000  # 64 kB with them


@ELSEWHERE
def test_a_file_that_was_not_run_is_no_passed_proof(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, _ = written(folder, "coreml", "int8")
    place = tmp_path / artifact.path.name
    place.write_bytes(artifact.path.read_bytes())
    row = of_artifact(replace(artifact, path=place))
    assert row.not_run == artifact.not_run
    report = Report("Residual", "validate", [row])
    write_manifest(report, tmp_path, None)
    assert verification.verify(tmp_path) == []
    assert verify_command.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not run" in printed
    assert f"{place.name} was not run: {artifact.not_run}" in printed
    text = report.to_markdown()
    assert "## Not run here" in text
    assert f"executorch int8 (quantized in training): {artifact.not_run}" in text
    place.write_bytes(place.read_bytes()[:-200])
    assert {finding.check for finding in verification.verify(tmp_path)} >= {"digest", "bytes"}


def test_the_lowering_leaves_logging_as_it_was() -> None:
    root = logging.getLogger()
    before = (root.level, root.manager.disable)
    with lowering("vulkan"):
        assert root.manager.disable == logging.WARNING
    assert (root.level, root.manager.disable) == before


class Uneven(nn.Module):
    """A layer of six inputs, which Vulkan's int8 kernels do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.relu(self.layer(rows))


@pytest.mark.slow
def test_what_a_backend_takes_in_float_only_is_refused(tmp_path: Path) -> None:
    from lightning_edge.quantization import quantize

    torch.manual_seed(0)
    rows = torch.randn(8, 6)
    with pytest.raises(ExportError, match=r"the network is int8 but the file computes in float: aten\.linear"):
        export(quantize(Uneven().eval(), [rows]), "executorch", tmp_path / "net.pte", backend="vulkan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["portable", "coreml", "vulkan"])
def test_schemes_are_of_xnnpack_only(backend: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": backend, "scheme": "fp16"}
    with pytest.raises(ValueError, match=rf"scheme='fp16' with backend='{backend}': .* backend='xnnpack' only"):
        export(module("residual"), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3, 8, 8), **options)


def test_an_unknown_backend_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend='metal' is not one of .*'xnnpack', 'portable', 'coreml', 'vulkan'"):
        export(network("residual", "fp32"), "executorch", tmp_path / "net.pte", backend="metal")


def test_a_build_without_the_archiver_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.backends.apple.coreml.executorchcoreml", None)
    with pytest.raises(ExportError, match=r"library that this build of ExecuTorch lacks .*leave backend out"):
        export(network("residual", "fp32"), "executorch", tmp_path / "net.pte", backend="coreml")


def test_payloads_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="does not start as one does"):
        pte_vulkan.count(b"something else altogether", Tally())
    with pytest.raises(ValueError, match="what it hands to Core ML cannot be unpacked"):
        pte_coreml.count(b"something else altogether", "0", Tally())


def test_a_runtime_that_has_the_backend_runs_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = Contents(0, 4, {}, delegates=("XnnpackBackend", "VulkanBackend"))

    class Library:
        names = ("XnnpackBackend",)

        @classmethod
        def _get_registered_backend_names(cls) -> tuple[str, ...]:
            return cls.names

    monkeypatch.setattr(executorch, "library", lambda: Library)
    assert "no VulkanBackend on this machine" in str(executorch.TARGET.not_run_here(contents))
    assert executorch.TARGET.not_run_here(replace(contents, delegates=("XnnpackBackend",))) is None
    Library.names = ("XnnpackBackend", "VulkanBackend")
    assert executorch.TARGET.not_run_here(contents) is None
