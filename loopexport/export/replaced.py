"""What is lost when a new export takes the place of an older one."""

from __future__ import annotations

from pathlib import Path

from loopexport.base.checkpoint import CARD, MANIFEST
from loopexport.errors import ExportError
from loopexport.files.digests import file_sha256

from .integrity import listed
from .manifest import read_manifest
from .results_file import RESULTS


def replacement_warnings(out: Path) -> list[str]:
    """One line about what somebody added to an export since it was converted, or edited; empty if there is nothing.

    Args:
        out: where the new export goes; it need not exist.
    """
    lost = _added(out) if out.is_dir() else []
    return [f"{out} loses what was added to it or edited since it was converted: {listed(tuple(lost))}"] if lost else []


def _added(root: Path) -> list[str]:
    try:
        manifest = read_manifest(root)
    except ExportError:
        return []
    written = {name.partition("/")[0] for name in (*manifest.files, *manifest.weights, MANIFEST)} - {RESULTS}
    added = sorted({path.name for path in root.iterdir()} - written)
    card, record = root / CARD, manifest.files.get(CARD)
    is_edited = record is not None and card.is_file() and file_sha256(card) != record.sha256
    return [*added, *([CARD] if is_edited else [])]
