"""Find which operation a runtime has no kernel for, in its message when it refuses a file."""

from __future__ import annotations

import re

# LiteRT 2, ONNX Runtime 1 and ExecuTorch 1, which tells in its log only.
_WORDS = re.compile(
    r"builtin opcode '(?P<builtin>\w+)'"
    r"|unresolved custom op: (?P<custom>\w+)"
    r"|implementation for (?P<onnx>\w+)\(\d+\)"
    r"|Missing operator: \[\d+\] (?P<executorch>[\w:.]+)"
)


def missing_operation(said: str) -> str | None:
    """Find the operation's name in a runtime's words; ``None`` if they are of something else."""
    found = _WORDS.search(said)
    return found and found[found.lastgroup or 0]
