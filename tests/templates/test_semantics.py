"""The exported model computes what the spec says: against the hand-written oracle, with and without a cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from loopexport.loop.spec import KV_POLICIES, MODES
from support.compare import assert_close, assert_differs
from support.forwards import CHUNKS, LENGTH, check_against_oracle, full_forward, run_chunks
from support.oracle import Oracle
from support.routing import run_without_ties
from support.structure import by_class
from support.tiny import FAMILIES, SPAN, tiny_tokens

DECODES = ({"decode": "full"}, {"decode": "bypass"}, {"decode": "first_n", "first_n": 2})


def spec_ids(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("decode", DECODES, ids=spec_ids)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv", KV_POLICIES)
def test_every_policy_mode_and_decode_equals_the_oracle(looped, plain, kv, mode, decode):
    spec = {"span": SPAN, "steps": 3, "anchor": 0.25, "kv": kv, "mode": mode, **decode}
    check_against_oracle(looped("llama", **spec), plain("llama"), spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_oracle(looped, plain, family):
    spec = {"span": SPAN, "steps": 3}
    model, base = looped(family, **spec), plain(family)
    check_against_oracle(model, base, spec)
    tokens = tiny_tokens(2, LENGTH)
    assert_differs(full_forward(model, tokens), full_forward(base, tokens))


@pytest.mark.matrix
@pytest.mark.parametrize("decode", DECODES, ids=spec_ids)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_of_families_and_specs_equals_the_oracle(looped, plain, family, kv, mode, decode):
    spec = {"span": SPAN, "steps": 4, "damping": 0.4, "anchor": 0.5, "kv": kv, "mode": mode, **decode}
    check_against_oracle(looped(family, **spec), plain(family), spec)


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_full_forward_without_cache_equals_the_oracle(looped, plain, kv, mode):
    spec = {"span": SPAN, "steps": 3, "kv": kv, "mode": mode}
    tokens = tiny_tokens(2, LENGTH)
    with torch.no_grad():
        theirs = Oracle(plain("llama"), **spec).logits(tokens, [LENGTH])
    assert_close(full_forward(looped("llama", **spec), tokens), theirs)


@pytest.mark.parametrize(
    ("span", "steps", "damping", "anchor"),
    [((0, 6), 2, None, 0.0), ((0, 1), 5, 0.5, 0.75), ((5, 6), 3, 1.0, 0.0), ((2, 4), 6, 1.0, 0.5)],
)
def test_spans_at_both_ends_and_all_dampings_equal_the_oracle(looped, plain, span, steps, damping, anchor):
    spec = {"span": span, "steps": steps, "damping": damping, "anchor": anchor}
    check_against_oracle(looped("llama", **spec), plain("llama"), spec)


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_static_cache_equals_the_oracle(looped, plain, family, kv):
    spec = {"span": SPAN, "steps": 3, "kv": kv, "decode": "first_n", "first_n": 1}
    model = looped(family, **spec)
    check_against_oracle(
        model, plain(family), spec, make_cache=lambda: StaticCache(config=model.config, max_cache_len=LENGTH + 3)
    )


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_left_padded_batch_equals_the_oracle(looped, plain, family, kv):
    spec = {"span": SPAN, "steps": 3, "kv": kv}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    check_against_oracle(looped(family, **spec), plain(family), spec, attention_mask=mask)


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("family", by_class(FAMILIES))
def test_cached_decode_matches_full_forward(looped, family, kv):
    model = looped(family, kv=kv)
    tokens, full = run_without_ties(model, lambda tokens: full_forward(model, tokens), 2, LENGTH)
    assert_close(run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config)), full)


def test_cached_decode_of_reference_does_not_match_full_forward(looped):
    model, tokens = looped("llama", kv="reference"), tiny_tokens(2, LENGTH)
    cached = run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config))
    assert_differs(cached, full_forward(model, tokens))


def test_policies_and_modes_differ_from_each_other(looped):
    tokens = tiny_tokens(2, LENGTH)
    outputs = {}
    for kv, mode in itertools.product(KV_POLICIES, MODES):
        model = looped("llama", kv=kv, mode=mode)
        outputs[kv, mode] = run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config))
    for one, other in itertools.combinations(outputs, 2):
        assert_differs(outputs[one], outputs[other])


def test_cache_made_without_config_works(looped, plain):
    for kv in KV_POLICIES:
        spec = {"span": SPAN, "steps": 3, "kv": kv}
        check_against_oracle(looped("llama", **spec), plain("llama"), spec, make_cache=DynamicCache)
