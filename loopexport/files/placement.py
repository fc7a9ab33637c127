"""Put a weights file in place without loading it: share its blocks (reflink), add a name (hardlink), or copy it."""

from __future__ import annotations

import errno
import os
import sys
from io import FileIO
from pathlib import Path
from typing import get_args

from loopexport.choices import Placement
from loopexport.errors import OutputError

from .digests import Progress, open_to_read

METHODS = get_args(Placement)
COPY_CHUNK_BYTES = 16 * 2**20

# Errors of copy_file_range that mean that the kernel cannot copy between these two files.
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM}


def settle_method(method: str, source: Path, directory: Path) -> str:
    """Resolve the method "auto": reflink if the file system can, else copy.

    Args:
        method: one of `METHODS`; any but "auto" is returned unchanged.
        source: one of the files to place.
        directory: the target directory; a probe file is created there and removed again.
    """
    if method != "auto":
        return method
    probe = directory / ".reflink-probe"
    possible = _reflink(source, probe)
    probe.unlink(missing_ok=True)
    return "reflink" if possible else "copy"


def place(source: Path, target: Path, method: str, progress: Progress = lambda count: None) -> None:
    """Make `target` hold the bytes of `source`.

    Args:
        source: a real file, with links resolved; it is only read.
        target: a path that does not exist.
        method: "reflink", "hardlink" or "copy"; see `settle_method`.
        progress: called with the number of bytes just copied.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the file system cannot reflink or hardlink these files; use "auto" or "copy".
    """
    if method == "hardlink":
        _hardlink(source, target)
    elif method == "reflink":
        if not _reflink(source, target):
            raise OutputError(
                f"the file system of {target.parent} cannot reflink from {source.parent}; use --weights auto or copy"
            )
    else:
        with open_to_read(source) as reader, target.open("xb", buffering=0) as writer:
            copy_bytes(reader, writer, progress)


def _hardlink(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise OutputError(
            f"cannot hardlink {source.name} into {target.parent} ({error.strerror}); use --weights auto or copy"
        ) from None


def _reflink(source: Path, target: Path) -> bool:
    """Share the blocks of `source`, copy-on-write; return False if the file system cannot."""
    import reflink_copy

    try:
        reflink_copy.reflink(str(source), str(target))
    except OSError:
        target.unlink(missing_ok=True)
        return False
    target.chmod(0o644)
    return True


def copy_bytes(reader: FileIO, writer: FileIO, progress: Progress, limit: int = sys.maxsize) -> int:
    """Copy bytes from the position of one unbuffered file to that of another, and return how many.

    Args:
        reader: the source.
        writer: the target.
        progress: called with the number of bytes just copied.
        limit: how many to copy; fewer if the source ends before.
    """
    step = _kernel_copy if hasattr(os, "copy_file_range") else _plain_copy
    copied = 0
    while copied < limit:
        try:
            count = step(reader, writer, min(COPY_CHUNK_BYTES, limit - copied))
        except OSError as error:
            if step is _plain_copy or error.errno not in _NO_KERNEL_COPY:
                raise
            step = _plain_copy  # both files are at the position where the kernel stopped
            continue
        if not count:
            break
        copied += count
        progress(count)
    return copied


def _kernel_copy(reader: FileIO, writer: FileIO, size: int) -> int:
    return os.copy_file_range(reader.fileno(), writer.fileno(), size)


def _plain_copy(reader: FileIO, writer: FileIO, size: int) -> int:
    chunk = memoryview(reader.read(size))
    count = len(chunk)
    while chunk:
        chunk = chunk[writer.write(chunk) :]
    return count
