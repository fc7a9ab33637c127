"""Shared by staged directories and staged files: temporary names, and errors that name the final output."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopexport.errors import OutputError

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


def with_final_name(out: Path, text: str) -> str:
    """`text` with the temporary name of `out` replaced by its final name."""
    for parent in (out.parent.absolute(), out.parent):  # Python 3.12 gives temporary directories absolute paths
        temporary = re.escape(str(parent / f".{out.name}")) + r"(\.\w+)?" + re.escape(PARTIAL)
        text = re.sub(temporary, lambda match: str(out), text)
    return text
