"""Restore the base from an export, bit for bit."""

from __future__ import annotations

from pathlib import Path

from loopexport._keywords import suggest_keywords
from loopexport.base.checkpoint import CARD, Checkpoint, open_checkpoint
from loopexport.choices import Placement
from loopexport.errors import ExportError, OutputError
from loopexport.files.digests import Progress
from loopexport.files.output import check_output, check_space, output_path
from loopexport.files.placement import METHODS, place, settle_method
from loopexport.files.staged_directory import staged_directory

from .directory import BASE_FOLDER, Export, open_export
from .integrity import check_files
from .own_code import CODE_NAMES
from .results_file import RESULTS


@suggest_keywords
def restore(
    root: str | Path,
    out: str | Path,
    *,
    weights: Placement = "auto",
    progress: Progress = lambda count: None,
) -> Checkpoint:
    """Write the base of an export, without the files that `convert` left behind.

    For an adopted export, that is the native model with the trained weights. For an export with `text_only`, it is the
    language model alone.

    Args:
        root: the export.
        out: the directory to write; it must not exist.
        weights: how to put the weights in place; "auto" is a reflink where the file system can, else a copy.
        progress: called with the number of weight bytes just hashed or copied.

    Raises:
        ExportError: the export has changed since it was written.
        OutputError: the output cannot be written.
    """
    if weights not in METHODS:
        raise OutputError(f"weights method {weights!r} must be one of {', '.join(METHODS)}")
    export, out = open_export(root), output_path(out)
    check_output(out, export.root)
    for full in (False, True):  # the quick check first
        changed = [check for check in check_files(export, full=full, progress=progress) if check.passed is False]
        if changed:
            raise ExportError(f"{export.root} has changed, so its base cannot be restored: {changed[0].detail}")
    with staged_directory(out) as target:
        for name, source in _base_files(export).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(source.read_bytes())
        method = settle_method(weights, export.base.shards[0].path, target)
        if method == "copy":
            check_space(out, export.base.weight_bytes)
        for shard in export.base.shards:
            place(shard.path, target / shard.name, method, progress)
    return open_checkpoint(out, export.manifest.base)


def _base_files(export: Export) -> dict[str, Path]:
    """The base's small files by name, and their paths in the export."""
    ours = {CARD, RESULTS, *CODE_NAMES, *export.manifest.added}
    prefix = f"{BASE_FOLDER}/"
    names = export.manifest.files
    files = {name: export.root / name for name in names if name not in ours and not name.startswith(prefix)}
    return files | {name.removeprefix(prefix): export.root / name for name in names if name.startswith(prefix)}
