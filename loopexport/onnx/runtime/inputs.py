"""Check and arrange token ids and masks for a graph."""

from __future__ import annotations

import numpy as np

from loopexport.errors import OnnxError, OnnxInputError

from .cache import OnnxCache


def checked_ids(input_ids: np.ndarray, vocab_size: int | None) -> np.ndarray:
    """Token ids as whole numbers of 64 bits.

    Raises:
        OnnxInputError: they have another shape than `(batch, seq)`, or are not in the vocabulary.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise OnnxInputError(f"input_ids of shape {ids.shape} must be whole numbers (batch, seq), both sizes 1 or more")
    wrong = ids[(ids < 0) | (ids >= (vocab_size or np.inf))]
    if wrong.size:
        count = vocab_size or "unknown"
        raise OnnxInputError(f"token id {wrong[0]} is not in the model's vocabulary of {count} tokens")
    return np.ascontiguousarray(ids, dtype=np.int64)


def check_cache(cache: OnnxCache, layout: tuple, batch: int) -> None:
    """Check that a cache fits the layout of the graph's cache inputs and the batch.

    Raises:
        OnnxInputError: it does not.
    """
    if cache.storage.layout != layout:
        raise OnnxInputError(
            "the cache belongs to another graph: the number, shape, type or layout of its tensors differs; use a cache "
            "of this graph, or None"
        )
    cached = cache.storage.batch
    if cached != batch:
        raise OnnxInputError(
            f"the cache has a batch of {cached}, but input_ids has a batch of {batch}; they must be equal"
        )


def check_positions(length: int, limit: int | None) -> None:
    """Check that the model has positions for that many tokens; None is no limit.

    Raises:
        OnnxInputError: it does not.
    """
    if limit is not None and length > limit:
        raise OnnxInputError(f"{length} tokens are more than the {limit} that the model has positions for")


def check_no_empty_row(mask: np.ndarray) -> None:
    """Check that every row has a token.

    Raises:
        OnnxInputError: a row has none.
    """
    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        raise OnnxInputError(f"row {empty[0]} of attention_mask is all padding; it needs at least one token")


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
        OnnxError: the batch is padded, or several tokens follow a cache of several prompts. `generate` takes both.
    """
    if not mask.all():
        raise OnnxError(
            "a graph with attention gqa takes no padded batch in forward; use generate, or a graph with --attention "
            "portable"
        )
    if len(mask) > 1 and past and length > 1:
        raise OnnxError(
            f"with a cache, a graph with attention gqa takes {length} tokens for a single prompt only, not for "
            f"{len(mask)}; run the prompts one by one, or use a graph with --attention portable"
        )


def check_earlier_fused(mask: np.ndarray) -> None:
    """Check that a gqa graph of an earlier version can generate for a batch.

    Raises:
        OnnxError: the batch is padded.
    """
    if not mask.all():
        raise OnnxError(
            "this graph was written by an earlier version and takes no padded batch; write it again with "
            "`loopexport onnx --attention gqa`"
        )


def positions_of(mask: np.ndarray, length: int) -> np.ndarray:
    """Positions of the last tokens `(batch, length)`: padding has none and counts for nothing."""
    return np.maximum(mask.cumsum(-1) - 1, 0)[:, -length:]
