"""Shared by staged directories and staged files: temporary names, locks, and errors that name the final output."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopexport.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has no flock; there, the user removes what killed runs left behind
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # being written
REPLACED = ".replaced"  # the older output, kept until the new one is in place


@contextmanager
def explain_os_errors(out: Path, *, remedy: str = "free some space") -> Iterator[None]:
    """Turn an OSError into an OutputError that names `out`, never its temporary name.

    Args:
        out: the file or directory to write.
        remedy: what to do when the disk is full.

    Raises:
        OutputError: instead of every OSError in the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"no space left for {out}; nothing was kept. To go on, {remedy}") from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"another process created {out} meanwhile; choose another output") from None
        where = with_final_name(out, str(error.filename or out))
        place = "" if where == str(out) else f" ({where})"
        raise OutputError(f"cannot write {out}: {error.strerror or error}{place}") from None


def lock(directory: Path) -> int | None:
    """Lock a directory until the descriptor is closed, or the process ends.

    Returns:
        An open descriptor; None if this system or file system has no locks.

    Raises:
        BlockingIOError: another run holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Give back what `lock` returned."""
    if descriptor is not None:
        os.close(descriptor)


def with_final_name(out: Path, text: str) -> str:
    """`text` with the temporary name of `out` replaced by its final name."""
    for parent in (out.parent.absolute(), out.parent):  # Python 3.12 gives temporary directories absolute paths
        temporary = re.escape(str(parent / f".{out.name}")) + r"(\.\w+)?" + re.escape(PARTIAL)
        text = re.sub(temporary, lambda match: str(out), text)
    return text
