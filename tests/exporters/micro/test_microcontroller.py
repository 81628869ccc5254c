"""C++ sources for TensorFlow Lite Micro: whole, compiled, with its operators, refused where they would not run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployables import batches, network

from lightning_edge import files as staging
from lightning_edge.cli import main as cli
from lightning_edge.cli import microcontroller as firmware
from lightning_edge.errors import ExportError
from lightning_edge.exporters import export
from lightning_edge.exporters.micro import arena, interpreter, scratch
from lightning_edge.exporters.micro.operators import METHODS
from lightning_edge.exporters.micro.sources import footprint, identifier, write
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.exporters.tflite.read import contents
from lightning_edge.interface import Interface

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_torch")

# What runs in place of the real resolver: it keeps what is registered, and refuses more than its places.
RESOLVER = """
#pragma once
#include <string>
#include <vector>
enum TfLiteStatus { kTfLiteOk = 0, kTfLiteError = 1 };
namespace tflite {
template <unsigned int places> struct MicroMutableOpResolver {
  std::vector<std::string> registered;
  TfLiteStatus add(const char* name) {
    if (registered.size() >= places) return kTfLiteError;
    registered.push_back(name);
    return kTfLiteOk;
  }
%s
};
}
"""
MAIN = """
#define LIGHTNING_EDGE_REGISTER_OPERATORS
#include "{name}.h"
#include <cstdint>
#include <cstdio>
int main() {{
  {name}_resolver resolver;
  if ({name}_register_operators(resolver) != kTfLiteOk) return 3;
  if (reinterpret_cast<std::uintptr_t>({name}_data) % 16) return 4;
  for (const auto& name : resolver.registered) std::fprintf(stderr, "%s ", name.c_str());
  std::fprintf(stderr, "%zu\\n", {name}_arena_bytes);
  static_assert({name}_inputs == 1 && {name}_outputs == 1 && {name}_labels_length == 3, "counts");
  for (int size : {name}_input_0_shape) std::fprintf(stderr, "%d ", size);
  for (int size : {name}_output_0_shape) std::fprintf(stderr, "%d ", size);
  std::fprintf(stderr, "%d %d\\n", {name}_input_0_zero_point, {name}_output_0_zero_point);
  std::fprintf(stderr, "%.9g %.9g", {name}_input_0_scale, {name}_output_0_scale);
  for (const char* label : {name}_labels) std::fprintf(stderr, "\\n%s", label);
  return std::fwrite({name}_data, 1, {name}_data_length, stdout) == {name}_data_length ? 0 : 5;
}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 file, written once."""
    path = tmp_path_factory.mktemp("model") / "3 pooled-net.tflite"
    interface = Interface(inputs=("image",), labels=("cat", 'a "dog"?', "été"))
    export(network("pooled", "int8"), "tflite", path, batches=batches("pooled"), interface=interface)
    return path


def changed(model: Path, folder: Path, change: Callable[[Any, Any], None]) -> Path:
    """The file with something in it that is not as it was: the model and the schema are given."""
    from ai_edge_litert import schema_py_generated as schema

    parsed = tflite_graph.parse(model.read_bytes())
    change(parsed, schema)
    path = folder / "changed.tflite"
    path.write_bytes(tflite_graph.pack(parsed))
    return path


def test_the_array_is_the_file(model: Path, tmp_path: Path) -> None:
    written = write(model, tmp_path / "new" / "folder")
    assert (written.header.name, written.source.name) == ("model_3_pooled_net.h", "model_3_pooled_net.cc")
    text = written.source.read_text()
    assert bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2}),", text)) == model.read_bytes()
    assert "alignas(16) const unsigned char model_3_pooled_net_data[] = {" in text
    assert max(map(len, text.splitlines())) <= 120
    assert sorted(path.name for path in written.header.parent.iterdir()) == [written.source.name, written.header.name]


def test_what_it_needs(model: Path) -> None:
    found = footprint(model)
    parsed = tflite_graph.parse(model.read_bytes())
    graph = parsed.subgraphs[0]
    plan = arena.plan([*arena.activations(parsed), *scratch.scratch(parsed)])
    assert found.operators == tuple(sorted({tflite_graph.op_name(parsed, op) for op in graph.operators}))
    assert {"CONV_2D", "FULLY_CONNECTED"} < set(found.operators)
    assert (found.activation_bytes, found.lower_bound_bytes) == (plan.activation_bytes, plan.lower_bound_bytes)
    assert found.size_bytes == model.stat().st_size
    assert found.weight_bytes == 2 * 8 * 9 + 8 * 3
    assert found.persistent_bytes < found.arena_bytes - found.activation_bytes < 2 * found.persistent_bytes


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_it_compiles_and_registers_its_operators(model: Path, tmp_path: Path) -> None:
    written = write(model, tmp_path)
    name = written.header.stem
    compiler = ["g++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    alone = [*compiler, "-c", written.source.name, "-o", "alone.o"]  # without any source of TensorFlow Lite Micro
    subprocess.run(alone, cwd=tmp_path, check=True)
    header = tmp_path / "tensorflow" / "lite" / "micro" / "micro_mutable_op_resolver.h"
    header.parent.mkdir(parents=True)
    methods = [f'  TfLiteStatus {method}() {{ return add("{method}"); }}' for method in METHODS.values()]
    header.write_text(RESOLVER % "\n".join(methods))
    (tmp_path / "main.cc").write_text(MAIN.format(name=name))
    subprocess.run([*compiler, "-I.", "main.cc", "alone.o", "-o", "main"], cwd=tmp_path, check=True)
    ran = subprocess.run([tmp_path / "main"], capture_output=True, check=True)
    assert ran.stdout == model.read_bytes()
    needs, sizes, scales, *labels = ran.stderr.decode().splitlines()
    *registered, arena_bytes = needs.split()
    assert registered == [METHODS[operator] for operator in written.footprint.operators]
    assert int(arena_bytes) == written.footprint.arena_bytes
    (given,), (scores,) = (held := contents(model)).inputs, held.outputs
    assert [*map(int, sizes.split())] == [*given.shape, *scores.shape, given.zero_point, scores.zero_point]
    assert [*map(float, scales.split())] == pytest.approx([given.scale, scores.scale], rel=1e-8)
    assert labels == list(held.labels) == ["cat", 'a "dog"?', "été"]
    assert "// input 0, image: int8" in written.header.read_text()


def test_tensorflow_lite_micro_itself_plans_so_and_keeps_no_more(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")
    parsed = tflite_graph.parse(model.read_bytes())
    asked = scratch.scratch(parsed)
    plan = arena.plan([*arena.activations(parsed), *asked])
    kept = interpreter.persistent_bytes(parsed, len(asked), pointer_bytes=8)
    recorder = 256  # what the recording allocator has beside an ordinary one
    interpreted = runtime.Interpreter.from_file(str(model), arena_size=plan.activation_bytes + kept + recorder)
    interpreted.print_allocations()
    told = capfd.readouterr()
    found = dict(re.findall(r"allocation (head|tail) (\d+) bytes", told.out + told.err))
    assert int(found["head"]) == plan.activation_bytes
    assert int(found["tail"]) <= kept + recorder


def test_methods_are_named_as_their_operations() -> None:
    for operator, method in METHODS.items():
        spelled = operator.replace("_", "").lower()
        assert method.removeprefix("Add").lower() in {spelled, f"{spelled}d"}, operator


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("resnet8", "resnet8"),
        ("my-net.v2 int8", "my_net_v2_int8"),
        ("8bit", "model_8bit"),
        ("__init__", "init"),
        ("né", "n"),
        ("été", "t"),
        ("模型", "model"),
        ("a__b", "a_b"),
    ],
)
def test_identifiers(stem: str, name: str) -> None:
    assert identifier(stem) == name
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name)


def test_no_name_of_a_file_reaches_the_code(model: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\n#error b\\.tflite"
    shutil.copy(model, odd)
    written = write(odd, tmp_path / "sources")
    for path in (written.header, written.source):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("// ")
        assert lines[1].startswith("// SHA-256 ")
        assert not lines[0].endswith("\\")
        assert not any("#error" in line for line in lines[1:])


def to_float(model: Any, schema: Any) -> None:
    for tensor in model.subgraphs[0].tensors:
        if tensor.type == schema.TensorType.INT8:
            tensor.type = schema.TensorType.FLOAT32


def to_open_shape(model: Any, schema: Any) -> None:
    graph = model.subgraphs[0]
    tensor = graph.tensors[graph.operators[0].outputs[0]]
    tensor.shapeSignature = [1, -1, *tensor.shape[2:]]


def to_other_operator(model: Any, schema: Any) -> None:
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.CONV_2D:
            code.builtinCode = schema.BuiltinOperator.CONV_3D
            code.deprecatedBuiltinCode = schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES


def to_custom_operator(model: Any, schema: Any) -> None:
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.CONV_2D:
            code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
            code.customCode = "MyConvolution"


def to_two_graphs(model: Any, schema: Any) -> None:
    model.subgraphs = model.subgraphs * 2


def to_planned(model: Any, schema: Any) -> None:
    tflite_graph.set_note(model, "OfflineMemoryAllocation", b"plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_float, r"computes in float \(.*CONV_2D.*\); allowed: int8 and int16.*quantize it"),
        (to_open_shape, r"shape of tensor .* is not fixed: \[1, -1"),
        (to_other_operator, r"no kernel for CONV_3D\. .*of: ABS, .*CONV_2D"),
        (to_custom_operator, r"no kernel for MyConvolution"),
        (to_two_graphs, r"it holds 2 graphs"),
        (to_planned, r"its memory is planned already"),
    ],
)
def test_what_would_not_run_is_refused(
    model: Path, tmp_path: Path, change: Callable[[Any, Any], None], message: str
) -> None:
    path = changed(model, tmp_path, change)
    with pytest.raises(ExportError, match=message) as caught:
        write(path, tmp_path / "sources")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "sources").exists()


@pytest.mark.parametrize(("data", "message"), [(b"no model", "does not start as"), (None, "No such file")])
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "file.tflite"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ExportError, match=message):
        write(path, tmp_path / "sources")
    assert not (tmp_path / "sources").exists()


def test_a_file_cut_short_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.tflite"
    path.write_bytes(model.read_bytes()[:300])
    with pytest.raises(ExportError, match="cut short or damaged"):
        footprint(path)


@pytest.mark.parametrize("there", [False, True])
def test_both_files_or_neither(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    folder = tmp_path / "sources"
    if there:
        written = write(model, folder)
        written.source.write_text("old")
        written.header.write_text("old")
    accept = staging.StagedPath.accept

    def fails_for_the_second(self: staging.StagedPath) -> None:
        if self.path.suffix == ".h":
            raise ExportError("the disk is full")
        accept(self)

    monkeypatch.setattr(staging.StagedPath, "accept", fails_for_the_second)
    with pytest.raises(ExportError, match="the disk is full"):
        write(model, folder)
    left = {path.name: path.read_text() for path in folder.rglob("*")} if folder.exists() else {}
    assert left == ({"model_3_pooled_net.cc": "old", "model_3_pooled_net.h": "old"} if there else {})


def test_a_folder_in_its_place_is_left_alone(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "model_3_pooled_net.h" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(ExportError, match="it is a folder"):
        write(model, tmp_path)
    assert kept.read_text() == "mine"
    assert not (tmp_path / "model_3_pooled_net.cc").exists()


def test_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["microcontroller", str(model), "--output", str(tmp_path)])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    found = footprint(model)
    assert f"{found.arena_bytes:,} bytes" in told
    assert "upper bound" in told
    assert "CONV_2D" in told
    assert str(tmp_path / "model_3_pooled_net.cc") in told.replace("\n", "")
    assert (tmp_path / "model_3_pooled_net.h").is_file()


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert firmware.main([str(tmp_path / "no.tflite"), "--output", str(tmp_path / "sources")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read ")
    assert not (tmp_path / "sources").exists()
    with pytest.raises(SystemExit) as caught:
        firmware.main(["no.tflite", "--ethosu", "ethos-u99"])
    assert caught.value.code == 2
    assert "'ethos-u55-128'" in capsys.readouterr().err
