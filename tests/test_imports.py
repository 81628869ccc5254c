"""What `import lightning_edge` brings with it, seen from fresh interpreters."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import warnings
from importlib import import_module

import pytest

import lightning_edge
from lightning_edge import exporters
from lightning_edge.moved import MOVED

OPTIONAL = (
    "executorch",
    "coremltools",
    "litert_torch",
    "torch_pruning",
    "wandb",
    "asyncssh",
    "optuna",
    "matplotlib",
    "ai_edge_litert",
    "ethosu",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "sklearn",
)
HEAVY = (*OPTIONAL, "torchao")
# They subclass torchao's classes, so they import it; nothing imports them before a network is quantized.
NEED_TORCHAO = tuple(
    f"lightning_edge.quantization.train.{name}"
    for name in ("quantizer", "fake_quantize", "fused", "weights", "specs", "histogram")
)
# They work on ONNX's graphs; nothing imports them before an .onnx file is written or read.
NEED_ONNX = "lightning_edge.exporters.onnx."
# Which loggers are Weights & Biases's is known by name, so that nothing imports it.
REPORT_IN_A_LOGGER = """
import tempfile
from pathlib import Path
from lightning.pytorch.loggers import CSVLogger
from lightning_edge.callbacks.tracking import log_report
from lightning_edge.reporting.report import Report
with tempfile.TemporaryDirectory() as folder:
    log_report([CSVLogger(folder)], Report("m", "validate", ()), Path("."))
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light_and_every_module_imports_without_optional_libraries() -> None:
    """In one process: importing torch and lightning is what takes time."""
    names = [module.name for module in pkgutil.walk_packages(lightning_edge.__path__, "lightning_edge.")]
    names += [module.name for module in pkgutil.walk_packages(exporters.__path__, "lightning_edge.exporters.")]
    light = sorted({name for name in names if name not in NEED_TORCHAO and not name.startswith(NEED_ONNX)})
    assert {"lightning_edge.cli.main", "lightning_edge.exporters.onnx"} <= {*light}
    heavy = f"print([name for name in {HEAVY} if name in sys.modules])"
    public = ("EdgeCompressionCallback", "DeviceEvaluationCallback", "Quantize")
    code = [
        "import importlib, sys, lightning_edge",
        heavy,
        *(f"lightning_edge.{name}\n{heavy}" for name in public),
        f"from lightning_edge import *\nprint(Tolerance.__name__)\n{heavy}",
        REPORT_IN_A_LOGGER,
        heavy,
        f"sys.modules.update(dict.fromkeys({HEAVY}))",
        f"for name in {light}: importlib.import_module(name)",
        "print('done')",
    ]
    assert run("\n".join(code)).splitlines() == [*["[]"] * 4, "Tolerance", "[]", "[]", "done"]


def test_import_brings_no_torch() -> None:
    assert run("import sys, lightning_edge; print('torch' in sys.modules)") == "False"


def test_public_names_are_those_in_all() -> None:
    for name in lightning_edge.__all__:
        assert getattr(lightning_edge, name) is not None
    assert set(lightning_edge.__all__) <= set(dir(lightning_edge))
    assert lightning_edge.__all__ == sorted(lightning_edge.__all__)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'quantise'; it has: .*quantize"):
        _ = lightning_edge.quantise


def test_missing_library_names_its_extra() -> None:
    code = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from lightning_edge.errors import MissingExtraError, require\n"
        "try:\n    require('coremltools', 'coreml')\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    assert "pip install 'lightning-edge[coreml]'" in run(code)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_old_paths_still_work_and_say_where_the_module_is_now(old: str, new: str) -> None:
    parent, _, child = old.rpartition(".")
    assert old not in sys.modules
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            module = import_module(old)
        (warning,) = [each for each in told if each.category is DeprecationWarning and old in str(each.message)]
        assert f"{old} is {new} now" in str(warning.message)
        moved = import_module(new)
        names = [name for name in vars(moved) if name[0] != "_"]
        assert names
        assert all(getattr(module, name) is getattr(moved, name) for name in names)
    finally:
        sys.modules.pop(old, None)
        vars(sys.modules[parent]).pop(child, None)


def test_names_are_imported_from_an_old_path() -> None:
    try:
        with pytest.warns(DeprecationWarning, match=r"lightning_edge\.report is lightning_edge\.reporting\.report now"):
            from lightning_edge.report import Report
        assert Report.__module__ == "lightning_edge.reporting.report"
    finally:
        del sys.modules["lightning_edge.report"]
        del lightning_edge.report
