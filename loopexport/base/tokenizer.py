"""The base's tokenizer in an export: copied unchanged, unless it needs code that came with the base.

An export never copies such code. With a `tokenizer.json`, the tokenizer loads without it. Otherwise its files move to
`base/`, where nothing loads them: from the same files transformers would silently build a wrong tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Literal, TypeAlias

from loopexport.files.json_text import read_object

CONFIG = "tokenizer_config.json"
SERIALISED = "tokenizer.json"
SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json")

# The files that a tokenizer class reads: all of `vocab_files_names` in transformers 4.57 and 5.24, and some that other
# loaders look for. The pickles of transfo-xl, vocab.pkl and vocab.bin, are not here.
JSON_VOCABULARIES = (
    SERIALISED, "tekken.json", "vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "entity_vocab.json", "emoji.json", "byte_maps.json", "normalizer.json", "word_pronunciation.json",
    "word_shape.json", "artists.json", "genres.json", "lyrics.json",
)  # fmt: skip
VOCABULARIES = (
    *JSON_VOCABULARIES, "tokenizer.model", "tokenizer.bpe.model", "sentencepiece.model", "sentencepiece.bpe.model",
    "spiece.model", "spiece.bpe.model", "spm.model", "spm_char.model", "source.spm", "target.spm", "tiktoken.model",
    "prophetnet.tokenizer", "bpe.codes", "dict.txt", "merges.txt", "vocab.txt",
)  # fmt: skip
FILES = re.compile("|".join([*map(re.escape, (*SETTINGS, *VOCABULARIES)), r"[\w.-]+\.tiktoken"]))

CLASSES_WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "DiaTokenizer", "PerceiverTokenizer")

# Where the tokenizer of an export is: in it, with the base alone, or not even there.
Home: TypeAlias = Literal["export", "base", "nowhere"]


def foreign_class(config: bytes) -> str | None:
    """The class, as `module.Class`, of a tokenizer that needs code of the base; None for any other tokenizer.

    Args:
        config: the content of `tokenizer_config.json`; empty if there is none.
    """
    entry = read_object(config).get("auto_map")
    entry = entry.get("AutoTokenizer") if isinstance(entry, dict) else entry
    names = [name for name in (entry if isinstance(entry, list) else [entry]) if isinstance(name, str)]
    return names[-1].rsplit("--", 1)[-1] if names else None


def without_foreign_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """Edit `files`, contents by name, so that the tokenizer needs no code of the base; return the files it replaced."""
    name = foreign_class(files.get(CONFIG, b""))
    if name is None:
        return {}
    config = json.loads(files[CONFIG])
    if SERIALISED in files:
        originals = {CONFIG: files[CONFIG]}
        config = {key: value for key, value in config.items() if key != "auto_map"}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        originals = {each: files.pop(each) for each in list(files) if FILES.fullmatch(each)}
        config = {"tokenizer_class": name}  # transformers knows no such class, so loading fails with an error
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return originals


def tokenizer_home(config: bytes, names: Collection[str]) -> Home:
    """Where the tokenizer of an export is; `names` are the base's files."""
    if foreign_class(config) is not None:
        return "export" if SERIALISED in names else "base"
    has_one = any(FILES.fullmatch(name) and name not in SETTINGS for name in names)
    return (
        "export" if has_one or read_object(config).get("tokenizer_class") in CLASSES_WITHOUT_VOCABULARY else "nowhere"
    )


def tokenizer_warning(config: bytes, names: Collection[str], base_name: str, is_on_hub: bool) -> str | None:
    """What the user should know about the tokenizer, in one line; None if there is nothing to say."""
    name, home = foreign_class(config), tokenizer_home(config, names)
    if home == "nowhere":
        return _no_tokenizer(base_name, is_on_hub)
    if name is None:
        return None
    if home == "export":
        return f"the base's tokenizer class {name} is not copied; tokenizer.json loads without it: compare token ids"
    return f"the tokenizer needs code of the base ({name}) and is not copied: load it from {base_name}"


def _no_tokenizer(base_name: str, is_on_hub: bool) -> str:
    if not is_on_hub:
        return "the base's directory has no tokenizer, so the export has none: add its files there and convert again"
    return (
        f"no tokenizer of {base_name} was found, so the export has none: load it from {base_name}, or, if only the "
        "Hub's cache was searched, unset HF_HUB_OFFLINE and convert again"
    )
