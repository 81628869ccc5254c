"""What all tests share."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest
import torch
from torch._export import utils as export_helpers
from torch.onnx._internal.exporter import _registration as onnx_registration

from lightning_edge.exporters import executorch, onnx, tflite


def pytest_collection_finish() -> None:
    """Look for garbage less often: converters make millions of objects, and looking took a sixth of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="session")
def libraries_remember() -> Iterator[None]:
    """Let torch.export and torch.onnx keep what they find out anew for each file, a sixth of the time that files take.

    It is all operations there are, for which torch asks once for each library, and onnxscript's functions, parsed.
    """
    registered: list[int] = []
    name_all = export_helpers._materialize_cpp_cia_ops

    def name_new() -> None:
        count = len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
        if registered != [count]:
            name_all()
            registered[:] = [count]

    onnxscript = onnx_registration.onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_helpers, "_materialize_cpp_cia_ops", name_new)
        patch.setattr(onnxscript, "get_torchlib_ops", functools.cache(onnxscript.get_torchlib_ops))
        yield


@pytest.fixture(autouse=True, scope="module")
def in_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run files in the tests' own process: each of its own takes two seconds to start, for hundreds of files.

    A test module that says ``ISOLATED = True`` has it as users do.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "ISOLATED", False):
            for target in (executorch, tflite, onnx):
                patch.setattr(type(target.TARGET), "in_process", True)
        yield
