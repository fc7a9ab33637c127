"""Replace files in a directory that is in use: all of them, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .staging import PARTIAL, REPLACED, explain_os_errors


class StagedFiles:
    """New files for a directory. Everything can be undone until `keep` is called.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path):
        self._root = root
        self._partial: list[Path] = []
        self._moved: list[tuple[Path, bool]] = []  # the path, and whether it replaced an older file
        self._folders: list[Path] = []  # made for the new files
        self._kept = False

    def partial(self, name: str) -> Path:
        """The temporary path to write a file to. `end` removes whatever is still there."""
        final = self._root / name
        path = final.with_name(f".{final.name}{PARTIAL}")
        if not path.parent.exists():
            path.parent.mkdir()
            self._folders.append(path.parent)
        if path not in self._partial:
            self._partial.append(path)
        return path

    def move_in(self, name: str) -> None:
        """Give a written file its final name, and keep the older file of that name until `end`."""
        path = self._root / name
        with explain_os_errors(path):
            _replaced(path).unlink(missing_ok=True)  # left by a killed run
            self._moved.append((path, path.exists()))
            if path.exists():
                _set_aside(path)
            self.partial(name).replace(path)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file and give it its final name."""
        with explain_os_errors(self._root / name):
            self.partial(name).write_bytes(content)
        self.move_in(name)

    def remove(self, name: str) -> None:
        """Remove a file, and keep it under another name until `end`."""
        path = self._root / name
        with explain_os_errors(path):
            _replaced(path).unlink(missing_ok=True)
            self._moved.append((path, True))
            _set_aside(path)
            path.unlink(missing_ok=True)

    def keep(self) -> None:
        """Keep the new files."""
        self._kept = True

    def end(self) -> None:
        """Remove temporary files and, unless the new files are kept, put the older ones back."""
        for path in self._partial:
            path.unlink(missing_ok=True)
        for path, is_older in self._moved:
            if not self._kept and _replaced(path).exists():
                _replaced(path).replace(path)
            elif not self._kept and not is_older:
                path.unlink(missing_ok=True)
            _replaced(path).unlink(missing_ok=True)  # `replace` leaves it where both names are one file
        for folder in [] if self._kept else self._folders:
            folder.rmdir()


@contextmanager
def staged_files(root: Path) -> Iterator[StagedFiles]:
    """`StagedFiles` for a directory; the end of the block, successful or not, calls `end`."""
    files = StagedFiles(root)
    try:
        yield files
    finally:
        files.end()


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}{REPLACED}")


def _set_aside(path: Path) -> None:
    """Keep a file under a second name. Use a hard link where possible, so that the first name is never missing."""
    try:
        os.link(path, _replaced(path), follow_symlinks=False)
    except (OSError, NotImplementedError):
        path.rename(_replaced(path))
