"""What a trained model takes from the base that it was made from: a name, a licence, a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loopexport.base import processor, tokenizer
from loopexport.base.checkpoint import CARD, CARRIED, CONFIG, LICENCE_TEXT, directory_name, file_names, read_config
from loopexport.base.download import is_directory, is_hub_id
from loopexport.base.families import is_multimodal, layer_count, text_config
from loopexport.errors import CheckpointError
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX

from .directory import BASE_FOLDER, is_export
from .manifest import read_manifest
from .small_files import read_file

HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model")  # config keys; a model has one of them


@dataclass(frozen=True)
class BaseFiles:
    """The base, by name, and what is known of its files.

    Attributes:
        name: a Hub id, or the name of a directory; never a path.
        folder: where its files are; None if they are not on this machine.
        card: its model card; empty if it is not known.
        config: its config, an export's that of its base; empty if it is not known.
    """

    name: str
    folder: Path | None = None
    card: str = ""
    config: dict = field(default_factory=dict)

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
        CheckpointError: there is no such base, or the model was not made from it.
    """
    source = _named_base(base, root, config)
    if source.config:
        _check_made_from(str(base), source.config, root, config)
    return source


def _named_base(base: str | Path | None, root: Path, config: dict) -> BaseFiles:
    if base is None:
        loaded_from = config.get("_name_or_path")
        known = isinstance(loaded_from, str) and Path(loaded_from.replace("\\", "/")).name
        return BaseFiles(directory_name(Path(known) if known else root))
    folder = Path(os.path.expanduser(base))
    if is_directory(folder):
        is_ours = is_export(folder)
        name = read_manifest(folder).base.name if is_ours else directory_name(folder)
        originals = folder / BASE_FOLDER if is_ours else folder
        return BaseFiles(name, folder, _card(originals), _config(originals))
    if not is_hub_id(str(base)):
        raise CheckpointError(f"--base {base} is neither a directory nor a Hub id such as org/name; give one of them")
    return _in_the_cache(str(base))


def _in_the_cache(repo_id: str) -> BaseFiles:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, CONFIG)
    if isinstance(config, str):
        folder = Path(config).parent
        return BaseFiles(repo_id, folder, _card(folder), _config(folder))
    if "/" not in repo_id:  # far more often a misspelt directory than one of the few old Hub ids without an owner
        raise CheckpointError(
            f"--base {repo_id} is neither a directory nor a model in the Hub's cache; give a directory, or a Hub id "
            "such as org/name"
        )
    return BaseFiles(repo_id)


def _config(folder: Path) -> dict:
    return read_config(folder / CONFIG) if os.path.lexists(folder / CONFIG) else {}


def _check_made_from(base: str, theirs: dict, root: Path, ours: dict) -> None:
    """Compare what training keeps: another base would give its tokenizer, its name and its licence.

    Raises:
        CheckpointError: the configs differ in it.
    """
    difference = next(_differences(theirs, ours), None)
    if difference is not None:
        what, their, our = difference
        raise CheckpointError(
            f"--base {base} is not what {root} was made from: {what} is {their} there and {our} here; give the model "
            "that was trained"
        )
    their_tokens, tokens = _number(theirs, "vocab_size"), _number(ours, "vocab_size")
    # Training may add tokens. It may also cut the padding of the vocabulary, but nothing tells that from a tokenizer
    # with more tokens than the model, so a smaller vocabulary needs a tokenizer of its own.
    is_smaller = their_tokens is not None and tokens is not None and tokens < their_tokens
    if is_smaller and not any(map(_is_tokenizer, file_names(root))):
        raise CheckpointError(
            f"--base {base} has a vocabulary of {their_tokens} tokens and {root} one of {tokens}, which may be too few "
            "for the base's tokenizer; save the trained model's tokenizer there, or give the model that was trained"
        )


def _differences(theirs: dict, ours: dict) -> Iterator[tuple[str, object, object]]:
    """What differs between the configs of a base and of the trained model; a config may leave each of them out."""
    families, family = _families(theirs), _native_type(ours)
    if families and family not in families:
        yield "model_type", families[0], family
    layers = layer_count(theirs), layer_count(ours)
    sizes = (tuple(_number(config, key) for config in (theirs, ours)) for key in HIDDEN_SIZES)
    for what, (their, our) in (("the number of layers", layers), *(("the hidden size", size) for size in sizes)):
        if their is not None and our is not None and their != our:
            yield what, their, our


def _families(config: dict) -> list[str]:
    """The family of a base, and that of its language model, which `convert --text-only` takes out; empty if unknown."""
    text_type = text_config(config).get("model_type")
    if text_type is None or (is_multimodal(config) and text_config(config) is config):
        return []
    return [_native_type(config), str(text_type)]


def _native_type(config: dict) -> str:
    return str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX)


def _number(config: dict, key: str) -> int | None:
    value = text_config(config).get(key)
    return value if type(value) is int else None


def _card(folder: Path) -> str:
    path = folder / CARD
    return read_file(path).decode("utf-8", errors="replace") if path.is_file() else ""


def _is_tokenizer(name: str) -> bool:
    return bool(tokenizer.FILES.fullmatch(name)) or "chat_template" in name
