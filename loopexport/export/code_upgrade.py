"""Plan which code files of an export to replace by today's, and replace them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from loopexport._keywords import suggest_keywords
from loopexport._version import __version__
from loopexport.base.checkpoint import CARD, CONFIG
from loopexport.errors import ExportError
from loopexport.files.digests import bytes_sha256
from loopexport.files.staged_files import exactly, staged_files
from loopexport.templates.configuration_looped import auto_map, base_model_type

from .card_refresh import write_card_and_manifest
from .directory import Export, open_export
from .integrity import check_files
from .manifest import MANIFEST, FileRecord
from .own_code import code_set, foreign_code, template_bytes, todays_set


@dataclass(frozen=True)
class UpgradePlan:
    """Which code files of an export change; nothing is written yet.

    Attributes:
        export: the export.
        added, replaced, removed: names of code files.
    """

    export: Export
    added: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def is_current(self) -> bool:
        """Whether the export has today's code already."""
        return not (self.added or self.replaced or self.removed)

    def to_dict(self) -> dict:
        """The plan for `--json`."""
        return {
            "directory": str(self.export.root),
            "is_current": self.is_current,
            "from_version": self.export.manifest.loopexport,
            "to_version": __version__,
            "added": list(self.added),
            "replaced": list(self.replaced),
            "removed": list(self.removed),
        }


@suggest_keywords
def plan_upgrade(root: str | Path) -> UpgradePlan:
    """Decide which code files `upgrade` changes. Writes nothing and loads no model.

    Args:
        root: the export.

    Raises:
        ExportError: `root` is not an intact export, holds foreign code, or has no weights to try new code with.
    """
    export = open_export(root)
    before, after = code_set(export.root), todays_set()
    foreign = foreign_code(export)
    if before is None or foreign is not None:
        raise ExportError(
            f"{foreign} in {export.root} was not written by this or an earlier LoopExport, and `upgrade` neither runs "
            "nor replaces other code; convert the base again"
        )
    if before == after:
        return UpgradePlan(export)
    _check_intact(export)
    return UpgradePlan(
        export,
        added=tuple(sorted(after.keys() - before.keys())),
        replaced=tuple(sorted(name for name in after.keys() & before.keys() if after[name] != before[name])),
        removed=tuple(sorted(before.keys() - after.keys())),
    )


def write_code(plan: UpgradePlan) -> bool:
    """Replace the code files, and write manifest and card again. All files change, or none.

    Returns:
        False if the card was edited and stays.

    Raises:
        OutputError: the directory cannot be written.
    """
    export, new = plan.export, {name: template_bytes(name) for name in (*plan.added, *plan.replaced)}
    new[CONFIG] = _with_todays_classes(export.config)
    records = {name: record for name, record in export.manifest.files.items() if name not in plan.removed}
    records |= {name: FileRecord(len(content), bytes_sha256(content)) for name, content in new.items()}
    manifest = replace(export.manifest, loopexport=__version__, files=records)
    names = exactly(*plan.removed, *new, CARD, MANIFEST)
    with staged_files(export.root, names, last=MANIFEST) as staged:
        for name in plan.removed:
            staged.remove(name)
        for name, content in new.items():
            staged.write(name, content)
        is_card_new = write_card_and_manifest(replace(export, manifest=manifest), staged)
        staged.keep()
    return is_card_new


def _with_todays_classes(config: dict) -> bytes:
    """The `config.json` with all classes of today's code in its `auto_map`, in ASCII as `convert` writes it."""
    family = base_model_type(config["model_type"])
    return (json.dumps({**config, "auto_map": auto_map(family)}, indent=2) + "\n").encode()


def _check_intact(export: Export) -> None:
    if export.lacking:
        raise ExportError(
            f"{export.lacking[0]} is not in {export.root}, and `upgrade` tries new code with the weights first; "
            "convert the base again"
        )
    failed = next((check for check in check_files(export) if check.passed is False), None)
    if failed is not None:
        raise ExportError(f"{export.root} has changed since it was written: {failed.detail}; {export.manifest.remedy}")
