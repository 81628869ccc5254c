"""Imports run one way and every third-party library has its room: docs/design.md, held by walking the AST."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module imports from rows below its own and from its own room.
ROWS = [
    {"errors", "interface", "windows"},
    {"schedule", "rendering", "monitor", "network", "mistakes", "anatomy", "budget", "macs", "provenance"},
    {"report", "surgery", "measure", "succession"},
    {"comparison"},
    {"manifest", "reference", "quantization", "pruning", "factorization", "sparsity"},
    {"distillation"},
    {"exporters"},
    {"validation", "rows"},
    {"evaluation", "verification", "firmware"},
    {"record"},
    {"tracking"},
    {"callbacks"},
    {"zoo"},
    {"commands"},
    {"cli"},
]
WITHOUT_TORCH = {"errors", "schedule", "rendering", "monitor", "report", "mistakes", "anatomy", "budget", "macs"}
WITHOUT_TORCH |= {"provenance", "manifest", "interface"}
PTE = ("", "_batches", "_constants", "_coreml", "_tally", "_vulkan")
ROOMS = {
    "lightning": ("callbacks", "zoo", "tracking", "validation", "cli"),
    "jsonargparse": ("cli",),
    "rich": ("rendering", "report", "verification", "firmware", "callbacks", "cli"),
    "sklearn": ("zoo",),
    "torchao": ("quantization", "exporters"),
    "torch_pruning": ("pruning",),
    "wandb": ("tracking",),
    "executorch": ("exporters.executorch", "exporters.executorch_backends", *(f"exporters.pte{part}" for part in PTE)),
    "coremltools": (
        "exporters.coreml",
        "exporters.coreml_placement",
        "exporters.coreml_weights",
        "exporters.mil",
        "exporters.mlpackage",
    ),
    "litert_torch": ("exporters.tflite", "exporters.tflite_graph"),
    "ai_edge_litert": ("exporters.tflite", "exporters.tflite_graph"),
    "ai_edge_quantizer": ("exporters.tflite", "exporters.tflite_graph"),
    "flatbuffers": ("exporters.tflite", "exporters.tflite_graph", "exporters.tflite_metadata"),
    "ethosu": ("exporters.vela",),
    "onnx": (
        "exporters.onnx",
        "exporters.onnx_graph",
        "exporters.onnx_file",
        "exporters.onnx_inside",
        "exporters.onnx_int8",
    ),
    "onnxscript": ("exporters.onnx",),
    "onnxruntime": ("exporters.onnx",),
    "openvino": ("exporters.onnx",),
    "transformers": (),
    "matplotlib": (),
}


def modules() -> dict[str, Path]:
    """Every module below the package, by its name without ``lightning_edge.``."""
    found = {}
    for folder, prefix in ((ROOT / "lightning_edge", ()), (ROOT / "exporters", ("exporters",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts).removesuffix(".__init__")
            if name != "__init__":
                found[name] = path
    return found


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports, in functions too, by statement or by name; not for type checkers only."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
            continue
        todo.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("require", "import_module", "__import__"):
                yield str(node.args[0].value)


def row(module: str) -> int:
    room = module.split(".")[0]
    rows = [number for number, names in enumerate(ROWS) if room in names]
    assert rows, f"{module} has no row in docs/design.md and in this table: give it one"
    return rows[0]


def in_room(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def violations(module: str, source: str) -> list[str]:
    """What in this source breaks the rules of the house."""
    found = []
    for name in imported(source):
        library, _, rest = name.partition(".")
        if library == "exporters":
            found.append(f"{name}: the package is lightning_edge.exporters")
        elif library == "lightning_edge" and rest:
            same_room = rest.split(".")[0] == module.split(".")[0]
            if not same_room and row(rest) >= row(module):
                found.append(f"{name} is not below {module}")
        elif library == "torch" and module in WITHOUT_TORCH:
            found.append(f"{name}: {module} knows no torch")
        elif library in ROOMS and not any(in_room(module, room) for room in ROOMS[library]):
            found.append(f"{name} belongs in {ROOMS[library] or 'no module'}")
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_keeps_the_rules(module: str) -> None:
    assert violations(module, modules()[module].read_text()) == []


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_is_short(module: str) -> None:
    assert len(modules()[module].read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("schedule", "from lightning_edge.quantization import Quantize"),
        ("surgery", "def f():\n    import lightning_edge.record"),
        ("report", "import torch"),
        ("measure", "import lightning as L"),
        ("evaluation", "require('coremltools.models', 'coreml')"),
        ("exporters.executorch", "import_module('ai_edge_litert.interpreter')"),
        ("cli", "from exporters import base"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1
