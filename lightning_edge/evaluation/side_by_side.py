"""Files that run side by side on the same calls of a loop: each has its own pass, and is asked ahead of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, final

from torch import Tensor

from lightning_edge.evaluation.reference import checksum
from lightning_edge.exporters import Artifact
from lightning_edge.network import Inputs

# Outputs of a whole validation set are small for classes, large for images; beyond this, files run in their own pass.
_KEPT_BYTES = 256 * 2**20

_Answer = list[Tensor] | Exception


@final
class SideBySide:
    """Runs all files on the calls of the first one's pass over the data, and keeps the outputs for the others' passes.

    Passes follow each other, since the loop is the user's. One that is fed something else than the first, or whose
    outputs were too large to be kept, runs its file itself. As a context it ends what is under way.

    Args:
        files: The files, in the order of their passes.
        at_once: How many run at the same time; with one each runs in its own pass.
    """

    def __init__(self, files: Sequence[Artifact], at_once: int) -> None:
        self._waiting = list(files) if at_once > 1 else []
        self._kept: dict[int, dict[int, tuple[int, _Answer]]] = {id(file): {} for file in files}
        self._left_bytes = _KEPT_BYTES
        self._pool = ThreadPoolExecutor(max(1, at_once), "lightning-edge running a file")
        self._files = files

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads, and where an error or Ctrl-C is on its way also what they wait for."""
        if error is not None:
            for file in self._files:
                file.runner.close()
        self._pool.shutdown(cancel_futures=True)

    def answers(self, file: Artifact) -> Callable[..., list[Tensor]]:
        """Begin the pass of a file: give what answers its calls, in their order, as the file itself would."""
        if file in self._waiting:
            self._waiting.remove(file)
        kept = self._kept.pop(id(file), {})
        index = -1

        def answer(*args: Any, **kwargs: Any) -> list[Tensor]:
            nonlocal index
            index += 1
            if not self._waiting and not kept:
                return file(*args, **kwargs)
            inputs = Inputs(args, kwargs)
            key = checksum(inputs)
            known, found = kept.pop(index, (key, None))
            if known != key:
                # The loop feeds something else in every pass: to run files ahead is for nothing.
                self._waiting.clear()
                kept.clear()
                found = None
            if found is None:
                found = self._run(file, index, key, inputs)
            if isinstance(found, Exception):
                raise found
            return found

        return answer

    def _run(self, file: Artifact, index: int, key: int, inputs: Inputs) -> _Answer:
        """Run a file, and those whose pass has not begun beside it."""
        ahead = [other for other in self._waiting if index not in self._kept[id(other)]] if self._left_bytes > 0 else []
        futures = [self._pool.submit(_answer_of, each, inputs) for each in (file, *ahead)]
        wait(futures)
        own, *others = (future.result() for future in futures)
        for other, found in zip(ahead, others, strict=True):
            self._kept[id(other)][index] = key, found
            self._left_bytes -= _size_bytes(found)
        return own


def _answer_of(file: Artifact, inputs: Inputs) -> _Answer:
    try:
        return file(*inputs.args, **inputs.kwargs)
    except Exception as error:  # the file's own pass raises it
        return error


def _size_bytes(answer: _Answer) -> int:
    return 0 if isinstance(answer, Exception) else sum(tensor.nbytes for tensor in answer)
