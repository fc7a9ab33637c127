"""Links and special files in directories of other people: what leaves the directory, or blocks a reader, is refused."""

from __future__ import annotations

import os
import stat
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


def check_no_special_file(directory: Path) -> None:
    """Check that no pipe, socket or device is in a directory, if there is one: a library that reads it waits forever.

    Raises:
        CheckpointError: one is there, or the directory cannot be listed.
    """
    try:
        for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
            if _is_special(entry):
                raise CheckpointError(f"{entry.name} is neither a file nor a directory; remove it from {directory}")
    except OSError as error:
        raise CheckpointError(f"cannot list {directory}: {error.strerror}") from None


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:  # a link to nowhere, or to itself
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _holds(folder: Path, path: Path) -> bool:
    """Whether a path is below a folder and not hidden there: `.git/config` may hold a password."""
    return path.is_relative_to(folder) and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _hub_blobs(directory: Path) -> Iterator[Path]:
    """The folder of blobs that belongs to a directory in the Hub's cache, `REPO/snapshots/COMMIT/...`."""
    for path in (directory, *directory.parents):
        if path.parent.name == "snapshots":
            yield path.parent.parent / "blobs"
