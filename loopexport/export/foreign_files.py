"""Files in the directory of an export that are not part of it, and which of them a runtime would load."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loopexport.base.checkpoint import CARD, CARRIED, CONFIG, FOREIGN_WEIGHTS, INDEX
from loopexport.base.processor import FILES as PROCESSOR_FILES
from loopexport.base.tokenizer import FILES as TOKENIZER_FILES

from . import own_code
from .directory import BASE_FOLDER, Export
from .manifest import MANIFEST, Manifest
from .onnx_files import FILES as ONNX_FILES
from .results_file import RESULTS

# Names that LoopExport may write, besides code, weights and ONNX files. A new kind of file needs a line here and an
# entry in the manifest.
SMALL_FILES = (
    CARRIED,
    re.compile("|".join(map(re.escape, (CONFIG, CARD, INDEX, MANIFEST, RESULTS)))),
    re.compile(
        rf"{BASE_FOLDER}/({re.escape(CONFIG)}|{re.escape(CARD)}|{TOKENIZER_FILES.pattern}|{PROCESSOR_FILES.pattern})",
        re.VERBOSE,
    ),
)

# Folders of git, the Hub client and Python; no part of a model is there.
IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}

CODE = {".py", ".pyc", ".so", ".pyd", ".dll", ".sh"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz", ".msgpack"}
WEIGHTS = {".safetensors", ".ggml", ".ot", ".tensors", ".onnx", ".ort", *FOREIGN_WEIGHTS}
TEXT = {".jinja", ".model", ".spm", ".codes", ".tiktoken"}  # templates and vocabularies
LOADED_SUFFIXES = tuple(CODE | PICKLES | WEIGHTS | TEXT)

# Names that transformers, PEFT, vLLM, ONNX Runtime or llama.cpp look for, in lower case and without the folder.
LOADED_NAMES = re.compile(
    rf"""
      {TOKENIZER_FILES.pattern} | .*vocab.* | (emoji|params|modules)\.json | chat_template.*\.json
    | .*config.*\.json | .*\.index\.json | .*\.onnx[._]data.* | adapter_model\..*
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class ForeignFiles:
    """Names of the files that are not part of an export, sorted.

    Attributes:
        loaded: those that a runtime would load or run, by their names.
        links: symbolic links, unless the Hub's cache made them.
        others: all others, such as notes and pictures.
    """

    loaded: tuple[str, ...]
    links: tuple[str, ...]
    others: tuple[str, ...]


def foreign_files(export: Export) -> ForeignFiles:
    """List the whole directory of an export and find the files that its manifest does not have.

    A file that a runtime would load, and that LoopExport never writes, is foreign even if the manifest has it.
    """
    names = sorted(_names(export.root) - _own_names(export.manifest))
    loaded = tuple(name for name in names if is_loaded(name))
    links = tuple(name for name in names if name not in loaded and _is_own_link(export.root, name))
    return ForeignFiles(loaded, links, tuple(name for name in names if name not in {*loaded, *links}))


def is_loaded(name: str) -> bool:
    """Whether some runtime would load or run a file of this name, upper or lower case, if it were in an export."""
    last = PurePosixPath(name).name.casefold()
    return last.endswith(LOADED_SUFFIXES) or LOADED_NAMES.fullmatch(last) is not None


def is_small_file(name: str) -> bool:
    """Whether LoopExport may write a file of this name, besides weights and ONNX files."""
    return name in own_code.CODE_NAMES or any(pattern.fullmatch(name) for pattern in SMALL_FILES)


def _own_names(manifest: Manifest) -> set[str]:
    small = {name for name in manifest.files if is_small_file(name) or not is_loaded(name)}
    graphs = {name for name in manifest.onnx if ONNX_FILES.fullmatch(name)}
    return {MANIFEST, *small, *graphs, *manifest.weights}


def _names(root: Path) -> set[str]:
    """Names of all files in a directory and its folders, and of links to folders."""
    names = set()
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in {*IGNORED_FOLDERS, *links}]
        names |= {(here / name).relative_to(root).as_posix() for name in [*files, *links]}
    return names


def _is_own_link(root: Path, name: str) -> bool:
    """Whether a file is a symbolic link that the Hub's cache did not make: those lead from snapshots/ to blobs/."""
    path = Path(os.path.abspath(root), name)
    if not path.is_symlink():
        return False
    snapshots = path.parents[len(PurePosixPath(name).parts)]
    target = os.path.normpath(path.parent / os.readlink(path))
    return snapshots.name != "snapshots" or Path(target).parent != snapshots.parent / "blobs"
