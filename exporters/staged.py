"""A file that is written and checked, but not yet in its place."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Self, final

from lightning_edge.exporters.artifact import Artifact
from lightning_edge.files import StagedPath
from lightning_edge.network import Deployable


@final
class Staged:
    """A file that is written and loaded, but not yet in its place: `accept` puts it there, `discard` removes it.

    As a context it discards at the end whatever was not accepted.

    Attributes:
        network: What was exported.
        artifact: The file, loaded from where it waits.
    """

    def __init__(self, network: Deployable, artifact: Artifact, place: StagedPath) -> None:
        self.network = network
        self.artifact = artifact
        self._place = place

    def accept(self) -> Artifact:
        """Put the file in its place, replacing what was there, and return it as it is loaded now.

        Raises:
            ExportError: If it cannot be put there; the old file is then as it was and the new one is removed.
        """
        self._place.accept()
        return replace(self.artifact, path=self._place.path)

    def discard(self) -> None:
        """Remove the file; what was in its place stays. Does nothing after `accept`."""
        self._place.discard()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Discard what was not accepted."""
        self.discard()
