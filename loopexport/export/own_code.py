"""Check that the code in an export is LoopExport's own, of this version or an earlier one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from loopexport import templates
from loopexport.base import tokenizer
from loopexport.base.checkpoint import CONFIG
from loopexport.files.digests import file_sha256
from loopexport.templates import FILES
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX, auto_map

from .directory import Export

CUSTOM_GENERATE = "custom_generate/generate.py"

# Code files that earlier versions wrote, with their sha256. An export keeps the code that it was made with, and that
# code stays valid. Whenever the templates change after a release, add the released set here.
EARLIER_SETS = (
    {
        "configuration_looped.py": "b521683be2b846de60527ca56b2f3228f6aa5fb9a55e51ce2dafe098f28cf6ff",
        "modeling_looped.py": "7d9ec7e9f445930d0e82f3d3bec0152290f26f9da49471f0c626cb7e133e671c",
    },
)


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


def code_files(root: Path) -> tuple[str, ...]:
    """Names of the code files that an export must have: an earlier set if it has one, else today's."""
    earlier = (tuple(digests) for digests in EARLIER_SETS if _holds(root, digests))
    return next(earlier, FILES)


def foreign_code(export: Export) -> str | None:
    """The first file of an export that is foreign code, or asks for it; None if there is none.

    With `trust_remote_code=True`, transformers runs the code that `auto_map` names, and `custom_generate/generate.py`.
    """
    names = code_files(export.root)
    for name in names if names == FILES else ():
        path = export.root / name
        if not path.is_file() or path.read_bytes() != template_bytes(name):
            return name
    if os.path.lexists(export.root / CUSTOM_GENERATE):
        return CUSTOM_GENERATE
    family = str(export.config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX)
    if export.config.get("auto_map") != auto_map(family):
        return f"the auto_map of {CONFIG}"
    path = export.root / tokenizer.CONFIG
    if path.is_file() and tokenizer.foreign_class(path.read_bytes()) is not None:
        return f"the auto_map of {tokenizer.CONFIG}"
    return None


def _holds(root: Path, digests: dict[str, str]) -> bool:
    return all((root / name).is_file() and file_sha256(root / name) == sha256 for name, sha256 in digests.items())
