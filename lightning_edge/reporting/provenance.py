"""Where a file comes from: the commit of the user's working directory. Knows no torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 10


@dataclass(frozen=True)
class Commit:
    """A state of a git repository.

    Attributes:
        commit: The full name of the commit that is checked out.
        dirty: Whether files that git tracks were changed since.
    """

    commit: str
    dirty: bool


def commit_of(folder: Path | None = None) -> Commit | None:
    """Look up the commit of a working directory; ``None`` where there is no git, no repository or no commit yet.

    Args:
        folder: A folder in it; the current one if not given.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    # Files that git does not know are not looked at: what an export writes is one of them.
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if not commit or changes is None:
        return None
    return Commit(commit, bool(changes))


def _git(folder: Path | None, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
