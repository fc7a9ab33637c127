"""Forwards of a model, whole or in chunks with a cache, and their comparison with the oracle."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from support.compare import assert_close
from support.oracle import Oracle
from support.routing import run_without_ties

# Prefill, decode, a longer chunk in between, decode again; 20 tokens pass the sliding window of 8.
CHUNKS = (5, 1, 1, 1, 6, 1, 1, 3, 1)
LENGTH = sum(CHUNKS)


def run_chunks(model, tokens, chunks, cache, attention_mask=None):
    """Logits of all rows, from forwards over the chunks with one cache."""
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
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
