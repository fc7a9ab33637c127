"""Text in pieces while its tokens come: the pieces joined are the text of all tokens.

A tokenizer may change the end of a text when more tokens come. What can still change is held back:

- the first bytes of a character that is not complete;
- a run of byte tokens such as `<0xE6>`, which are decoded together: one that is no character spoils all;
- with `clean_up_tokenization_spaces`, spaces before punctuation, and the words that lose the space before them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# The end of a text that clean-up may change: all beginnings of " .", " ' ", " n't", " 've", " 're" and so on, in a row,
# because what one replacement leaves may belong to the next.
_UNCLEAN_END = re.compile(r"[ 'nrv]*\Z")


class StreamedText:
    """The text of the tokens so far.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_final = 0  # tokens before a run of byte tokens
        self._num_shown = 0  # characters
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._name: Callable[[int], Any] = getattr(tokenizer, "convert_ids_to_tokens", lambda token: None)
        self._is_cleaned = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def add(self, token: int) -> str:
        """Add a token; the text that follows what was returned before, without what can still change."""
        self._tokens.append(token)
        if not (token in self._special or _BYTE_TOKEN.fullmatch(str(self._name(token)))):
            self._num_final = len(self._tokens)
        text = self._decoded(self._tokens[: self._num_final]).rstrip("\ufffd")
        if self._is_cleaned:
            text = _UNCLEAN_END.sub("", text)
        return self._shown(text)

    def end(self) -> str:
        """The text that was held back."""
        return self._shown(self._decoded(self._tokens))

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _shown(self, text: str) -> str:
        piece = text[self._num_shown :]
        self._num_shown += len(piece)
        return piece
