"""Rows that are being generated: the prompts, then one token after another.

portable    padding comes first, so that all rows end at the same position
gqa         padding comes last: each row goes on at its own length, over its padding
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .cache import OnnxCache, Storage, room_for

if TYPE_CHECKING:
    from .model import OnnxModel


class PaddedRows:
    """Rows of a portable graph.

    Args:
        model: the graph.
        ids, mask: `(batch, seq)`, with padding on either side.
        chunk: the number of positions of a prompt to run at once; None chooses it.
    """

    def __init__(self, model: OnnxModel, ids: np.ndarray, mask: np.ndarray, chunk: int | None):
        self.model, self.chunk = model, chunk
        self.ids, self.mask = _padded_left(ids, mask)
        self._spare: Storage | None = None  # the storage before last, to be written again

    @property
    def length(self) -> int:
        """The number of positions so far."""
        return self.ids.shape[1]

    def run_all(self) -> np.ndarray:
        """Run all tokens on a new cache; the logits of the next tokens, `(batch, vocab)`."""
        batch, length = self.ids.shape
        self.cache = self.model.empty_cache(batch)
        for start, stop in self.model.cuts.parts(length, batch, self.chunk):
            logits = self._run(start, stop, length)
        return logits

    def run_next(self, tokens: np.ndarray, all_again: bool) -> np.ndarray:
        """Add a token to each row and run it, or all tokens again; the logits of the next tokens, `(batch, vocab)`."""
        self.ids = np.concatenate([self.ids, tokens[:, None]], axis=1)
        self.mask = np.concatenate([self.mask, np.ones_like(self.mask[:, :1])], axis=1)
        return self.run_all() if all_again else self._run(self.length - 1, self.length, self.length)

    def _run(self, start: int, stop: int, expected: int) -> np.ndarray:
        target, slots = self._spare, self.model.slots
        if target is None or target.room < stop:
            room = self.cache.storage.room
            target = slots.allocated(len(self.ids), room if room >= expected else room_for(expected, room))
        self._spare = self.cache.storage
        logits, self.cache = self.model.run(
            self.ids[:, start:stop], self.mask[:, :stop], self.cache, target=target, num_logits=1
        )
        return logits[:, -1]


class OwnLengthRows:
    """Rows of a gqa graph; the arguments and methods are those of `PaddedRows`."""

    def __init__(self, model: OnnxModel, ids: np.ndarray, mask: np.ndarray, chunk: int | None):
        self.model, self.chunk = model, chunk
        self.rows = [row[own.astype(bool)] for row, own in zip(ids, mask, strict=True)]

    @property
    def length(self) -> int:
        """The number of positions of the longest row so far."""
        return max(map(len, self.rows))

    def run_all(self) -> np.ndarray:
        """Run all tokens on a new cache; the logits of the next tokens, `(batch, vocab)`."""
        batch, length = len(self.rows), self.length
        self.cache = OnnxCache(self.model.slots.allocated(batch, room_for(length)), 0)
        parts = self.model.cuts.parts(length, batch, self.chunk)
        if batch == 1:
            return self._run_row(0, parts)
        if len(parts) == 1 or self.model.cuts.is_beyond_first(length):
            return self._run_together()
        # With a cache, the kernel takes several tokens of a single row only.
        logits = [self._run_row(row, self.model.cuts.parts(len(self.rows[row]), 1, self.chunk)) for row in range(batch)]
        self.cache = OnnxCache(self.cache.storage, length)
        self.cache.storage.filled = length
        return np.concatenate(logits)

    def run_next(self, tokens: np.ndarray, all_again: bool) -> np.ndarray:
        """Add a token to each row and run it, or all tokens again; the logits of the next tokens, `(batch, vocab)`."""
        self.rows = [np.append(row, token) for row, token in zip(self.rows, tokens, strict=True)]
        if all_again:
            return self.run_all()
        self.cache = self.model.slots.with_room(self.cache, self.length)
        ids, mask = np.array([row[-1:] for row in self.rows]), self._mask()
        lengths = mask.sum(-1, keepdims=True)
        logits, self.cache = self.model.run(
            ids, mask, self.cache, positions=lengths - 1, target=self.cache.storage, num_logits=1
        )
        return logits[:, -1]

    def _mask(self) -> np.ndarray:
        lengths = np.array([len(row) for row in self.rows])
        return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)

    def _run_together(self) -> np.ndarray:
        """Run all rows at once; what the padding adds to the cache is written over later."""
        mask = self._mask()
        ids, lengths = np.zeros_like(mask), mask.sum(-1)
        for row, tokens in enumerate(self.rows):
            ids[row, : len(tokens)] = tokens
        kept = int(lengths.max() - lengths.min()) + 1
        logits, self.cache = self.model.run(ids, mask, self.cache, target=self.cache.storage, num_logits=kept)
        return logits[np.arange(len(ids)), lengths - lengths.max() - 1]

    def _run_row(self, row: int, parts: list[tuple[int, int]]) -> np.ndarray:
        cache = self.cache
        for start, stop in parts:
            ids, mask = self.rows[row][None, start:stop], np.ones((1, stop), np.int64)
            logits, cache = self.model.run(ids, mask, cache, target=cache.storage, row=row, num_logits=1)
        if len(self.rows) == 1:
            self.cache = cache
        return logits[:, -1]


def _padded_left(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift the rows so that padding comes first: the next token then follows the last token of every row."""
    shifts = [int(np.argmax(row[::-1])) for row in mask]
    pairs = [(np.roll(row, by), np.roll(own, by)) for row, own, by in zip(ids, mask, shifts, strict=True)]
    return np.stack([row for row, _ in pairs]), np.stack([own for _, own in pairs])
