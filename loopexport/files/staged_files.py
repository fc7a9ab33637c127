"""Replace files in a directory that is in use: all of them, or none.

The directory may be a stranger's. Every temporary file is created under a new, random name, so that no link that lies
there decides what is written.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopexport.errors import OutputError

from .staging import PARTIAL, REPLACED, explain_os_errors, lock, unlock


class StagedFiles:
    """New files for a directory. Everything can be undone until `keep` is called.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path):
        self._root = root
        self._partial: dict[str, Path] = {}  # by final name
        self._moved: list[tuple[Path, bool]] = []  # the path, and whether it replaced an older file
        self._folders: list[Path] = []  # made for the new files
        self._kept = False

    def partial(self, name: str) -> Path:
        """The temporary path to write a file to; an empty file is there. `end` removes whatever is still there.

        Args:
            name: the file's name, with at most one folder, which is made if it is missing.

        Raises:
            OutputError: the folder is a link, or the file system refused.
        """
        if name not in self._partial:
            final = self._root / name
            with explain_os_errors(final):
                self._make_folder(final.parent)
                descriptor, path = tempfile.mkstemp(prefix=f".{final.name}.", suffix=PARTIAL, dir=final.parent)
                os.close(descriptor)
            self._partial[name] = Path(path)
        return self._partial[name]

    def _make_folder(self, folder: Path) -> None:
        if folder != self._root and folder.is_symlink():
            raise OutputError(f"cannot write into {folder}: it is a symbolic link; replace it with a directory")
        if not folder.exists():
            folder.mkdir()
            self._folders.append(folder)

    def move_in(self, name: str) -> None:
        """Give a written file its final name, and keep the older file of that name until `end`.

        Raises:
            OutputError: a directory has that name, or the file system refused.
        """
        path, partial = self._root / name, self.partial(name)
        if path.is_dir() and not path.is_symlink():
            raise OutputError(f"cannot write {path}: it is a directory; move it elsewhere")
        with explain_os_errors(path):
            partial.chmod(0o644)
            _replaced(path).unlink(missing_ok=True)  # left by a killed run
            is_older = os.path.lexists(path)
            self._moved.append((path, is_older))
            if is_older:
                _set_aside(path)
            partial.replace(path)
            del self._partial[name]

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
        for path in self._partial.values():
            path.unlink(missing_ok=True)
        # Whenever this is killed, `_put_right` must find the last file in place for as long as the others are.
        for path, is_older in self._moved if self._kept else reversed(self._moved):
            if not self._kept and os.path.lexists(_replaced(path)):
                _replaced(path).replace(path)
            elif not self._kept and not is_older:
                path.unlink(missing_ok=True)
            _replaced(path).unlink(missing_ok=True)  # `replace` leaves it where both names are one file
        for folder in [] if self._kept else self._folders:
            folder.rmdir()


def exactly(*names: str) -> re.Pattern:
    """The pattern of these names alone, for `staged_files`."""
    return re.compile("|".join(map(re.escape, names)))


@contextmanager
def staged_files(root: Path, names: re.Pattern, last: str, *, is_new: bool = False) -> Iterator[StagedFiles]:
    """`StagedFiles` for a directory; the end of the block, successful or not, calls `end`.

    It first puts right what killed runs left behind.

    Args:
        root: the directory.
        names: which names the files may have.
        last: the file that is moved in last, which makes the others valid.
        is_new: whether this run has just made the directory, so that no other run knows it.

    Raises:
        OutputError: another run is writing into the directory.
    """
    descriptor = None if is_new else _lock_for_writing(root)
    files = StagedFiles(root)
    try:
        with explain_os_errors(root):
            _put_right(root, names, last)
        yield files
    finally:
        files.end()
        unlock(descriptor)


def _lock_for_writing(root: Path) -> int | None:
    try:
        return lock(Path(os.path.realpath(root)))
    except BlockingIOError:
        raise OutputError(f"another run is writing into {root}; wait until it has ended") from None


def _put_right(root: Path, names: re.Pattern, last: str) -> None:
    """Remove the temporary files of a killed run, and undo what it moved in unless it came as far as its last file."""
    is_complete = _is_moved_in(root / last)
    kinds = "|".join(map(re.escape, (PARTIAL, REPLACED)))
    temporary = re.compile(rf"(?P<name>{names.pattern})(\.\w+)?(?P<kind>{kinds})")
    for path in [*root.glob(".*"), *root.glob("*/.*")]:
        folder = path.relative_to(root).parent
        match = temporary.fullmatch((folder / path.name[1:]).as_posix())
        if match is None or (root / folder).is_symlink() or not (path.is_symlink() or path.is_file()):
            continue
        if match["kind"] == REPLACED and not path.is_symlink() and not is_complete:
            path.replace(root / match["name"])
        path.unlink(missing_ok=True)  # `replace` leaves it where both names are one file


def _is_moved_in(path: Path) -> bool:
    """Whether a killed run has put a new file in the place of an older one, which it kept under its second name."""
    try:
        return not os.path.samestat(path.lstat(), _replaced(path).lstat())
    except FileNotFoundError:
        return False


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}{REPLACED}")


def _set_aside(path: Path) -> None:
    """Keep a file under a second name. Use a hard link where possible, so that the first name is never missing."""
    try:
        os.link(path, _replaced(path), follow_symlinks=False)
    except (OSError, NotImplementedError):
        path.rename(_replaced(path))
