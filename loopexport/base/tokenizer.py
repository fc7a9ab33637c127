"""The base's tokenizer in an export: copied unchanged, unless it needs code that came with the base.

An export never copies such code. With a `tokenizer.json`, the tokenizer loads without it. Otherwise its files move to
`base/`, where nothing loads them: from the same files transformers would silently build a wrong tokenizer.
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
    """The class, as `module.Class`, of a tokenizer that needs code of the base; None for any other tokenizer.

    Args:
        config: the content of `tokenizer_config.json`; empty if there is none.
    """
    entry = _auto_map(config)
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


def is_left_out(config: bytes, names: Collection[str]) -> bool:
    """Whether an export leaves the tokenizer out; `names` are the base's files."""
    return foreign_class(config) is not None and SERIALISED not in names


def tokenizer_warning(config: bytes, names: Collection[str], base_name: str) -> str | None:
    """What the user should know about the tokenizer, in one line; None if there is nothing to say."""
    name = foreign_class(config)
    if name is None:
        return None
    if not is_left_out(config, names):
        return f"the base's tokenizer class {name} is not copied; tokenizer.json loads without it: compare token ids"
    return f"the tokenizer needs code of the base ({name}) and is not copied: load it from {base_name}"


def _auto_map(config: bytes):
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return None
    return values.get("auto_map") if isinstance(values, dict) else None
