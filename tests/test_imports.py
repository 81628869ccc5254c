"""What `import lightning_edge` brings with it, seen from fresh interpreters."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import lightning_edge
from lightning_edge import exporters

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


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light() -> None:
    heavy = f"print([name for name in {HEAVY} if name in sys.modules])"
    names = ("EdgeCompressionCallback", "DeviceEvaluationCallback", "Quantize")
    code = "; ".join(f"lightning_edge.{name}; {heavy}" for name in names)
    everything = "from lightning_edge import *; print(Tolerance.__name__)"
    assert run(f"import sys, lightning_edge; {heavy}; {code}; {everything}").split() == ["[]"] * 4 + ["Tolerance"]


def test_import_brings_no_torch() -> None:
    assert run("import sys, lightning_edge; print('torch' in sys.modules)") == "False"


def test_every_module_imports_without_optional_libraries() -> None:
    names = [module.name for module in pkgutil.walk_packages(lightning_edge.__path__, "lightning_edge.")]
    names += [module.name for module in pkgutil.walk_packages(exporters.__path__, "lightning_edge.exporters.")]
    light = sorted({name for name in names if name not in NEED_TORCHAO and not name.startswith(NEED_ONNX)})
    assert {"lightning_edge.cli.main", "lightning_edge.exporters.onnx"} <= {*light}
    blocked = f"import sys, importlib; sys.modules.update(dict.fromkeys({HEAVY}))"
    assert run(f"{blocked}; [importlib.import_module(name) for name in {light}]; print('done')") == "done"


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


def test_old_paths_still_work_and_say_where_the_module_is_now() -> None:
    code = (
        "import warnings\nfrom importlib import import_module\nfrom lightning_edge.moved import MOVED\n"
        "for old, new in MOVED.items():\n"
        "    with warnings.catch_warnings(record=True) as told:\n"
        "        warnings.simplefilter('always')\n"
        "        module = import_module(old)\n"
        "    (warning,) = [each for each in told if each.category is DeprecationWarning and old in str(each.message)]\n"
        "    assert f'{old} is {new} now' in str(warning.message)\n"
        "    names = [name for name in vars(import_module(new)) if name[0] != '_']\n"
        "    assert names and all(getattr(module, name) is getattr(import_module(new), name) for name in names)\n"
        "from lightning_edge.report import Report\nprint(Report.__module__)"
    )
    assert run(code) == "lightning_edge.reporting.report"
