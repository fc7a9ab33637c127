"""Check the place of an output before any work is done for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from loopexport.errors import OutputError

from .staging import explain_os_errors

MAX_NAME_BYTES = 200  # file systems allow 255, and the temporary name is longer than the final one


def output_path(text: str | Path) -> Path:
    """The path that the user means: `~` is expanded, and `.` and `..` become names."""
    path = Path(os.path.expanduser(text))
    return path if path.name not in ("", "..") else Path(os.path.realpath(path))


def check_output(
    out: Path, source: Path, *, overwrite: bool = False, is_replaceable: Callable[[Path], bool] | None = None
) -> None:
    """Check that `out` can be written.

    Args:
        out: the directory to write.
        source: the directory it is made from, which must stay as it is.
        overwrite: whether an existing output may be replaced.
        is_replaceable: whether LoopExport wrote the directory at a path. None: never replace.

    Raises:
        OutputError: `out` cannot be written; the message says what to do.
    """
    if "\0" in str(out) or len(os.fsencode(out.name)) > MAX_NAME_BYTES:
        raise OutputError(f"the output's name {out.name!r} must have at most {MAX_NAME_BYTES} bytes, and no null byte")
    with explain_os_errors(out):
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


def check_space(out: Path, needed_bytes: int, *, remedy: str = "use --weights hardlink") -> None:
    """Check that the file system of `out` has room for `needed_bytes`.

    Args:
        out: the file or directory to write.
        needed_bytes: its size.
        remedy: what else helps.

    Raises:
        OutputError: there is too little space.
    """
    parent = next(path for path in out.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{parent} has {free_bytes:,} bytes free where {needed_bytes:,} are needed; "
            f"free some space, choose another disk, or {remedy}"
        )


def _check_place(out: Path, resolved: Path, source: Path) -> None:
    if resolved == source:
        raise OutputError(f"the output {out} is the model itself; choose another directory")
    if source in resolved.parents:
        raise OutputError(f"the output {out} lies inside the model {source}; choose a directory outside of it")
    if resolved in source.parents:
        raise OutputError(f"the output {out} contains the model {source}; choose another directory")
    if out.is_symlink():
        raise OutputError(f"the output {out} is a link; {_instead_of_link(resolved)}")
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {out} exists and is not a directory; choose another name or remove it")


def _instead_of_link(target: Path) -> str:
    """What to do about an output that is a link. A rename would replace the link and not its target."""
    if target.is_dir():
        return f"name the directory that it points to, {target}, or remove the link"
    return "it points to no directory; choose another name or remove the link"


def _check_writable(out: Path) -> None:
    parent = next(path for path in out.absolute().parents if os.path.lexists(path))
    as_we_run = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    if not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK | os.X_OK, **as_we_run):
        raise OutputError(f"cannot write into {parent}; choose another output or change its permissions")
