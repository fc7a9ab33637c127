"""Check and arrange token ids and masks for a graph."""

from __future__ import annotations

import numpy as np

from loopexport.errors import OnnxError, OnnxInputError


def padded_left(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift the rows so that padding comes first: the next token then follows the last token of every row."""
    shifts = [int(np.argmax(row[::-1])) for row in mask]
    pairs = [(np.roll(row, by), np.roll(own, by)) for row, own, by in zip(ids, mask, shifts, strict=True)]
    return np.stack([row for row, _ in pairs]), np.stack([own for _, own in pairs])


def checked_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The attention mask as whole numbers of that shape; None masks nothing.

    Raises:
        OnnxInputError: the mask has another shape, or holds other values than 0 and 1.
    """
    if mask is None:
        return np.ones(shape, np.int64)
    if np.shape(mask) != shape:
        raise OnnxInputError(f"attention_mask {np.shape(mask)} must have the shape {shape}, cached tokens included")
    if not np.isin(mask, (0, 1)).all():
        raise OnnxInputError("attention_mask must hold 1, and 0 for padding")
    return np.asarray(mask).astype(np.int64)


def check_fused(mask: np.ndarray, past: int, length: int) -> None:
    """Check for inputs where GroupQueryAttention would silently compute something else.

    Args:
        mask: `(batch, past + length)`.
        past: the number of cached positions.
        length: the number of new tokens.

    Raises:
        OnnxError: the batch is padded, or several tokens follow a cache of several prompts.
    """
    if not mask.all():
        raise OnnxError("a graph with attention gqa takes no padded batch; use one with --attention portable")
    if len(mask) > 1 and past and length > 1:
        raise OnnxError(
            f"with a cache, a graph with attention gqa takes {length} tokens for a single prompt only, not for "
            f"{len(mask)}; run the prompts one by one, or use a graph with --attention portable"
        )
