"""What microcontrollers are given: C++ source equal to the file, operations to register, memory, Vela's estimate."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from deployables import batches, network
from rich.console import Console

from lightning_edge import commands
from lightning_edge.cli import main
from lightning_edge.errors import ExportError, MissingExtraError, RunnerError
from lightning_edge.exporters import c_array, export, micro_memory, micro_ops, tflite_contents, tflite_graph, vela
from lightning_edge.exporters.arena import aligned
from lightning_edge.exporters.microcontroller import Microcontroller, export_microcontroller

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_vela = pytest.mark.skipif(find_spec("ethosu") is None, reason="needs ethos-u-vela")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 residual network, under a name that is no identifier."""
    path = tmp_path_factory.mktemp("int8") / "8-bit net.v2.tflite"
    export(network("residual", "int8"), "tflite", path, batches=batches("residual"))
    return path


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "net.tflite"
    export(network("residual", "fp32"), "tflite", path, batches=batches("residual"))
    return path


@pytest.fixture(scope="module")
def written(int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Microcontroller:
    return export_microcontroller(int8, tmp_path_factory.mktemp("written"))


def changed(int8: Path, folder: Path, change: Any) -> Path:
    """The file with its object tree changed."""
    model = tflite_graph.parse(int8.read_bytes())
    change(model)
    path = folder / "changed.tflite"
    path.write_bytes(tflite_graph.pack(model))
    return path


def compile_source(source: str, *options: str, cwd: Path) -> None:
    (cwd / "main.cc").write_text(source)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *options, "main.cc"]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_array_is_the_file(int8: Path, written: Microcontroller) -> None:
    text = written.source.read_text()
    assert bytes(int(value, 16) for value in re.findall(r"0x([0-9a-f]{2}),", text)) == int8.read_bytes()
    assert written.file_bytes == len(int8.read_bytes()) > written.constant_bytes > 0
    assert "alignas(16)" in text
    assert (written.header.name, written.source.name) == ("model_8_bit_net_v2_model.h", "model_8_bit_net_v2_model.cc")
    assert sorted(path.name for path in written.source.parent.iterdir()) == [written.source.name, written.header.name]


@needs_compiler
def test_the_source_compiles_without_tflm_and_holds_the_bytes(
    int8: Path, written: Microcontroller, tmp_path: Path
) -> None:
    name = written.header.stem
    compile_source(
        f'#include <cstdio>\n#include "{written.source}"\n#include "{written.header}"\n'
        f"static_assert({name.upper()}_OP_COUNT == {len(written.operators)});\n"
        f"int main() {{ return fwrite({name}::data, 1, {name}::data_bytes, stdout) == {name}::data_bytes ? 0 : 1; }}\n",
        "-o",
        "told",
        cwd=tmp_path,
    )
    assert subprocess.run([tmp_path / "told"], capture_output=True, check=True).stdout == int8.read_bytes()


@needs_compiler
def test_the_registration_compiles_where_the_resolver_is(written: Microcontroller, tmp_path: Path) -> None:
    """Against a resolver with the methods we name and their signatures, in the place of TFLM's."""
    place = tmp_path / "tensorflow/lite/micro/micro_mutable_op_resolver.h"
    place.parent.mkdir(parents=True)
    methods = " ".join(f"TfLiteStatus {name}() {{ ++count; return kTfLiteOk; }}" for name in written.operators)
    place.write_text(
        "#pragma once\nenum TfLiteStatus { kTfLiteOk, kTfLiteError };\nnamespace tflite {\n"
        f"template <unsigned int n> struct MicroMutableOpResolver {{ unsigned int count = 0; {methods} }};\n}}\n"
    )
    name = written.header.stem
    compile_source(
        f'#include "{written.header}"\nint main() {{ {written.resolver} {name}::register_operators(resolver);'
        f" return resolver.count == 2 * {len(written.operators)} ? 0 : 1; }}\n",
        "-I.",
        "-o",
        "told",
        cwd=tmp_path,
    )
    subprocess.run([tmp_path / "told"], check=True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet8-int8", "resnet8_int8_model"),
        ("8bit", "model_8bit_model"),
        ("class", "class_model"),
        ("__a  b__", "a_b_model"),
        ("größe", "gr_e_model"),
        ("模型", "model"),
        ("a model", "a_model"),
        ("", "model"),
    ],
)
def test_any_name_becomes_an_identifier(name: str, wanted: str) -> None:
    assert c_array.identifier(name) == wanted


def test_operations_are_those_of_the_file(int8: Path, written: Microcontroller) -> None:
    ops = set(tflite_contents.contents(int8).ops)
    assert {"CONV_2D", "ADD"} <= ops
    assert {"AddConv2D", "AddAdd"} <= set(written.operators)
    assert len(written.operators) == len(ops)
    assert written.resolver.startswith(f"tflite::MicroMutableOpResolver<{len(ops)}> resolver;\n")


def test_every_operation_of_the_table_is_one_of_the_schema() -> None:
    assert set(micro_ops._METHODS) <= set(vars(tflite_graph.schema_module().BuiltinOperator))
    assert len(set(micro_ops._METHODS.values())) == len(micro_ops._METHODS)


def test_an_operation_without_a_kernel_is_named(int8: Path, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        number = tflite_graph.schema_module().BuiltinOperator.RFFT2D
        model.operatorCodes[0].builtinCode = number
        model.operatorCodes[0].deprecatedBuiltinCode = min(number, 127)

    with pytest.raises(ExportError, match=r"changed.tflite has operations without a kernel .* RFFT2D\."):
        export_microcontroller(changed(int8, tmp_path, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_are_those_of_the_graph(int8: Path, written: Microcontroller) -> None:
    """Between the largest operation, its inputs and outputs together, and all activations side by side."""
    model = tflite_graph.parse(int8.read_bytes())
    graph = model.subgraphs[0]
    sizes = {
        index: int(numpy.prod(tensor.shape))
        for index, tensor in enumerate(graph.tensors)
        if model.buffers[tensor.buffer].data is None or not len(model.buffers[tensor.buffer].data)
    }
    largest = max(
        sum(sizes.get(int(index), 0) for index in {*map(int, op.inputs), *map(int, op.outputs)})
        for op in graph.operators
    )
    memory = written.memory
    assert largest <= memory.lower_bound_bytes <= memory.activation_bytes < 2 * sum(sizes.values())
    assert memory.activation_bytes + memory.persistent_bytes < memory.arena_bytes
    assert memory.uncounted_scratch_ops == ()


def test_a_mean_needs_scratch_memory(int8: Path, written: Microcontroller) -> None:
    """Four bytes for each of its outputs, which TFLM's reference kernel adds in."""
    model = tflite_graph.parse(int8.read_bytes())
    graph = model.subgraphs[0]
    (mean,) = (op for op in graph.operators if tflite_graph.op_name(model, op) == "MEAN")
    assert written.memory.scratch_bytes == aligned(4 * int(numpy.prod(graph.tensors[mean.outputs[0]].shape)))


def test_a_size_that_is_not_fixed_is_refused(int8: Path, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        graph = model.subgraphs[0]
        graph.tensors[graph.inputs[0]].shape = numpy.array([-1, 3, 8, 8], dtype=numpy.int32)

    with pytest.raises(ExportError, match=r"shape \[-1, 3, 8, 8\]; export it with fixed sizes"):
        export_microcontroller(changed(int8, tmp_path, change), tmp_path)


def test_several_graphs_are_refused() -> None:
    with pytest.raises(ExportError, match="net holds 2 graphs"):
        micro_memory.memory(SimpleNamespace(subgraphs=[None, None]), "net")


def test_a_float_file_is_refused(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"net.tflite computes in float: .*CONV_2D.*quantize the network"):
        export_microcontroller(fp32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_file_is_refused(int8: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"gone.tflite cannot be read: No such file"):
        export_microcontroller(tmp_path / "gone.tflite", tmp_path)
    with pytest.raises(ValueError, match=r"suffix '.pte'"):
        export_microcontroller(tmp_path / "net.pte", tmp_path)
    short = tmp_path / "short.tflite"
    short.write_bytes(int8.read_bytes()[:100])
    with pytest.raises(RunnerError, match=r"short\.tflite is no \.tflite file"):
        export_microcontroller(short, tmp_path)


def test_both_files_or_none(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up between the header and the source: an old header comes back, a new one goes."""
    header, replace = tmp_path / "model_8_bit_net_v2_model.h", os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith(".cc"):
            raise OSError(errno.ENOSPC, "no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match="the disk is full"):
        export_microcontroller(int8, tmp_path)
    assert list(tmp_path.iterdir()) == []
    header.write_text("old")
    with pytest.raises(ExportError, match="the disk is full"):
        export_microcontroller(int8, tmp_path)
    assert [header] == list(tmp_path.iterdir())
    assert header.read_text() == "old"


def test_a_folder_in_the_way_stays(int8: Path, tmp_path: Path) -> None:
    (tmp_path / "model_8_bit_net_v2_model.cc").mkdir()
    with pytest.raises(ExportError, match="a folder is there"):
        export_microcontroller(int8, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_command_tells_what_is_needed(int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["microcontroller", str(int8), "--output", str(tmp_path)])
    told = capsys.readouterr().out
    assert "tensor arena (estimate)" in told
    assert "resolver.AddConv2D();" in told
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_fails_with_one_line(fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["microcontroller", str(fp32), "--output", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: net.tflite computes in float")
    with pytest.raises(SystemExit) as ended:
        main(["microcontroller"])
    assert ended.value.code == 2


def test_an_accelerator_that_is_none_is_refused(int8: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ethosu='ethos-u55-129' is not one of ethos-u55-32"):
        export_microcontroller(int8, tmp_path, ethosu="ethos-u55-129")
    with pytest.raises(ValueError, match="max_cpu_ops=0 says what Vela may leave"):
        export_microcontroller(int8, tmp_path, max_cpu_ops=0)


def test_vela_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edge.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lightning-edge\[ethosu\]"):
        vela.check("ethos-u55-128")


@needs_vela
def test_vela_compiles_and_estimates(int8: Path, tmp_path: Path) -> None:
    written = export_microcontroller(int8, tmp_path, ethosu="ethos-u55-128", max_cpu_ops=1)
    estimate = written.estimate
    assert estimate is not None
    assert written.compiled is not None
    assert 0 < estimate.inference_time_ms < 1000
    assert (estimate.config, estimate.cpu_ops) == ("ethos-u55-128", {"MEAN": 1})
    assert min(estimate.cycles, estimate.sram_bytes, estimate.flash_bytes, estimate.npu_ops) > 0
    console = Console(width=200, file=io.StringIO())
    console.print(commands.table(written))
    assert "ethos-u55-128: time (estimate)" in console.file.getvalue()
    # What Vela wrote is itself a file for TFLM, with what the CPU keeps and the places that Vela chose.
    compiled = export_microcontroller(written.compiled, tmp_path / "npu")
    assert compiled.operators == ("AddEthosU", "AddMean")
    assert compiled.memory.activation_bytes >= estimate.sram_bytes // 2
    with pytest.raises(ExportError, match="compiled for Ethos-U already"):
        vela.estimate(written.compiled, "ethos-u55-128")


@needs_vela
def test_what_vela_leaves_to_the_cpu_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "float-ends.tflite"
    export(network("residual", "int8"), "tflite", path, batches=batches("residual"), io="float")
    left = vela.estimate(path, "ethos-u55-32").cpu_ops
    assert left["QUANTIZE"] == left["DEQUANTIZE"] == 1
    with pytest.raises(
        ExportError, match=r"left to the CPU: 3 \(1 DEQUANTIZE, 1 MEAN, 1 QUANTIZE\); allowed are max_cpu_ops=1"
    ):
        export_microcontroller(path, tmp_path / "out", ethosu="ethos-u55-32", max_cpu_ops=1)
    assert not (tmp_path / "out").exists()


@needs_vela
def test_vela_that_takes_too_long_is_stopped(int8: Path) -> None:
    with pytest.raises(ExportError, match=r"longer than timeout_s=0.01 seconds"):
        vela.estimate(int8, "ethos-u55-128", timeout_s=0.01)


def test_vela_that_fails_tells_why(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="Warning: this\nError: that\n", stderr="")
    monkeypatch.setattr(vela, "check", lambda config: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ExportError, match=r"does not compile 8-bit net.v2.tflite for ethos-u55-128: Error: that$"):
        vela.estimate(int8, "ethos-u55-128")
    failed.returncode = 0
    with pytest.raises(ExportError, match=r"told nothing of 8-bit net\.v2\.tflite"):
        vela.estimate(int8, "ethos-u55-128")
