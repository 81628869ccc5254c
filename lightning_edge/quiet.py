"""Silence lines of other libraries that a user can do nothing about, each by its words.

Everything else that they say stays. Knows no torch.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO, cast, final

# Loggers and the words of a line: kernels of torchao for other GPUs, a registration that it makes, a flag of the copy
# that is converted, which was made in the mode it needs, and names of torch.export's own where it refuses a network.
_LINES = (
    ("torchao", "Could not load this library"),
    ("torch.utils._pytree", "is an Enum subclass"),
    ("root", "is converted in training mode"),
    ("torch.fx.experimental.symbolic_shapes", "Unable to find user code corresponding to"),
)
# torch 2.13 itself makes what it calls deprecated, whenever a graph is copied, and so does lightning 2.6.
_DEPRECATED = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


def quiet_libraries() -> None:
    """Leave these lines out from here on; safe to call many times."""
    for name, words in _LINES:
        logger = logging.getLogger(None if name == "root" else name)
        if not any(isinstance(known, _Without) and known.words == words for known in logger.filters):
            logger.addFilter(_Without(words))
    warnings.filterwarnings("ignore", message=_DEPRECATED)


@contextmanager
def without_graph_dumps() -> Iterator[None]:
    """Within this context, torch.export does not print the graph of a network that it refuses.

    torch 2.13 writes it to the standard error twice for each attempt, by ``print``, and raises all the same.
    """
    with redirect_stderr(cast(TextIO, _WithoutGraphs(sys.stderr))):
        yield


@final
class _WithoutGraphs:
    """The standard error without texts that are code of a graph; ``print`` writes a text and its line's end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, if it is no graph."""
        graph = "def forward(self, arg" in text
        ends = self._dropped and text == "\n"
        self._dropped = graph
        return len(text) if graph or ends else self._stream.write(text)


class _Without(logging.Filter):
    """Leaves out the lines that have certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line stays."""
        return self.words not in record.getMessage()
