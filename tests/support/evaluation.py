"""Tiny bases with a tokenizer, and items for them."""

from __future__ import annotations

import json
from pathlib import Path

from .small_tokenizer import write_tokenizer
from .tiny import save_tiny

VOCAB = 300  # as many tokens as the small tokenizer has, at most
DIGITS = ("12345", "67890", "it", "isn't", "and", "is")


def tokenized_base(family: str, directory: Path, **overrides) -> Path:
    """Save a tiny base of a family, with a tokenizer."""
    save_tiny(family, directory, vocab_size=VOCAB, **overrides)
    write_tokenizer(directory, "PreTrainedTokenizerFast")
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "</s>"}))
    return directory


def write_items(path: Path, count: int, start: int = 0) -> Path:
    """Write different items with three choices each, of different lengths."""
    lines = [json.dumps(_item(number)) for number in range(start, start + count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _item(number: int) -> dict:
    words = [DIGITS[(number + shift) % len(DIGITS)] for shift in range(3)]
    return {"prompt": f"it is {number} " + "and it is " * (number % 4), "choices": words, "answer": number % 3}
