"""Write the manifest of an export whose files changed, and its card again."""

from __future__ import annotations

from dataclasses import replace

from loopexport.base.checkpoint import CARD
from loopexport.files.digests import bytes_sha256
from loopexport.files.staged_files import StagedFiles

from .directory import Export
from .manifest import MANIFEST, FileRecord
from .small_files import export_card, is_card_edited


def write_card_and_manifest(export: Export, files: StagedFiles) -> bool:
    """Regenerate the card unless someone has edited it, and write the manifest.

    Args:
        export: the export as it will be, with its new manifest.
        files: the new files of its directory; these two are added.

    Returns:
        False if the card was edited, stays, and does not say what the export is now.
    """
    card, manifest = export_card(export).encode(), export.manifest
    stays = is_card_edited(export) and (export.root / CARD).read_bytes() != card  # equal if the last run stopped here
    if not stays:
        manifest = replace(manifest, files={**manifest.files, CARD: FileRecord(len(card), bytes_sha256(card))})
        files.write(CARD, card)
    files.write(MANIFEST, manifest.to_json().encode())
    return not stays
