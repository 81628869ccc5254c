"""Vela's estimate of a file on an Ethos-U: read from what it writes, and every way it can fail said clearly."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_edge.cli import microcontroller as firmware
from lightning_edge.errors import ExportError, MissingExtraError
from lightning_edge.exporters.micro import vela
from lightning_edge.exporters.micro.sources import Footprint
from lightning_edge.exporters.tflite import graph as tflite_graph

pytest.importorskip("ai_edge_litert")

FOOTPRINT = Footprint(("FULLY_CONNECTED",), 2000, 512, 48, 48, 1500, 2048)
ESTIMATE = vela.Estimate(
    "ethos-u55-128", "System", "Mode", 5e8, 0.25, 125_000, 51_200, 0, 2048, 7, ("GATHER", "GATHER")
)


def tensor(schema: Any, name: str, shape: list[int], dtype: str, buffer: int = 0, scale: float = 0.1) -> Any:
    quantization = schema.QuantizationParametersT(scale=[scale], zeroPoint=[0])
    kind = getattr(schema.TensorType, dtype)
    return schema.TensorT(name=name, shape=shape, type=kind, buffer=buffer, quantization=quantization)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A linear layer of int8, and a CUMSUM, which no Ethos-U has; made without a converter."""
    from ai_edge_litert import schema_py_generated as schema

    tensors = [
        tensor(schema, "input", [1, 16], "INT8"),
        tensor(schema, "weight", [32, 16], "INT8", 1),
        tensor(schema, "bias", [32], "INT32", 2, 0.01),
        tensor(schema, "hidden", [1, 32], "INT8"),
        tensor(schema, "axis", [], "INT32", 3),
        tensor(schema, "output", [1, 32], "INT8"),
    ]
    layer = schema.OperatorT(
        opcodeIndex=0,
        inputs=[0, 1, 2],
        outputs=[3],
        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
        builtinOptions=schema.FullyConnectedOptionsT(),
    )
    total = schema.OperatorT(
        opcodeIndex=1,
        inputs=[3, 4],
        outputs=[5],
        builtinOptionsType=schema.BuiltinOptions.CumsumOptions,
        builtinOptions=schema.CumsumOptionsT(),
    )
    codes = [
        schema.OperatorCodeT(builtinCode=number, deprecatedBuiltinCode=min(number, 127), version=1)
        for number in (schema.BuiltinOperator.FULLY_CONNECTED, schema.BuiltinOperator.CUMSUM)
    ]
    graph = schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[5], operators=[layer, total], name="main")
    constants = [b"", bytes(range(256)) * 2, bytes(128), (1).to_bytes(4, "little")]
    buffers = [schema.BufferT(data=list(data) or None) for data in constants]
    made = schema.ModelT(version=3, operatorCodes=codes, subgraphs=[graph], buffers=buffers, description="made")
    path = tmp_path / "made.tflite"
    path.write_bytes(tflite_graph.pack(made))
    return path


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Put a program in Vela's place."""
    program = tmp_path / "pretend.py"
    program.write_text(f"import sys, time, pathlib\n{code}\n")
    monkeypatch.setattr(vela, "_COMMAND", (sys.executable, str(program)))
    monkeypatch.setattr(vela, "check_installed", lambda *_: None)


def test_an_estimate(model: Path) -> None:
    pytest.importorskip("ethosu.vela")
    before = sorted(model.parent.iterdir())
    found = vela.estimate(model, "ethos-u55-128")
    assert (found.npu_operators, found.cpu_operators) == (1, ("CUMSUM",))
    assert found.inference_time_ms > 0
    assert found.cycles == pytest.approx(found.inference_time_ms / 1000 * found.clock_hz, rel=0.01)
    assert 32 <= found.sram_bytes < 10_000
    assert 256 < found.flash_bytes < 10_000
    assert found.configuration == "ethos-u55-128"
    assert sorted(model.parent.iterdir()) == before


def test_weights_in_dram_are_counted(model: Path) -> None:
    pytest.importorskip("ethosu.vela")
    found = vela.estimate(model, "ethos-u65-256")
    assert found.memory_mode.startswith("Dedicated_Sram")
    assert (found.flash_bytes, found.dram_bytes > 256) == (0, True)


def test_the_command_asks_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ethosu.vela")
    assert firmware.main([str(model), "--output", str(tmp_path / "sources"), "--ethosu", "ethos-u65-256"]) == 0
    told = capsys.readouterr().out
    assert "Vela's estimate for ethos-u65-256" in told.replace("\n", "")
    assert "CUMSUM" in told
    assert len(list((tmp_path / "sources").iterdir())) == 3
    (compiled,) = (tmp_path / "sources").glob("*_vela.tflite")
    model_in_it = tflite_graph.parse(compiled.read_bytes())
    names = [tflite_graph.op_name(model_in_it, op) for op in model_in_it.subgraphs[0].operators]
    assert sorted(names) == ["CUMSUM", "ethos-u"]


def test_every_figure_is_called_an_estimate() -> None:
    laid = firmware.table("made", FOOTPRINT, ESTIMATE)
    names, values, sources = ([str(cell) for cell in column.cells] for column in laid.columns)
    of_vela = {name: value for name, value, source in zip(names, values, sources, strict=True) if "Vela" in source}
    assert of_vela == {
        "inference": "0.250 ms",
        "cycles": "125000",
        "SRAM": "51,200 bytes",
        "DRAM": "0 bytes",
        "flash": "2,048 bytes",
        "on the NPU": "7 operations",
        "on the CPU": "2 operations: GATHER",
    }
    assert all("estimate" in source for source in sources if "Vela" in source)
    assert "upper bound" in sources[names.index("arena")]


def test_no_such_configuration(model: Path) -> None:
    with pytest.raises(ValueError, match=r"given 'ethos-u55-512', allowed: ethos-u55-32, .*ethos-u85-2048"):
        vela.estimate(model, "ethos-u55-512")


def test_vela_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("lightning_edge.errors.find_spec", lambda name: None if name == "ethosu" else find(name))
    with pytest.raises(MissingExtraError, match=r"lightning-edge\[ethosu\]"):
        vela.estimate(model, "ethos-u55-128")


def test_a_float_file(model: Path, tmp_path: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    parsed = tflite_graph.parse(model.read_bytes())
    for each in parsed.subgraphs[0].tensors:
        each.type = schema.TensorType.FLOAT32
    path = tmp_path / "float.tflite"
    path.write_bytes(tflite_graph.pack(parsed))
    with pytest.raises(ExportError, match=r"computes in float \(.*FULLY_CONNECTED\), which no Ethos-U does"):
        vela.estimate(path, "ethos-u55-128")


@pytest.mark.parametrize(("data", "message"), [(b"no model", "does not start as"), (None, "cannot read .*No such")])
def test_no_model(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "file.tflite"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ExportError, match=message):
        vela.estimate(path, "ethos-u55-128")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('loading'); print('Error: HARD_SWISH is odd'); sys.exit(3)", "status 3: Error: HARD_SWISH is odd"),
        ("sys.exit(1)", "status 1: nothing"),
        ("print('done')", r"not understood .*found 0.*done"),
        (
            "out = pathlib.Path(sys.argv[-1]); (out / 'x_summary_y.csv').write_text('system_config\\nA\\n');"
            "(out / 'x_vela.tflite').write_bytes(pathlib.Path(sys.argv[1]).read_bytes())",
            "not understood .*memory_mode",
        ),
        ("time.sleep(60)", r"was not done in 1 s; give it more \(timeout_s\)"),
    ],
)
def test_vela_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    pretend(monkeypatch, tmp_path, code)
    with pytest.raises(ExportError, match=message):
        vela.estimate(model, "ethos-u55-128", timeout_s=1 if "sleep" in code else 60)


def test_a_failure_leaves_nothing_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, tmp_path, "sys.exit('error: out of luck')")
    assert firmware.main([str(model), "--output", str(tmp_path / "sources"), "--ethosu", "ethos-u55-128"]) == 2
    assert "out of luck" in capsys.readouterr().err
    assert not (tmp_path / "sources").exists()
