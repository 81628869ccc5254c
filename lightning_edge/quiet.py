"""Silence lines of other libraries that a user can do nothing about, each by its words.

Everything else that they say stays. Knows no torch.
"""

from __future__ import annotations

import logging
import warnings

# Loggers and the words of a line: kernels of torchao for other GPUs, a registration that it makes, and a flag of the
# copy that is converted, which was made in the mode it needs.
_LINES = (
    ("torchao", "Could not load this library"),
    ("torch.utils._pytree", "is an Enum subclass"),
    ("root", "is converted in training mode"),
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


class _Without(logging.Filter):
    """Leaves out the lines that have certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line stays."""
        return self.words not in record.getMessage()
