"""Write a directory all at once: into a temporary sibling, which gets the final name only when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopexport.errors import LoopExportError

from .staging import PARTIAL, REPLACED, explain_os_errors, lock, unlock, with_final_name

REMEDY = "free some space or use --weights hardlink"


@contextmanager
def staged_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory that becomes `out` if the block succeeds, and is removed if it fails.

    It first removes what killed runs with the same `out` left behind.

    Args:
        out: the final name.
        replace: replace the directory that is at `out` by then.

    Raises:
        OutputError: the file system refused.
    """
    with explain_os_errors(out, remedy=REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL, dir=out.parent))
    descriptor = lock(partial)
    try:
        with explain_os_errors(out, remedy=REMEDY):
            yield partial
            partial.chmod(0o755)
            _move_in(partial, out, replace)
    except LoopExportError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(with_final_name(out, str(error))) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        unlock(descriptor)


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
        if not path.name.startswith(f".{out.name}.") or not _is_directory(path):
            continue
        if path.name.endswith(REPLACED):
            if out.exists():
                shutil.rmtree(path)
            else:
                path.rename(out)  # killed between the two renames: the older output is still complete
        elif path.name.endswith(PARTIAL):
            _remove_unless_locked(path)


def _is_directory(path: Path) -> bool:
    """Whether a path is a directory, and no link to one: what it points to is not ours."""
    return path.is_dir() and not path.is_symlink()


def _remove_unless_locked(path: Path) -> None:
    with suppress(BlockingIOError):
        descriptor = lock(path)
        if descriptor is not None:
            shutil.rmtree(path)
            unlock(descriptor)
