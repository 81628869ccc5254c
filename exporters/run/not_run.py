"""The runner of a file that was inspected, but that nothing on this machine can run."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_edge.contents import Contents
from lightning_edge.errors import RunnerError
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner


@final
class NotRun(Runner):
    """Stands where a `Runner` would be, and says why there is none when it is called.

    Args:
        name: Name of the file, for the message.
        contents: What the file says of itself.
        reason: Why it cannot run here.
    """

    def __init__(self, name: str, contents: Contents, reason: str) -> None:
        self._name = name
        self._reason = reason
        self.runtime = f"not run here: {reason}"
        self.inputs = tuple(TensorSpec(given.shape, getattr(torch, given.dtype)) for given in contents.inputs)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Raise the one error that says why.

        Raises:
            RunnerError: Always.
        """
        raise RunnerError(f"{self._name} cannot run here: {self._reason}")
