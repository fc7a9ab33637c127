"""Run a model in one forward or in chunks with a cache, and compare it with the oracle."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from support.compare import assert_close
from support.oracle import Oracle
from support.routing import run_without_ties

# Prefill, decode steps, longer chunks in between; 20 tokens exceed the sliding window of 8.
CHUNKS = (5, 1, 1, 1, 6, 1, 1, 3, 1)
LENGTH = sum(CHUNKS)


def run_chunks(model, tokens, chunks, cache, attention_mask=None):
    """Logits of all tokens, `(batch, seq, vocab)`, from one forward for each chunk with a shared cache."""
    logits, start = [], 0
    for length in chunks:
        end = start + length
        mask = None if attention_mask is None else attention_mask[:, :end]
        with torch.no_grad():
            output = model(tokens[:, start:end], past_key_values=cache, attention_mask=mask, use_cache=True)
        logits.append(output.logits)
        start = end
    return torch.cat(logits, dim=1)


def check_against_oracle(model, base, spec, chunks=CHUNKS, make_cache=None, attention_mask=None):
    """Assert that the model's logits, computed in chunks, are close to the oracle's.

    Args:
        model: the looped model.
        base: the plain model.
        spec: the loop, as keywords of `Oracle`.
        chunks: numbers of tokens.
        make_cache: makes the cache; None for a `DynamicCache`.
        attention_mask: `(2, LENGTH)`, 0 for padding; padded rows are not compared.
    """

    def run(tokens):
        cache = make_cache() if make_cache else DynamicCache(config=model.config)
        return run_chunks(model, tokens, chunks, cache, attention_mask)

    tokens, ours = run_without_ties(model, run, 2, LENGTH)
    with torch.no_grad():
        theirs = Oracle(base, **spec).logits(tokens, chunks, attention_mask)
    if attention_mask is not None:
        real = attention_mask.bool()
        ours, theirs = ours[real], theirs[real]
    assert_close(ours, theirs)


def full_forward(model, tokens):
    """Logits of one forward without a cache, `(batch, seq, vocab)`."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
