"""What a comparison was computed with, and the directory that keeps its results."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from loopexport._version import __version__
from loopexport.base import tokenizer
from loopexport.base.checkpoint import Checkpoint, Shard
from loopexport.errors import EvaluationError, one_line
from loopexport.files.digests import file_sha256, file_xxh3
from loopexport.files.json_text import json_text
from loopexport.files.staged_files import exactly, staged_files
from loopexport.files.staging import explain_os_errors, lock, unlock

SETTINGS = "settings.json"
MODEL_FILES = re.compile(rf"(generation_)?config\.json|[\w.-]+\.(jinja|py)|{tokenizer.FILES.pattern}")
UNFINISHED = re.compile(r"\.settings\.json\.\w+\.partial")  # left by a run that was killed before its first answer
PACKAGES = {"lm_eval": "lm-eval", "torch": "torch", "transformers": "transformers", "vllm": "vllm"}


def versions(backend: str) -> dict[str, str]:
    """Versions of the packages that the scores depend on."""
    names = [name for name in PACKAGES if name != "vllm" or backend == "vllm"]
    return {"loopexport": __version__, **{name: _version(PACKAGES[name]) for name in names}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def weights_digest(shards: Sequence[Shard]) -> str:
    """One digest of all weights: sha256 of the shards' names and digests, where a shard's is its sha256 or XXH3."""
    with ThreadPoolExecutor(os.cpu_count()) as hashing:
        digests = list(hashing.map(lambda shard: shard.sha256 or file_xxh3(shard.path), shards))
    text = json.dumps(sorted(zip((shard.name for shard in shards), digests, strict=True)))
    return hashlib.sha256(text.encode()).hexdigest()


def files_digest(base: Checkpoint) -> str:
    """One digest of the small files that answers depend on: configs, tokenizer, chat templates, and code."""
    files = (path for path in sorted(base.root.iterdir()) if MODEL_FILES.fullmatch(path.name) and path.is_file())
    return hashlib.sha256(json.dumps({path.name: file_sha256(path) for path in files}).encode()).hexdigest()


def process_rank() -> int:
    """The number of this process, as `accelerate launch` sets it."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


@contextmanager
def results_directory(root: Path, settings: dict) -> Iterator[None]:
    """Keep a directory for the results of these settings, and for no other run, until the end of the block.

    Args:
        root: the directory; it is made if it does not exist.
        settings: what the results depend on, as JSON values.

    Raises:
        EvaluationError: another run uses it, it has results of other settings, or it has other files.
        OutputError: it cannot be written.
    """
    with explain_os_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    if process_rank() != 0:  # the first process looks after the directory
        yield
        return
    try:
        descriptor = lock(Path(os.path.realpath(root)))
    except BlockingIOError:
        raise EvaluationError(f"another run is writing into {root}; wait for it, or choose another --out") from None
    try:
        _claim(root, settings)
        yield
    finally:
        unlock(descriptor)


def check_directory(root: Path, settings: dict) -> None:
    """Raise EvaluationError if a directory has results of other settings, or other files; write nothing."""
    if process_rank() != 0:
        return
    earlier = read_settings(root)
    if earlier is None:
        with explain_os_errors(root):
            _check_new(root)
        return
    changed = _changed(earlier, json.loads(json_text(settings)))
    if changed:
        raise EvaluationError(
            f"{root} has results of other settings ({'; '.join(changed)}); choose another directory with --out"
        )


def _check_new(root: Path) -> None:
    if os.path.lexists(root) and not root.is_dir():
        raise EvaluationError(f"{root} is not a directory; choose another one with --out")
    if root.exists() and not all(UNFINISHED.fullmatch(path.name) for path in root.iterdir()):
        raise EvaluationError(f"{root} has other files than results; choose a new directory with --out")


def _claim(root: Path, settings: dict) -> None:
    check_directory(root, settings)
    if read_settings(root) is None:
        # `is_new`: this run holds the lock already. A run that is killed here leaves all of the file, or nothing.
        with staged_files(root, exactly(SETTINGS), SETTINGS, is_new=True) as files:
            files.write(SETTINGS, json_text(settings).encode())
            files.keep()


def read_settings(root: Path) -> dict | None:
    """The settings of the results in a directory; None if it has none."""
    path = root / SETTINGS
    try:
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"cannot read {path}: {one_line(error)}; choose another directory with --out") from None
    if not isinstance(values, dict):
        raise EvaluationError(f"{path} is not a JSON object; choose another directory with --out")
    return values


def _changed(earlier: dict, now: dict) -> list[str]:
    return [
        f"{name}: {json.dumps(earlier.get(name))}, now {json.dumps(now.get(name))}"
        for name in dict.fromkeys([*earlier, *now])
        if earlier.get(name) != now.get(name)
    ]
