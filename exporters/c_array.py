"""A file as C++ source: its bytes as an array, its sizes, and the registration of its operations."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BYTES_A_LINE = 16
_RESOLVER = "tensorflow/lite/micro/micro_mutable_op_resolver.h"


def identifier(name: str) -> str:
    """Make a C identifier of any name: ASCII letters, digits and single underscores, ending in ``model``.

    It is neither a keyword nor reserved for the compiler.
    """
    words = re.findall(r"[A-Za-z0-9]+", name)
    if not words or words[0][0].isdigit():
        words.insert(0, "model")
    if not words[-1].endswith("model"):
        words.append("model")
    return "_".join(words)


def resolver(methods: Sequence[str]) -> str:
    """The lines that register operations, to paste where the interpreter is set up."""
    lines = [f"tflite::MicroMutableOpResolver<{len(methods)}> resolver;", *(f"resolver.{name}();" for name in methods)]
    return "\n".join(lines) + "\n"


def header(name: str, size_bytes: int, arena_bytes: int, methods: Sequence[str]) -> str:
    """The header: what there is, and the registration where TensorFlow Lite Micro is on the include path.

    Args:
        name: An `identifier`, which is also the file's name without suffix.
        size_bytes: Length of the array.
        arena_bytes: What to give the interpreter, an estimate.
        methods: Methods of MicroMutableOpResolver.
    """
    guard, macro = f"LIGHTNING_EDGE_{name.upper()}_H_", f"{name.upper()}_OP_COUNT"
    checks = "\n".join(f"  if (resolver.{method}() != kTfLiteOk) return kTfLiteError;" for method in methods)
    return f"""\
// Written by lightning-edge. Nothing here was run on a board.
#ifndef {guard}
#define {guard}

#define {macro} {len(methods)}

namespace {name} {{

// The .tflite file.
extern const unsigned char data[];
constexpr unsigned int data_bytes = {size_bytes};

// Estimate of the tensor arena on a 32-bit core with reference kernels;
// MicroInterpreter::arena_used_bytes() tells the real figure.
constexpr unsigned int arena_bytes = {arena_bytes};

}}  // namespace {name}

#ifdef __has_include
#if __has_include("{_RESOLVER}")
#include "{_RESOLVER}"

namespace {name} {{

inline TfLiteStatus register_operators(tflite::MicroMutableOpResolver<{macro}>& resolver) {{
{checks}
  return kTfLiteOk;
}}

}}  // namespace {name}
#endif
#endif

#endif  // {guard}
"""


def source(name: str, data: bytes) -> str:
    """The array itself, which needs nothing but its header."""
    lines = [data[start : start + _BYTES_A_LINE] for start in range(0, len(data), _BYTES_A_LINE)]
    rows = "\n".join("    " + " ".join(f"0x{byte:02x}," for byte in line) for line in lines)
    return f"""\
// Written by lightning-edge.
#include "{name}.h"

namespace {name} {{

alignas(16) extern const unsigned char data[] = {{
{rows}
}};
static_assert(sizeof(data) == data_bytes, "{name}.h belongs to another file");

}}  // namespace {name}
"""
