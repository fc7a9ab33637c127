"""Check that the code in an export is LoopExport's own, of this version or an earlier one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from loopexport import templates
from loopexport.base import processor, tokenizer
from loopexport.base.checkpoint import CONFIG
from loopexport.files.digests import bytes_sha256, file_sha256
from loopexport.templates import FILES
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX

from .directory import MODEL_FILE_FIELD, Export, is_own_auto_map
from .earlier_code import EARLIER_SETS

CUSTOM_GENERATE = "custom_generate/generate.py"

# Names of all code files that any version wrote.
CODE_NAMES = tuple(dict.fromkeys([*FILES, *(name for digests in EARLIER_SETS for name in digests)]))


def template_bytes(name: str) -> bytes:
    """Content of one of the files in `templates.FILES`."""
    return (Path(templates.__file__).parent / name).read_bytes()


def code_digest() -> str:
    """The right value of `CODE_DIGEST` in configuration_looped.py: a digest of all other template files."""
    digest = hashlib.sha256()
    for name in FILES:
        if name != "configuration_looped.py":
            digest.update(name.encode() + b"\0" + template_bytes(name))
    return digest.hexdigest()[:16]


def todays_set() -> dict[str, str]:
    """The sha256 of each code file that `convert` writes today."""
    return {name: bytes_sha256(template_bytes(name)) for name in FILES}


def code_set(root: Path) -> dict[str, str] | None:
    """The code files in a directory with their sha256, if they are today's or an earlier set, whole and without more.

    Returns:
        None for any other code.
    """
    here = {name: sha256 for name in CODE_NAMES if (sha256 := _sha256(root / name)) is not None}
    return here if here in (todays_set(), *EARLIER_SETS) else None


def code_files(root: Path) -> tuple[str, ...]:
    """Names of the code files that an export must have: those of its set if the set is known, else today's."""
    return tuple(code_set(root) or FILES)


def foreign_code(export: Export) -> str | None:
    """The first file of an export that is foreign code, or asks for it; None if there is none.

    With `trust_remote_code=True`, transformers runs the code that `auto_map` names, and `custom_generate/generate.py`;
    mlx-lm runs the file that `model_file` names.
    """
    if code_set(export.root) is None:
        return _first_foreign(export.root)
    if os.path.lexists(export.root / CUSTOM_GENERATE):
        return CUSTOM_GENERATE
    family = str(export.config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX)
    if not is_own_auto_map(export.config.get("auto_map"), family):
        return f"the auto_map of {CONFIG}"
    if export.config.get(MODEL_FILE_FIELD) is not None and not export.runs_on_mlx:
        return f"the {MODEL_FILE_FIELD} of {CONFIG}"
    paths = (export.root / name for name in (tokenizer.CONFIG, *processor.NAMES))
    name = next((path.name for path in paths if path.is_file() and _asks_for_code(path)), None)
    return None if name is None else f"the auto_map of {name}"


def _asks_for_code(path: Path) -> bool:
    content = path.read_bytes()
    return tokenizer.foreign_class(content) is not None or bool(processor.foreign_classes({path.name: content}))


def _first_foreign(root: Path) -> str:
    """The first code file that differs from today's; the files are no known set."""
    todays = todays_set()
    differs = (name for name in CODE_NAMES if _sha256(root / name) != todays.get(name))
    return next(differs)


def _sha256(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
