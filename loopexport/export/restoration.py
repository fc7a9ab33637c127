"""Give the base back from an export, bit for bit."""

from __future__ import annotations

from pathlib import Path

from loopexport.base.checkpoint import CARD, Checkpoint, open_checkpoint
from loopexport.errors import ExportError
from loopexport.files.digests import Progress
from loopexport.files.placement import place, settle_method
from loopexport.files.staged_directory import check_output, check_space, output_path, staged
from loopexport.templates import FILES as TEMPLATES

from .directory import BASE_FOLDER, Export, open_export
from .integrity import check_files


def restore(
    root: str | Path, out: str | Path, *, weights: str = "auto", progress: Progress = lambda count: None
) -> Checkpoint:
    """Write the base that an export was made from, without what the export left behind.

    Args:
        root: the export.
        out: the directory to write; it must not exist.
        weights: how to put the weights in place, as for `convert`.
        progress: called with the number of bytes of weights just hashed or copied.

    Raises:
        ExportError: the export was changed since it was made.
        OutputError: the output cannot be written.
    """
    export, out = open_export(root), output_path(out)
    check_output(out, export.root)
    for full in (False, True):  # what is quickly told first
        changed = [check for check in check_files(export, full=full, progress=progress) if check.passed is False]
        if changed:
            raise ExportError(f"{export.root} cannot give its base back: {changed[0].detail}")
    with staged(out) as target:
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
    """The base's small files by name, and where the export keeps them."""
    ours = {CARD, *TEMPLATES, *export.manifest.added}
    prefix = f"{BASE_FOLDER}/"
    names = export.manifest.files
    files = {name: export.root / name for name in names if name not in ours and not name.startswith(prefix)}
    return files | {name.removeprefix(prefix): export.root / name for name in names if name.startswith(prefix)}
