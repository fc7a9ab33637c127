"""The base's tokenizer in an export: carried as it is, unless it needs code that came with the base.

Such code stays behind, always. What `tokenizer.json` describes can be loaded without it; anything else cannot, and then
the tokenizer is put out of reach in `base/`, because transformers would make a wrong one of its files without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

CONFIG = "tokenizer_config.json"
SERIALISED = "tokenizer.json"
FILES = re.compile(
    r"""
      (tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json
    | (tokenizer|sentencepiece|spiece)(\.bpe)?\.model | merges\.txt | vocab\.txt | [\w.-]+\.tiktoken | tiktoken\.model
    """,
    re.VERBOSE,
)


def foreign_class(config: bytes) -> str | None:
    """The class, as `module.Class`, of a tokenizer whose code came with the base; None for all others.

    Args:
        config: the content of its `tokenizer_config.json`; empty where it has none.
    """
    entry = _auto_map(config)
    entry = entry.get("AutoTokenizer") if isinstance(entry, dict) else entry
    names = [name for name in (entry if isinstance(entry, list) else [entry]) if isinstance(name, str)]
    return names[-1].rsplit("--", 1)[-1] if names else None


def without_foreign_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """Make the tokenizer in `files`, by name, stand without code of the base; returns the originals it replaces."""
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
        config = {"tokenizer_class": name}  # known to no transformers, so that loading it fails
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return originals


def is_left_out(config: bytes, names: Collection[str]) -> bool:
    """Whether an export goes without the tokenizer of a base that has files of these `names`."""
    return foreign_class(config) is not None and SERIALISED not in names


def notice(config: bytes, names: Collection[str], base_name: str) -> str | None:
    """What a user has to know of the tokenizer, if anything."""
    name = foreign_class(config)
    if name is None:
        return None
    if not is_left_out(config, names):
        return f"the base's tokenizer class {name} is left behind; tokenizer.json is read without it: compare some ids"
    return f"the tokenizer needs code of the base ({name}) and is left out: load it from {base_name}"


def _auto_map(config: bytes):
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return None
    return values.get("auto_map") if isinstance(values, dict) else None
