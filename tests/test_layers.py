"""Imports run one way and every third-party library has its room: docs/design.md, held by walking the AST."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. A module imports from rows below its own and from its own room. A room is a folder or a module; of two
# that fit, the longer name counts.
ROWS = [
    {
        "errors",
        "interface",
        "windows",
        "embedding_bags",
        "moved",
        "verdict",
        "regular_files",
        "plain_values",
        "interrupts",
        "locks",
        "tracing",
        "quiet",
        "user_warnings",
        "cores",
        "wording",
        "condition",
    },
    {"reporting.devices", "reporting.classes", "reporting.layers", "reporting.network_size", "plain_calls"},
    {
        "yaml_files",
        "reporting.rendering",
        "reporting.device_entry",
        "schedule",
        "contents",
        "macs",
        "files",
        "reporting.monitor",
        "reporting.provenance",
    },
    {"boards"},
    {"reporting.budget"},
    {"reporting.terminal"},
    {"reporting.typed"},
    {"reporting.html"},
    {"network", "one_run", "record_check", "succession", "reporting.report", "cli.config_errors"},
    {"surgery", "measure", "reporting.manifest"},
    {"reporting.read", "comparison", "quantization", "pruning", "factorization", "sparsity"},
    {"distillation", "evaluation.reference", "evaluation.class_changes"},
    {"record"},
    {"exporters.passes"},
    {"exporters.input_adapter", "exporters.default_names"},
    {"exporters.program"},
    {"exporters.run"},
    {"exporters.target"},
    {"exporters.artifact"},
    {"exporters.verify", "exporters.staged"},
    {"exporters.writer"},
    {"exporters.coreml", "exporters.tflite", "exporters.onnx"},
    {"exporters.executorch", "exporters.micro"},
    {"exporters.order"},
    {"exporters.pipeline"},
    {"exporters"},
    {"reporting", "evaluation.validation", "devices"},
    {"evaluation"},
    {"callbacks"},
    {"zoo", "sweeps"},
    {"cli"},
]
WITHOUT_TORCH = {"errors", "schedule", "contents", "macs", "interface", "files", "moved", "cli.config_errors"}
WITHOUT_TORCH |= {"quiet", "user_warnings", "boards", "cores", "wording", "condition"}
WITHOUT_TORCH |= {"tracing", "interrupts", "locks", "one_run", "plain_values", "regular_files", "verdict", "yaml_files"}
WITHOUT_TORCH |= {"devices.runner", "devices.runtimes", "devices.sensors"}
WITHOUT_TORCH |= {"reporting.devices", "reporting.device_entry", "reporting.classes", "reporting.layers"}
WITHOUT_TORCH |= {"reporting.network_size"}
WITHOUT_TORCH |= {
    f"reporting.{name}"
    for name in ("report", "rendering", "terminal", "monitor", "budget", "provenance", "manifest", "typed", "read")
}
WITHOUT_TORCH |= {f"reporting.html.{path.stem}" for path in (ROOT / "lightning_edge/reporting/html").glob("*.py")}
ROOMS = {
    "lightning": ("callbacks", "zoo", "evaluation.validation", "cli"),
    "jsonargparse": ("cli",),
    "rich": ("reporting", "callbacks", "cli"),
    "sklearn": ("zoo",),
    "torchao": ("quantization", "exporters.executorch"),
    "torch_pruning": ("pruning",),
    "yaml": ("yaml_files", "sweeps.strict_yaml", "cli"),
    "wandb": ("callbacks.tracking", "sweeps.tracking"),
    "optuna": ("sweeps",),
    "executorch": ("exporters.executorch",),
    "coremltools": ("exporters.coreml", "devices.runtimes"),
    "litert_torch": ("exporters.tflite",),
    "ai_edge_litert": ("exporters.tflite", "devices.runtimes"),
    "asyncssh": ("devices.ssh",),
    "ai_edge_quantizer": ("exporters.tflite",),
    "flatbuffers": ("exporters.tflite",),
    "ethosu": ("exporters.micro.vela",),
    "onnx": ("exporters.onnx",),
    "onnx_ir": ("exporters.onnx",),
    "onnxscript": ("exporters.onnx",),
    "onnxruntime": ("exporters.onnx", "devices.runtimes"),
    "openvino": ("exporters.onnx",),
    "PIL": ("exporters.coreml.runners", "devices.runtimes", "zoo.image_folder"),
    "timm": ("zoo.backbones",),
    "torchvision": ("zoo.backbones",),
    "transformers": ("zoo.backbones",),
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


def room_of(module: str) -> str:
    """The room that a module, or a name in a module, is in."""
    rooms = [room for rooms in ROWS for room in rooms if in_room(module, room)]
    assert rooms, f"{module} has no row in docs/design.md and in this table: give it one"
    return max(rooms, key=len)


def row(module: str) -> int:
    """The number of a module's row."""
    room = room_of(module)
    return next(number for number, rooms in enumerate(ROWS) if room in rooms)


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
            if room_of(rest) != room_of(module) and row(rest) >= row(module):
                found.append(f"{name} is not below {module}")
        elif library == "torch" and module in WITHOUT_TORCH:
            found.append(f"{name}: {module} knows no torch")
        elif library in ROOMS and not any(in_room(module, room) for room in ROOMS[library]):
            found.append(f"{name} belongs in {ROOMS[library] or 'no module'}")
    return found


def test_modules_keep_the_rules() -> None:
    found = {module: violations(module, path.read_text()) for module, path in modules().items()}
    assert len(found) > 150
    assert {module: broken for module, broken in found.items() if broken} == {}


def test_modules_are_short() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in modules().items()}
    assert {module: count for module, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("schedule", "from lightning_edge.quantization import Quantize"),
        ("surgery", "def f():\n    import lightning_edge.record"),
        ("reporting.report", "import torch"),
        ("measure", "import lightning as L"),
        ("evaluation.evaluate", "require('coremltools.models', 'coreml')"),
        ("exporters.executorch", "import_module('ai_edge_litert.interpreter')"),
        ("cli.main", "from exporters import program"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1
