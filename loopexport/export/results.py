"""Save measured results in an export, and say them on its card."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from loopexport.base.checkpoint import CARD
from loopexport.errors import ExportError
from loopexport.files.digests import bytes_sha256
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import exactly, staged_files

from .card_refresh import write_card_and_manifest
from .directory import Export, open_export
from .manifest import MANIFEST, FileRecord
from .results_file import FORMAT, RESULTS, RecordedResult, measured, parse_result


def save_results(root: str | Path, result: dict) -> bool:
    """Add a result to `loop_results.json` of an export, and write card and manifest again. All change, or none.

    It replaces an earlier result of the same loop, tasks and settings.

    Args:
        root: the export.
        result: one entry of the file, measured with this export; its `weights` are filled in here.

    Returns:
        False if the card was edited, stays, and does not show the result.

    Raises:
        ExportError: the result or the export is damaged, or another file has that name.
        OutputError: the directory cannot be written.
    """
    root = open_export(root).root
    with staged_files(root, exactly(RESULTS, CARD, MANIFEST), last=MANIFEST) as staged:
        export = open_export(root)
        content = _content([*_earlier(export), _parsed(result, export)])
        files = {**export.manifest.files, RESULTS: FileRecord(len(content), bytes_sha256(content))}
        staged.write(RESULTS, content)
        new = replace(export, manifest=replace(export.manifest, files=files))
        is_card_new = write_card_and_manifest(new, staged)
        staged.keep()
    return is_card_new


def _parsed(result: dict, export: Export) -> RecordedResult:
    try:
        return parse_result({**result, "weights": export.manifest.weights_digest})
    except ValueError as error:
        raise ExportError(f"cannot save this result in {export.root}: {error}") from None


def _earlier(export: Export) -> list[RecordedResult]:
    if RESULTS not in export.manifest.files and os.path.lexists(export.root / RESULTS):
        raise ExportError(f"{export.root / RESULTS} is not part of the export; move it elsewhere")
    earlier = measured(export)
    return [*earlier.own, *earlier.other]


def _content(results: list[RecordedResult]) -> bytes:
    """The text of the file, with the last of the results that have one key, in order of their dates."""
    kept = [each for i, each in enumerate(results) if all(each.key != later.key for later in results[i + 1 :])]
    kept.sort(key=lambda each: each.date)
    return json_text({"format": FORMAT, "results": [each.to_dict() for each in kept]}).encode()
