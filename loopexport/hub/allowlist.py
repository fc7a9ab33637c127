"""What of an export may leave the machine: files on an allow-list, unchanged, without secrets. Anything doubtful stops.

Four rules. A file leaves if its name is on the allow-list and the manifest lists it (licence texts may be added by
hand). Links, pickles, code that is not ours and files that are there to hold secrets stop the push wherever they are
in the directory, since someone may take them for part of the model. So do secrets and absolute paths within the files
that would leave. Everything else stays behind, and is named.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loopexport.base.checkpoint import CARD, CARRIED, CONFIG, INDEX, LICENCE_TEXT
from loopexport.base.tokenizer import FILES as TOKENIZER_FILES
from loopexport.errors import PushError
from loopexport.export.directory import BASE_FOLDER, Export
from loopexport.export.integrity import EDITABLE, check_config, check_onnx, check_small_files
from loopexport.export.manifest import MANIFEST
from loopexport.export.onnx_files import DATA_SUFFIX
from loopexport.export.onnx_files import FILES as ONNX_FILES
from loopexport.export.own_code import foreign_code
from loopexport.export.stale_graphs import stale_graphs
from loopexport.templates import FILES as TEMPLATES

# Names that may leave, beside those of the weights. A new kind of file needs a line here and a place in the manifest.
ALLOWED = (
    CARRIED,
    re.compile("|".join(map(re.escape, (CONFIG, CARD, INDEX, MANIFEST, *TEMPLATES)))),
    re.compile(f"{BASE_FOLDER}/({re.escape(CONFIG)}|{re.escape(CARD)}|{TOKENIZER_FILES.pattern})", re.VERBOSE),
)
LARGE_BYTES = 64 * 2**20

WEIGHTS_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")

# Tools keep their own things there, and never the model's.
IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}

CODE = {".py", ".pyc", ".so", ".pyd", ".dll", ".sh"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".msgpack"}
SECRET_NAME = re.compile(r"\.env(\..*)?|\.netrc|\.git-credentials|\.pypirc|id_(rsa|ed25519|ecdsa)|.*\.(pem|key|p12)")

SECRET = re.compile(
    rb"\b(hf_[A-Za-z0-9]{20,}|hf_oauth_[\w.-]{20,}|api_org_[A-Za-z]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|"
    rb"github_pat_\w{30,}|sk-(proj-|ant-)[\w-]{20,}|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# A value that begins as an absolute path does, on any system.
ABSOLUTE_PATH = re.compile(r"/[^/\s]+/|[A-Za-z]:[\\/]|~[\w.-]*/|\\\\\w|file:/")
# Vocabularies are neither config nor written by hand.
VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json", INDEX}


@dataclass(frozen=True)
class Outgoing:
    """What leaves.

    Attributes:
        files: content of all files but the weights and large ones, by name.
        large: names of files that are better sent from the disk: large ones of the base, which have the digests of the
            manifest, and the data of ONNX graphs, of which only the size was compared so far.
        staying: names of the files that stay behind, sorted.
    """

    files: dict[str, bytes]
    large: tuple[str, ...]
    staying: tuple[str, ...]


def collect(export: Export) -> Outgoing:
    """Check an export, all but the contents of its weights, and read the small files that may leave.

    Raises:
        PushError: it is not what was written, or holds something that must not leave; the message names the file.
    """
    names = sorted(_names(export))
    _check_unchanged(export)
    _check_onnx(export)
    leaving = [name for name in names if _may_leave(name, export)]
    large = tuple(name for name in leaving if _is_large(name, export))
    files = {name: (export.root / name).read_bytes() for name in leaving if name not in large}
    for name, content in files.items():
        _check_content(name, content, is_public=export.manifest.base.revision is not None)
    staying = tuple(name for name in names if name not in leaving and name not in export.manifest.weights)
    return Outgoing(files, large, staying)


def _names(export: Export) -> Iterator[str]:
    """Names of all files of the directory, each of which may be there."""
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
        raise PushError(f"{name} is a symbolic link, which could lead anywhere; replace it by the file, or remove it")
    if not path.is_file() and not path.is_dir():
        raise PushError(f"{name} is neither a file nor a directory; remove it")


def _check_name(name: str) -> None:
    last, suffix = name.rsplit("/", 1)[-1], Path(name).suffix.lower()
    if suffix in CODE and name not in TEMPLATES:
        raise PushError(f"{name} is code that LoopExport did not write; an export runs none, so move it elsewhere")
    if suffix in PICKLES:
        raise PushError(f"{name} may run code when it is loaded (a pickle); move it elsewhere")
    if SECRET_NAME.fullmatch(last.lower()):
        raise PushError(f"{name} looks like a file of secrets; move it elsewhere")


def _check_unchanged(export: Export) -> None:
    for check in (check_small_files(export), check_config(export)):
        if check.passed is False:
            raise PushError(f"{export.root} is not what was written: {check.detail}; convert the base again")
    name = foreign_code(export)
    if name is not None:
        raise PushError(f"{name} is not the installed LoopExport's; convert the base again with this version")
    for name in export.manifest.weights:
        if not WEIGHTS_NAME.fullmatch(name):
            raise PushError(f"{MANIFEST} names the weights {name!r}, which is no name of a weights file")


def _check_onnx(export: Export) -> None:
    again = f"`loopexport onnx {export.root}` makes the ONNX files anew"
    for name, record in export.manifest.onnx.items():
        if not ONNX_FILES.fullmatch(name):
            raise PushError(f"{MANIFEST} names the ONNX file {name!r}, which is no name of one; {again}")
        strange = {*(record.data or ())} - {*export.manifest.onnx, *export.manifest.weights}
        if strange:
            raise PushError(f"{name} reads {min(strange)}, which is no part of the export; {again}")
    check = check_onnx(export, needs_weights=False)
    if check.passed is False:
        raise PushError(f"{export.root} is not what was written: {check.detail}; {again}")
    stale = stale_graphs(export)
    if stale:
        raise PushError(stale)


def _may_leave(name: str, export: Export) -> bool:
    if LICENCE_TEXT.fullmatch(name):
        return True
    if ONNX_FILES.fullmatch(name):
        return name in export.manifest.onnx
    is_listed = name == MANIFEST or name in export.manifest.files
    return is_listed and any(pattern.fullmatch(name) for pattern in ALLOWED)


def _is_large(name: str, export: Export) -> bool:
    """Whether a file is too large to be text that somebody wrote, or holds weights."""
    if name in export.manifest.onnx:
        return name.endswith(DATA_SUFFIX) or export.manifest.onnx[name].size > LARGE_BYTES
    is_verified = name in export.manifest.files and name not in EDITABLE
    return is_verified and (export.root / name).stat().st_size > LARGE_BYTES


def _check_content(name: str, content: bytes, is_public: bool) -> None:
    """Check a file that would leave.

    Args:
        name, content: the file.
        is_public: the base came from the Hub, so what its files say is known already.
    """
    secret = SECRET.search(content)
    if secret:
        raise PushError(f"{name} holds what looks like a secret ({secret[0][:6].decode()}...); take it out")
    if not name.endswith(".json") or name in VOCABULARIES:
        return
    try:
        values = json.loads(content)
    except ValueError:
        raise PushError(f"{name} is not JSON; convert the base again") from None
    if isinstance(values, dict) and "auto_map" in values and name not in (CONFIG, f"{BASE_FOLDER}/{CONFIG}"):
        _check_auto_map(name)
    for value in _strings(values):
        if ABSOLUTE_PATH.match(value) and not (is_public and name != MANIFEST):
            raise PushError(
                f"{name} holds the absolute path {value[:80]!r}; take it out of the base's file and convert again"
            )


def _check_auto_map(name: str) -> None:
    if not name.startswith(f"{BASE_FOLDER}/"):  # originals are there to be restored; nothing loads them
        raise PushError(f"{name} asks for foreign code (auto_map); take that out of the base's file and convert again")


def _strings(value) -> Iterator[str]:
    """All strings in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
