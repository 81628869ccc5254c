"""Where a file's operations run, and how many multiply-accumulates that is: told by files, runtimes and plans."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deployables import network
from torch import Tensor, nn

from lightning_edge import macs
from lightning_edge.contents import Placement, Placements
from lightning_edge.errors import ExportError
from lightning_edge.exporters import ExportWarning, contents_of, deployable, export, stage
from lightning_edge.exporters.coreml import placement as coreml_placement
from lightning_edge.exporters.verify import contents as checks

pytest.importorskip("litert_torch")
pytest.importorskip("executorch")
pytest.importorskip("coremltools")


class Mixed(nn.Module):
    """A product of each kind, one of them of two activations, so that no file can leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.up(torch.relu(self.depthwise(torch.relu(self.conv(images)))))
        rows = maps.flatten(1, 2)
        logits: Tensor = self.head(torch.matmul(rows, rows.transpose(1, 2)))
        return logits


# By hand: 4x4 maps; convolution 9 * 2 each, depthwise 9, transposed 4 each way of 4 channels to 2, a product over 8.
MIXED = 16 * 4 * 18 + 16 * 4 * 9 + 16 * 4 * 2 * 4 + 16 * 16 * 8 + 16 * 3 * 16


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same float network in three formats."""
    folder = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(0)
    finished = deployable(Mixed().eval(), torch.randn(1, 2, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        for name, suffix in (("tflite", ".tflite"), ("executorch", ".pte"), ("coreml", ".mlpackage")):
            with stage(finished, name, folder / f"mixed{suffix}") as staged:
                staged.accept()
    return folder


@pytest.mark.parametrize("suffix", [".tflite", ".pte", ".mlpackage"])
def test_every_format_counts_the_same_products(mixed: Path, suffix: str) -> None:
    placements = contents_of(mixed / f"mixed{suffix}").placements
    assert placements is not None
    assert placements.macs == MIXED


def test_products_are_counted_from_shapes() -> None:
    assert macs.convolution((1, 4, 5, 8), (8, 3, 3, 2), 8) == 4 * 5 * 8 * 18
    assert macs.transposed_convolution((1, 4, 5, 2), (8, 3, 3, 2), 2) == 4 * 5 * 2 * 9 * 8
    assert macs.product((2, 7, 3), 5) == 2 * 7 * 3 * 5
    assert macs.attention((2, 4, 8), (2, 6, 8), (2, 6, 10)) == 2 * 4 * 6 * (8 + 10)


def test_shares_are_of_products_and_not_of_operations() -> None:
    ops: list[Any] = [("CONV", "delegate", 90), ("CONV", "cpu", 7), ("MATMUL", "cpu", 3), ("POOL", "cpu", 0)]
    placements = Placements.of("the file", [*ops, ("CONV", "cpu", 0)])
    assert placements.fallback == (Placement("CONV", "cpu", 2, 7), Placement("MATMUL", "cpu", 1, 3))
    assert placements.fallback_share == 0.1
    assert Placements.of("the file", [("POOL", "cpu", 0)]).fallback_share == 0.0
    assert Placements.of("op support", [*ops, ("CONV", "any unit", 1)]).fallback_share is None


def test_litert_tells_what_its_delegate_took(tmp_path: Path) -> None:
    # One kernel that XNNPACK has in float only beside one that it takes: the pool of 16 by 4 of an int8 file.
    with stage(network("pooled", "int8"), "tflite", tmp_path / "net.tflite") as staged:
        placements = staged.artifact.contents.placements
    assert placements is not None
    assert placements.told_by == "the runtime"
    places = {entry.op: entry.place for entry in placements.ops}
    assert places["CONV_2D"] == places["FULLY_CONNECTED"] == "delegate"
    assert placements.fallback_share == 0.0


def test_a_file_that_litert_cannot_prepare_is_told_by_op_support(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_edge.exporters import tflite
    from lightning_edge.exporters.tflite import placement as tflite_placement

    monkeypatch.setattr(tflite_placement, "_ASK", "raise SystemExit(3)")
    assert tflite.TARGET.placements(mixed / "mixed.tflite") is None
    told = tflite.TARGET.inspect(mixed / "mixed.tflite").placements
    assert told is not None
    assert told.told_by == "op support"
    assert told.fallback_share == 0.0


def test_export_fails_where_more_falls_back_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_edge.exporters import tflite

    told = Placements.of("the runtime", [("CONV_2D", "delegate", 75), ("FULLY_CONNECTED", "cpu", 25)])
    monkeypatch.setattr(tflite.TFLite, "placements", lambda self, path: told)
    path = tmp_path / "net.tflite"
    message = (
        r"tflite: 25.0% of the multiply-accumulates run outside the delegate, as the runtime says, and "
        r"max_fallback=0.1 allows 10.0%: 1 x FULLY_CONNECTED \(25 MACs\)"
    )
    with pytest.raises(ExportError, match=message):
        export(network("difference", "fp32"), "tflite", path, max_fallback=0.1)
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.warns(ExportWarning, match="25.0% of the multiply-accumulates"),
        stage(network("difference", "fp32"), "tflite", path, max_fallback=0.25),
    ):
        pass


def test_a_share_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_fallback=1.5 is not allowed; give a share from 0 to 1"):
        stage(network("difference", "int8"), "tflite", tmp_path / "net.tflite", max_fallback=1.5)


def test_a_limit_on_a_delegate_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.tflite"
    with pytest.raises(ValueError, match=r"max_fallback=0.1 limits what a delegate leaves .* kernels='reference' has"):
        export(network("difference", "int8"), "tflite", path, kernels="reference", max_fallback=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_cannot_be_checked_is_told() -> None:
    unknown = Placements.of("op support", [("conv", "any unit", 1)])
    for placements in (None, unknown):
        with pytest.warns(ExportWarning, match=r"max_fallback=0.1 cannot be checked here"):
            checks.check_fallback(placements, 0.1, "coreml")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checks.check_fallback(placements, None, "coreml")


def test_core_ml_away_from_macos_tells_by_types(mixed: Path) -> None:
    placements = contents_of(mixed / "mixed.mlpackage").placements
    assert placements is not None
    assert placements.told_by == "op support"
    assert {entry.place for entry in placements.ops if entry.macs} == {"cpu or gpu"}  # float32
    assert placements.fallback_share is None
    if sys.platform != "darwin":
        assert coreml_placement.by_plan(mixed / "mixed.mlpackage", mixed) is None  # type: ignore[arg-type]


def test_core_mls_plan_is_asked_on_macos(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_edge.exporters import coreml
    from lightning_edge.exporters.coreml.package import read

    program = read(mixed / "mixed.mlpackage")
    units = {"conv": "MLNeuralEngineComputeDevice", "linear": "MLGPUComputeDevice", "matmul": "MLCPUComputeDevice"}

    def usage(operation: Any) -> Any:
        device = type(units[operation.kind], (), {})() if operation.kind in units else None
        return device and SimpleNamespace(preferred_compute_device=device)

    block = SimpleNamespace(block=SimpleNamespace(operations=program.operations))
    plan = SimpleNamespace(
        model_structure=SimpleNamespace(program=SimpleNamespace(functions={"main": block})),
        get_compute_device_usage_for_mlprogram_operation=usage,
    )
    modules = {
        "coremltools.models.compute_plan": SimpleNamespace(
            MLComputePlan=SimpleNamespace(load_from_path=lambda path: plan if path == "compiled" else None)
        ),
        "coremltools.models.utils": SimpleNamespace(compile_model=lambda path: "compiled"),
    }
    monkeypatch.setattr(coreml_placement, "_is_macos", lambda: True)
    monkeypatch.setattr(coreml_placement, "require", lambda module, extra: modules[module])
    placements = coreml.TARGET.placements(mixed / "mixed.mlpackage")
    assert placements is not None
    assert placements.told_by == "compute plan"
    places = {entry.op: entry.place for entry in placements.ops if entry.macs}
    assert places == {"conv": "neural engine", "linear": "gpu", "matmul": "cpu", "conv_transpose": "any unit"}
