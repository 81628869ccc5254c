"""One graph is captured at a time: torch.export and its converters keep what they are at in the whole process.

Two fits in two threads would find each other's modes, and end in errors about stacks and slots of torch.
"""

from __future__ import annotations

import threading

# Reentrant, since a conversion captures, too.
TRACING = threading.RLock()
