"""Which files of an export `push` uploads: allow-listed names, unchanged contents, no secrets.

1. `push` uploads a file if its name is on the allow-list and the manifest lists it. Licence texts need not be listed.
2. A link, a pickle, foreign code or a file made for secrets stops the push, wherever it is in the directory: somebody
   could take it for part of the model.
3. A secret or an absolute path inside a file to upload stops the push.
4. `push` leaves all other files on the machine and lists them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loopexport.base.checkpoint import CONFIG, INDEX, LICENCE_TEXT
from loopexport.base.tokenizer import JSON_VOCABULARIES
from loopexport.errors import PushError
from loopexport.export.directory import BASE_FOLDER, Export
from loopexport.export.foreign_files import CODE, IGNORED_FOLDERS, PICKLES, is_small_file
from loopexport.export.integrity import EDITABLE, check_config, check_onnx, check_small_files, onnx_remedy
from loopexport.export.manifest import MANIFEST
from loopexport.export.onnx_files import DATA_SUFFIX
from loopexport.export.onnx_files import FILES as ONNX_FILES
from loopexport.export.own_code import CODE_NAMES, foreign_code
from loopexport.export.results_file import RESULTS, remedy
from loopexport.export.stale_graphs import stale_graphs
from loopexport.files.json_text import values_of

LARGE_BYTES = 64 * 2**20

WEIGHTS_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")

SECRET_NAME = re.compile(r"\.env(\..*)?|\.netrc|\.git-credentials|\.pypirc|id_(rsa|ed25519|ecdsa)|.*\.(pem|key|p12)")

SECRET = re.compile(
    rb"\b(hf_[A-Za-z0-9]{20,}|hf_oauth_[\w.-]{20,}|api_org_[A-Za-z]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|"
    rb"github_pat_\w{30,}|sk-(proj-|ant-)[\w-]{20,}|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# The start of an absolute path, on any system, of a path in a home directory, or of a file URL.
ABSOLUTE_PATH = re.compile(r"/[^/\s]+/|[A-Za-z]:[\\/]|~[\w.-]*/|\\\\\w|file:/")
# Files with tokens or tensor names in them: what looks like a path there is not one.
NAMES_INSIDE = {*JSON_VOCABULARIES, "added_tokens.json", INDEX}


@dataclass(frozen=True)
class AllowedFiles:
    """The files of an export besides its weights: those that `push` uploads, and those that it does not.

    Attributes:
        small: contents of the small files, by name.
        large: names of files to upload from disk: large files of the base, whose digests equal the manifest's, and data
            files of ONNX graphs, of which only the size was compared so far.
        staying: names of the files that are not uploaded, sorted.
    """

    small: dict[str, bytes]
    large: tuple[str, ...]
    staying: tuple[str, ...]


def allowed_files(export: Export) -> AllowedFiles:
    """Check all files of an export except the contents of its weights, and read the small files to upload.

    Raises:
        PushError: a file has changed, or must not be uploaded; the message names the file and says what to do.
    """
    names = sorted(_names(export))
    _check_unchanged(export)
    _check_onnx(export)
    uploaded = [name for name in names if _is_allowed(name, export)]
    large = tuple(name for name in uploaded if _is_large(name, export))
    small = {name: (export.root / name).read_bytes() for name in uploaded if name not in large}
    for name, content in small.items():
        _check_content(export.root, name, content, is_public=export.manifest.base.revision is not None)
    staying = tuple(name for name in names if name not in uploaded and name not in export.manifest.weights)
    return AllowedFiles(small, large, staying)


def _names(export: Export) -> Iterator[str]:
    """Names of all files in the directory; raises PushError for one that must not be there."""
    for folder, folders, files in os.walk(export.root):
        here = Path(folder)
        for name in [*folders, *files]:
            _check_no_link(here / name, (here / name).relative_to(export.root).as_posix())
        folders[:] = [name for name in folders if name not in IGNORED_FOLDERS]
        for name in files:
            relative = (here / name).relative_to(export.root).as_posix()
            _check_name(relative)
            yield relative


def _check_no_link(path: Path, name: str) -> None:
    if path.is_symlink():
        raise PushError(f"{name} is a symbolic link, which may point anywhere; replace it with the file, or remove it")
    if not path.is_file() and not path.is_dir():
        raise PushError(f"{name} is neither a file nor a directory; remove it")


def _check_name(name: str) -> None:
    last, suffix = name.rsplit("/", 1)[-1], Path(name).suffix.lower()
    if suffix in CODE and name not in CODE_NAMES:
        raise PushError(f"{name} is code that LoopExport did not write; no export runs it, so move it elsewhere")
    if suffix in PICKLES:
        raise PushError(f"{name} may be a pickle, which can run code when it is loaded; move it elsewhere")
    if SECRET_NAME.fullmatch(last.lower()):
        raise PushError(f"{name} looks like a file with secrets; move it elsewhere")


def _check_unchanged(export: Export) -> None:
    for check in (check_small_files(export), check_config(export)):
        if check.passed is False:
            raise PushError(f"{export.root} has changed since it was written: {check.detail}; {export.manifest.remedy}")
    name = foreign_code(export)
    if name is not None:
        raise PushError(f"{name} is not the installed LoopExport's; convert the base again with this version")
    for name in export.manifest.weights:
        if not WEIGHTS_NAME.fullmatch(name):
            raise PushError(f"{MANIFEST} lists {name!r} as weights, which is not a .safetensors name; convert again")


def _check_onnx(export: Export) -> None:
    for name, record in export.manifest.onnx.items():
        if not ONNX_FILES.fullmatch(name):
            raise PushError(
                f"{MANIFEST} lists {name!r} as an ONNX file, which LoopExport never writes; do not trust this export"
            )
        strange = {*(record.data or ())} - {*export.manifest.onnx, *export.manifest.weights}
        if strange:
            raise PushError(
                f"{name} reads {min(strange)}, which is not part of the export; {onnx_remedy(export, name)}"
            )
    check = check_onnx(export, needs_weights=False)
    if check.passed is False:
        raise PushError(f"{export.root} has changed since its ONNX export: {check.detail}")
    stale = stale_graphs(export)
    if stale:
        raise PushError(stale)


def _is_allowed(name: str, export: Export) -> bool:
    if LICENCE_TEXT.fullmatch(name):
        return True
    if ONNX_FILES.fullmatch(name):
        return name in export.manifest.onnx
    is_listed = name == MANIFEST or name in export.manifest.files
    return is_listed and is_small_file(name)


def _is_large(name: str, export: Export) -> bool:
    """Whether to upload a file from disk: it holds ONNX weights, or is too large for text that somebody wrote."""
    if name in export.manifest.onnx:
        return name.endswith(DATA_SUFFIX) or export.manifest.onnx[name].size > LARGE_BYTES
    is_verified = name in export.manifest.files and name not in EDITABLE
    return is_verified and (export.root / name).stat().st_size > LARGE_BYTES


def _check_content(root: Path, name: str, content: bytes, is_public: bool) -> None:
    """Check the content of a file to upload.

    Args:
        root: the export.
        name: its name.
        content: its bytes.
        is_public: whether the base came from the Hub, so that paths in its files are public already.
    """
    secret = SECRET.search(content)
    if secret:
        raise PushError(f"{name} contains something like a secret ({secret[0][:6].decode()}...); remove it")
    if not name.endswith(".json") or name in NAMES_INSIDE:
        return
    try:
        values = json.loads(content)
    except ValueError:
        raise PushError(f"{name} is not JSON; convert the base again") from None
    if name not in (CONFIG, f"{BASE_FOLDER}/{CONFIG}") and list(values_of("auto_map", values)):
        _check_auto_map(name)
    for value in _strings(values):
        if ABSOLUTE_PATH.match(value) and not (is_public and name not in (MANIFEST, RESULTS)):
            raise PushError(f"{name} contains the absolute path {value[:80]!r}; {_path_remedy(name, root)}")


def _path_remedy(name: str, root: Path) -> str:
    return remedy(root) if name == RESULTS else "remove it from the base's file and convert again"


def _check_auto_map(name: str) -> None:
    if not name.startswith(f"{BASE_FOLDER}/"):  # nothing loads these originals; `restore` needs them
        raise PushError(f"{name} asks for foreign code (auto_map); remove that from the base's file and convert again")


def _strings(value) -> Iterator[str]:
    """All strings in a JSON value, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
