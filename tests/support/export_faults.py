"""Deliberate faults in the code of an export, recorded as genuine: only the checks of the model can catch them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import loopexport
from loopexport.templates import FILES
from loopexport.templates.configuration_looped import CODE_DIGEST

from .commands import sha256
from .push import edit_manifest

CONFIGURATION = "configuration_looped.py"


@dataclass(frozen=True)
class Fault:
    """A fault in a template file.

    Attributes:
        file: the name of the file.
        old: text in the file.
        new: the wrong text.
        spec: the loop that shows it.
    """

    file: str
    old: str
    new: str
    spec: dict = field(default_factory=dict)


def record(root, *names):
    """Record files in the manifest as they are now."""
    digests = {name: {"size": (root / name).stat().st_size, "sha256": sha256(root / name)} for name in names}
    edit_manifest(root, lambda values: values["files"].update(digests))


def mutate(root, fault: Fault):
    """Edit a template file in an export, and record it as genuine."""
    path = root / fault.file
    assert path.read_text().count(fault.old) == 1, f"{fault.file} has no or several {fault.old!r}"
    path.write_text(path.read_text().replace(fault.old, fault.new))
    path = root / CONFIGURATION
    path.write_text(path.read_text().replace(CODE_DIGEST, sha256(root / fault.file)[:16]))
    record(root, *FILES)


def failures_of(export: Path, fault: Fault, root: Path) -> list[str]:
    """The names of the checks that fail on a copy with a fault.

    Args:
        export: the export.
        fault: the fault.
        root: where the copy goes; each needs a name of its own, since transformers caches code by that name.
    """
    mutate(shutil.copytree(export, root), fault)
    return [check.name for check in loopexport.verify(root, trust_remote_code=True) if check.passed is False]
