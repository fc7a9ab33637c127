"""What a trained model takes from the base that it was made from: a name, a licence, a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from loopexport.base import processor, tokenizer
from loopexport.base.checkpoint import CARD, CARRIED, CONFIG, LICENCE_TEXT, directory_name, file_names
from loopexport.base.download import is_directory, is_hub_id
from loopexport.errors import CheckpointError

from .directory import BASE_FOLDER, is_export
from .manifest import read_manifest
from .small_files import read_file


@dataclass(frozen=True)
class BaseFiles:
    """The base, by name, and what is known of its files.

    Attributes:
        name: a Hub id, or the name of a directory; never a path.
        folder: where its files are; None if they are not on this machine.
        card: its model card; empty if it is not known.
    """

    name: str
    folder: Path | None = None
    card: str = ""

    def missing(self, own: Collection[str]) -> dict[str, bytes]:
        """Contents of its tokenizer, processor and licence files, by name, of each kind that `own` lacks.

        Args:
            own: names of the files that the trained model has.
        """
        names = [name for name in file_names(self.folder) if CARRIED.fullmatch(name)] if self.folder else []
        wanted = [name for name in names if _is_tokenizer(name)] if not any(map(_is_tokenizer, own)) else []
        if not processor.has_processor(own):
            wanted += [name for name in names if name in processor.NAMES]
        if not any(map(LICENCE_TEXT.fullmatch, own)):
            wanted += filter(LICENCE_TEXT.fullmatch, names)
        return {name: read_file(self.folder / name) for name in wanted if self.folder}


def find_base_files(base: str | Path | None, root: Path, config: dict) -> BaseFiles:
    """The base of a trained model: a directory, an export, or a Hub id whose files may be in the Hub's cache.

    Args:
        base: as given; None takes the name from the config or the directory of the trained model.
        root: the directory of the trained model.
        config: its config.

    Raises:
        CheckpointError: there is no such base.
    """
    if base is None:
        loaded_from = config.get("_name_or_path")
        known = isinstance(loaded_from, str) and Path(loaded_from.replace("\\", "/")).name
        return BaseFiles(directory_name(Path(known) if known else root))
    folder = Path(os.path.expanduser(base))
    if is_directory(folder):
        is_ours = is_export(folder)
        name = read_manifest(folder).base.name if is_ours else directory_name(folder)
        return BaseFiles(name, folder, _card(folder / BASE_FOLDER if is_ours else folder))
    if not is_hub_id(str(base)):
        raise CheckpointError(f"--base {base} is neither a directory nor a Hub id such as org/name; give one of them")
    return _in_the_cache(str(base))


def _in_the_cache(repo_id: str) -> BaseFiles:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, CONFIG)
    if not isinstance(config, str):
        return BaseFiles(repo_id)
    folder = Path(config).parent
    return BaseFiles(repo_id, folder, _card(folder))


def _card(folder: Path) -> str:
    path = folder / CARD
    return read_file(path).decode("utf-8", errors="replace") if path.is_file() else ""


def _is_tokenizer(name: str) -> bool:
    return bool(tokenizer.FILES.fullmatch(name)) or "chat_template" in name
