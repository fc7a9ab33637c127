"""Put new files in the place of older ones in a directory that is in use: all of them, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopexport.errors import OutputError

PARTIAL = ".partial"  # being written
REPLACED = ".replaced"  # an older file, kept until all new ones are in place


class Placing:
    """Files on their way into a directory. Until `keep` is called, all can be undone.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path):
        self._root = root
        self._partial: list[Path] = []
        self._moved: list[tuple[Path, bool]] = []  # and whether there was an older one
        self._kept = False

    def partial(self, name: str) -> Path:
        """Where to write the file of a name; whatever is there when the context ends is removed."""
        path = self._root / f".{name}{PARTIAL}"
        if path not in self._partial:
            self._partial.append(path)
        return path

    def move_in(self, name: str) -> None:
        """Give a file that was written its name; the older one of that name stays for the case that others fail."""
        path = self._root / name
        with written(path):
            _aside(path).unlink(missing_ok=True)  # of a run that was killed
            self._moved.append((path, path.exists()))
            if path.exists():
                _set_aside(path)
            self.partial(name).replace(path)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file and give it its name."""
        with written(self._root / name):
            self.partial(name).write_bytes(content)
        self.move_in(name)

    def keep(self) -> None:
        """Let what was moved in stay."""
        self._kept = True

    def end(self) -> None:
        """Remove what is not to stay, and put back what was there before unless the new files are kept."""
        for path in self._partial:
            path.unlink(missing_ok=True)
        for path, is_older in self._moved:
            if not self._kept and _aside(path).exists():
                _aside(path).replace(path)
            elif not self._kept and not is_older:
                path.unlink(missing_ok=True)
            _aside(path).unlink(missing_ok=True)  # also of one that was two names of a file, which replace leaves


@contextmanager
def placing(root: Path) -> Iterator[Placing]:
    """A `Placing` that ends with the block, however that ends."""
    files = Placing(root)
    try:
        yield files
    finally:
        files.end()


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Within it, what the file system refuses is told as an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{REPLACED}")


def _set_aside(path: Path) -> None:
    """Keep a file under another name; by its own too, where the file system can, so that it is never missing."""
    try:
        os.link(path, _aside(path), follow_symlinks=False)
    except (OSError, NotImplementedError):
        path.rename(_aside(path))
