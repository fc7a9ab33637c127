"""Links in directories of other people: those that stay inside are followed, those that leave are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loopexport.errors import CheckpointError


def check_link(root: Path, name: str) -> None:
    """Check that a file of a directory lies in it, whatever links lead there; the directory itself may be a link.

    A git clone or an archive may hold links to any file of the user. Its content would be copied, and then published.

    Args:
        root: the directory.
        name: the file's name in it; there need not be such a file.

    Raises:
        CheckpointError: it is a link out of the directory; the message names both ends.
    """
    here, real = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    if not any(_holds(folder, real) for folder in (here, *_hub_blobs(here))):
        raise CheckpointError(
            f"{name} is a symbolic link to {real}, which is not a file of {root}; replace it with the file itself if "
            "you trust it, or remove it"
        )


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is below a folder and not hidden there: `.git/config` may hold a password."""
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _hub_blobs(directory: Path) -> Iterator[Path]:
    """The folder of blobs that belongs to a directory in the Hub's cache, `REPO/snapshots/COMMIT/...`."""
    for path in (directory, *directory.parents):
        if path.parent.name == "snapshots":
            yield path.parent.parent / "blobs"
