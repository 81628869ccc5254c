"""One graph is captured at a time: torch.export and its converters keep what they are at in the whole process.

Two fits in two threads would find each other's modes, and end in errors about stacks and slots of torch.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Reentrant, since a conversion captures, too.
_LOCK = threading.RLock()
# Python 3.12 begins with some hundred frozen objects; a program that freezes its own has far more.
_FEW_OBJECTS = 1000


@contextmanager
def tracing() -> Iterator[None]:
    """Within this context no other thread captures or converts, and what is in memory already is not collected.

    Converters make millions of objects, so that Python looks through all objects there are again and again, of which
    torch and its libraries have most. Collections took 1.4 of 13 s of writing a first ONNX file of MobileNetV3-small,
    and take 0.8 s so. What is new is collected as ever. Objects that a program has frozen by itself stay frozen, and
    then nothing is gained.
    """
    with _LOCK:
        freezes = gc.get_freeze_count() < _FEW_OBJECTS
        if freezes:
            gc.freeze()
        try:
            yield
        finally:
            if freezes:
                gc.unfreeze()
