"""Digests of bytes and of files; each file is read once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from loopexport.errors import CheckpointError

HASH_CHUNK_BYTES = 2**20  # fits into the processor's cache

Progress = Callable[[int], object]


def bytes_sha256(content: bytes) -> str:
    """The sha256 of some bytes, as hex digits."""
    return hashlib.sha256(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    """The id that git, and the Hub for regular files, gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_sha256(path: Path, progress: Progress = lambda count: None) -> str:
    """The sha256 of a file's bytes, as hex digits."""
    digest = hashlib.sha256()
    _feed(path, [digest], progress)
    return digest.hexdigest()


def file_xxh3(path: Path, progress: Progress = lambda count: None) -> str:
    """The 128-bit XXH3 of a file's bytes, as hex digits: faster than copying; detects damage but not tampering."""
    import xxhash

    digest = xxhash.xxh3_128()
    _feed(path, [digest], progress)
    return digest.hexdigest()


def file_digests(path: Path, progress: Progress = lambda count: None) -> tuple[str, str]:
    """The sha256 and the 128-bit XXH3 of a file's bytes, in one pass."""
    import xxhash

    digests = hashlib.sha256(), xxhash.xxh3_128()
    _feed(path, digests, progress)
    return digests[0].hexdigest(), digests[1].hexdigest()


def _feed(path: Path, digests, progress: Progress) -> None:
    buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
    with open_to_read(path) as file:
        while count := file.readinto(buffer):
            for digest in digests:
                digest.update(buffer[:count])
            progress(count)


def open_to_read(path: Path) -> FileIO:
    """Open a file for reading; its own error tells an unreadable source from an unwritable target."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
