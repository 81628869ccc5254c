"""What all tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lightning_edge.exporters import executorch, onnx, tflite


def pytest_collection_finish() -> None:
    """Look for garbage less often: converters make millions of objects, and looking took a sixth of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def in_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run files in the tests' own process: each of its own takes two seconds to start, for hundreds of files.

    A test module that says ``ISOLATED = True`` has it as users do.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "ISOLATED", False):
            for target in (executorch, tflite, onnx):
                patch.setattr(target, "IN_PROCESS", True, raising=False)
        yield
