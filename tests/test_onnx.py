"""ONNX files: what is written, what is read back of them, and what ONNX Runtime and OpenVINO compute."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from deployables import batches, network, weight_count

from lightning_edge.errors import RunnerError
from lightning_edge.exporters import Artifact, ExportWarning, checks, export, load
from lightning_edge.network import Precision

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@cache
def written(folder: Path, name: str, precision: Precision, **options: str) -> tuple[Artifact, list[str]]:
    """The file, and what the export warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        path = folder / f"{'-'.join((name, precision, *options.values()))}.onnx"
        artifact = export(network(name, precision), "onnx", path, batches=batches(name), **options)
    return artifact, [str(warning.message) for warning in caught if issubclass(warning.category, ExportWarning)]


def kernels(path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file's operations before it runs them."""
    optimized = path.with_suffix(".optimized")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(optimized)).graph.node)


@pytest.mark.parametrize("name", ["residual", "two_inputs", "plain", "pooled"])
def test_an_int8_file_runs_on_int8_kernels_throughout(folder: Path, name: str) -> None:
    artifact, warned = written(folder, name, "int8")
    contents = artifact.contents
    assert warned == []
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (weight_count(name), 0)
    assert (contents.float_compute_ops, contents.float_ops) == ((), ())
    assert artifact.precision == "int8"
    run = kernels(artifact.path)
    assert {"Conv", "Gemm", "MatMul", "Add", "Pad", "Relu", "ReduceMean"}.isdisjoint(run)
    assert run["QLinearConv"] == contents.ops["Conv"]
    steps = checks.agreement_of(network(name, "int8"), artifact, batches(name)).max_steps
    assert steps is not None
    assert steps < 1.5


@pytest.mark.parametrize("name", ["residual", "difference", "tokens", "attention"])
def test_float_outputs_are_those_of_the_network(folder: Path, name: str) -> None:
    artifact, warned = written(folder, name, "fp32")
    assert warned == []
    assert artifact.precision == "fp32"
    inputs = batches(name)[0]
    for output, wanted in zip(
        artifact(*inputs.args, **inputs.kwargs), checks.reference_outputs(network(name, "fp32"), inputs), strict=True
    ):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)


def test_float_weight_bytes_are_those_of_the_network(folder: Path) -> None:
    contents = written(folder, "residual", "fp32")[0].contents
    assert (contents.int8_weight_bytes, contents.float_weight_bytes) == (0, 4 * weight_count("residual"))
    assert contents.float_compute_ops.count("Conv") == 3


def test_inputs_and_outputs_have_the_names_of_the_network(folder: Path) -> None:
    artifact, _ = written(folder, "difference", "int8")
    session = onnxruntime.InferenceSession(str(artifact.path))
    assert [value.name for value in session.get_inputs()] == ["ape", "zebra"]
    assert [value.name for value in session.get_outputs()] == ["whole", "first"]
    given = batches("difference")[0].sample()
    named = session.run(["first"], {name: tensor.numpy() for name, tensor in given.kwargs.items()})
    torch.testing.assert_close(torch.from_numpy(named[0]), artifact(**given.kwargs)[1])


def test_integers_and_truth_values_are_taken(folder: Path) -> None:
    artifact, _ = written(folder, "tokens", "fp32")
    assert [spec.dtype for spec in artifact.runner.inputs] == [torch.int64, torch.bool]
    ids, mask = batches("tokens")[0].args
    assert torch.equal(artifact(ids.int(), mask)[0], artifact(ids, mask)[0])


def test_threads_are_told(folder: Path) -> None:
    path = written(folder, "residual", "int8")[0].path
    one, two = load(path), load(path, threads=2)
    assert one.runner.runtime.endswith("CPU, 1 thread")
    assert two.runner.runtime.endswith("CPU, 2 threads")
    images = batches("residual")[0].args[0]
    assert torch.equal(one(images)[0], two(images)[0])


def test_equal_networks_give_equal_files_without_paths_of_the_machine(folder: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "int8"):
        first = written(folder, "residual", precision)[0].path.read_bytes()
        second = export(network("residual", precision), "onnx", tmp_path / f"{precision}.onnx").path.read_bytes()
        assert first == second
        for part in (b"/", b"\\", b".py", b"conv2d", b"dequantize_per", b"lightning_edge.", b"torch"):
            assert part not in first.replace(b"0/", b"").replace(b"/0", b"") or part in (b"/", b"\\"), part


def test_a_cut_or_foreign_file_is_refused(folder: Path, tmp_path: Path) -> None:
    data = written(folder, "residual", "int8")[0].path.read_bytes()
    path = tmp_path / "cut.onnx"
    for cut in (0, 20, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:cut])
        with pytest.raises(RunnerError, match=r"cut\.onnx is no \.onnx file: it .*Export it again"):
            load(path)
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(RunnerError, match=r"cut\.onnx is no \.onnx file: it is cut short, or no ONNX file"):
        load(path)


def test_four_bits_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"onnx: scheme='int4_weight_only' is not one of .*int8_weight_only"):
        export(network("residual", "fp32"), "onnx", tmp_path / "net.onnx", scheme="int4_weight_only")
    assert list(tmp_path.iterdir()) == []
