"""Write a directory all at once: into a temporary sibling, renamed at the end, so that no half-made one ever shows."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loopexport.errors import LoopExportError, OutputError

try:
    import fcntl
except ImportError:  # Windows has no flock; there, leftovers of killed runs stay until removed by hand
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # being written, locked by its writer
REPLACED = ".replaced"  # an older output, out of the way while the new one moves in


MAX_NAME_BYTES = 200  # file systems take 255; names of what is being written are longer than that of the output


def output_path(text: str | Path) -> Path:
    """The path that a user means by `text`: `~` is expanded, and a directory that goes by `.` or `..` named."""
    path = Path(os.path.expanduser(text))
    return path if path.name not in ("", "..") else Path(os.path.realpath(path))


def check_output(
    out: Path, source: Path, *, overwrite: bool = False, is_replaceable: Callable[[Path], bool] | None = None
) -> None:
    """Check, before any work, that `out` can be written.

    Args:
        out: the directory to be made.
        source: the directory that it is made from, which must not be touched.
        overwrite: whether the user allows an existing output to be replaced.
        is_replaceable: tells whether what stands at a path is something that we wrote; None takes nothing for that.

    Raises:
        OutputError: it cannot; the message says what to do.
    """
    if "\0" in str(out) or len(os.fsencode(out.name)) > MAX_NAME_BYTES:
        raise OutputError(
            f"the output's name {out.name!r} must be of {MAX_NAME_BYTES} bytes at most, and none of them 0"
        )
    with _explained(out):
        _check_place(out, Path(os.path.realpath(out)), Path(os.path.realpath(source)))
        if out.is_dir() and any(out.iterdir()):
            if is_replaceable is None:
                raise OutputError(f"the output {out} exists; choose a new directory, or remove it first")
            if not is_replaceable(out):
                raise OutputError(f"the output {out} exists and is not a LoopExport export; choose another directory")
            if not overwrite:
                raise OutputError(
                    f"the output {out} exists; use --overwrite to replace it, or choose another directory"
                )
        _check_writable(out)


def _check_place(out: Path, resolved: Path, source: Path) -> None:
    if resolved == source:
        raise OutputError(f"the output {out} is the model itself; choose another directory")
    if source in resolved.parents:
        raise OutputError(f"the output {out} lies inside the model {source}; choose a directory outside of it")
    if resolved in source.parents:
        raise OutputError(f"the output {out} contains the model {source}; choose another directory")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"the output {out} exists and is not a directory; choose another name or remove it")


def _check_writable(out: Path) -> None:
    parent = next(path for path in out.absolute().parents if os.path.lexists(path))
    as_we_run = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    if not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK | os.X_OK, **as_we_run):
        raise OutputError(f"cannot write into {parent}; choose another output or change its permissions")


def check_space(out: Path, needed_bytes: int) -> None:
    """Check that the file system of `out` has room for `needed_bytes`.

    Raises:
        OutputError: it has not.
    """
    parent = next(path for path in out.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{parent} has {free_bytes:,} bytes free where {needed_bytes:,} are needed; "
            "free some, choose another disk, or use --weights hardlink"
        )


@contextmanager
def staged(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory that becomes `out` when the block ends well, and vanishes when it does not.

    With `replace`, it takes the place of what stands at `out` by then. Leftovers of killed runs with the same output
    are removed first.

    Raises:
        OutputError: the file system refuses.
    """
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL, dir=out.parent))
    lock = _lock(partial)
    try:
        with _explained(out):
            yield partial
            partial.chmod(0o755)
            _move_in(partial, out, replace)
    except LoopExportError as error:  # of whatever wrote into the directory under the name that it has meanwhile
        shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(_told_of(out, str(error))) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _move_in(partial: Path, out: Path, replace: bool) -> None:
    if not (replace and out.exists()):
        partial.rename(out)
        return
    replaced = partial.with_name(partial.name.removesuffix(PARTIAL) + REPLACED)
    out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced)


def _remove_leftovers(out: Path) -> None:
    for path in out.parent.iterdir():
        if not path.name.startswith(f".{out.name}."):
            continue
        if path.name.endswith(REPLACED):
            if out.exists():
                shutil.rmtree(path)
            else:
                path.rename(out)  # killed between the two renames: the older output is still whole
        elif path.name.endswith(PARTIAL) and fcntl is not None:
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path)
                os.close(lock)


def _lock(directory: Path) -> int | None:
    """An open descriptor that holds the directory's lock, or None where another process holds it."""
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"no space left for {out}; nothing was kept. Free some or use --weights hardlink"
            ) from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(
                f"the output {out} was made by someone else meanwhile; choose another directory"
            ) from None
        where = _told_of(out, str(error.filename or out))
        place = "" if where == str(out) else f" ({where})"
        raise OutputError(f"cannot write {out}: {error.strerror or error}{place}") from None


def _told_of(out: Path, text: str) -> str:
    """A text in which the directory that is being written goes by the name of the output that it becomes."""
    for parent in (out.parent.absolute(), out.parent):  # Python 3.12 makes temporary directories by absolute paths
        working = re.escape(str(parent / f".{out.name}.")) + r"\w+" + re.escape(PARTIAL)
        text = re.sub(working, lambda match: str(out), text)
    return text
