"""Indexed attention: an indexer keeps keys of its own in the cache and chooses the positions to attend to."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from loopexport.loop.spec import KV_POLICIES, MODES
from support.compare import assert_close, assert_differs
from support.forwards import CHUNKS, LENGTH, check_against_oracle, full_forward, run_chunks
from support.routing import run_without_ties
from support.structure import by_class
from support.tiny import INDEXED, SPAN, tiny_tokens
from support.unrolled_copy import unrolled_copy

pytestmark = pytest.mark.skipif(not hasattr(Cache, "update_indexer"), reason="this release has no indexed attention")

# `glm_moe_dsa` has layers that read the choice of the layer before; `qwen4_exp_text` indexes blocks of keys.
PATH = ((0, 4), (1, 3), (2, 5), (5, 6))  # layer 2 three times
SAMPLE = ("deepseek_v32", "glm_moe_dsa", "qwen4_exp_text")
ORACLE_SAMPLE = ("glm_moe_dsa",)  # it has both kinds of layers
ORACLE_CHUNKS = (5, 1, 1, 6, 1)
UNROLLED = {"block": [0, 1, 2, 3, 1, 2, 3, 4, 5], "layer": [0, 1, 1, 2, 2, 3, 3, 4, 5]}


@pytest.mark.parametrize("family", by_class(INDEXED, SAMPLE))
def test_the_tiny_indexer_leaves_positions_out(plain, family):
    config = plain(family).config
    budget = config.indexer_budget if hasattr(config, "indexer_budget") else config.index_topk
    assert budget < CHUNKS[0]
    wide = plain(family)
    for module in wide.modules():
        for name in ("index_topk", "block_topk"):
            if hasattr(module, name):
                setattr(module, name, LENGTH)
        if hasattr(module, "token_budget"):
            module.token_budget = 2 * LENGTH
    tokens = tiny_tokens(2, LENGTH)
    assert_differs(full_forward(wide, tokens), full_forward(plain(family), tokens))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", by_class(INDEXED, SAMPLE))
def test_per_step_is_bitwise_an_unrolled_model(looped, plain, family, mode):
    model = looped(family, kv="per_step")
    model.config.loop_steps, model.config.loop_damping, model.config.loop_mode = 2, 1.0, mode
    unrolled, tokens = unrolled_copy(plain(family), UNROLLED[mode]), tiny_tokens(2, LENGTH)
    assert torch.equal(full_forward(model, tokens), full_forward(unrolled, tokens))
    ours, theirs = ({"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None} for _ in range(2))
    assert torch.equal(model.generate(tokens[:, :9], **ours), unrolled.generate(tokens[:, :9], **theirs))


def test_a_path_under_per_step_is_bitwise_an_unrolled_model(looped, plain):
    model, tokens = looped("deepseek_v32", path=PATH), tiny_tokens(2, LENGTH)
    unrolled = unrolled_copy(plain("deepseek_v32"), [number for run in PATH for number in range(*run)])
    assert torch.equal(full_forward(model, tokens), full_forward(unrolled, tokens))
    ours, theirs = (run_chunks(each, tokens, CHUNKS, DynamicCache(config=each.config)) for each in (model, unrolled))
    assert torch.equal(ours, theirs)


def test_a_path_over_layers_that_read_the_choice_of_the_layer_before_is_refused(looped):
    with pytest.raises(ValueError, match="takes prev_topk_indices from earlier layers, which a path cannot give it"):
        full_forward(looped("glm_moe_dsa", path=PATH), tiny_tokens(1, 4))


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("family", by_class(INDEXED, ORACLE_SAMPLE))
def test_every_policy_and_decode_equals_the_oracle(looped, plain, family, kv):
    for mode, decode in (("block", {"decode": "first_n", "first_n": 1}), ("layer", {"decode": "full"})):
        spec = {"span": SPAN, "steps": 3, "anchor": 0.25, "kv": kv, "mode": mode, **decode}
        model = looped(family, kv=kv)
        for name, value in spec.items():
            setattr(model.config, f"loop_{name}", value)
        check_against_oracle(model, plain(family), spec, ORACLE_CHUNKS)


@pytest.mark.parametrize("kv", ["shared", "per_step"])
@pytest.mark.parametrize("family", by_class(INDEXED, SAMPLE))
def test_chunks_and_a_static_cache_equal_the_full_forward(looped, family, kv):
    model = looped(family, kv=kv)
    tokens, full = run_without_ties(model, lambda tokens: full_forward(model, tokens), 2, LENGTH)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 3)):
        assert_close(run_chunks(model, tokens, CHUNKS, cache), full)


@pytest.mark.parametrize("kv", KV_POLICIES)
def test_left_padding_equals_the_oracle(looped, plain, kv):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    spec = {"span": SPAN, "steps": 3, "kv": kv}
    check_against_oracle(looped("glm_moe_dsa", kv=kv), plain("glm_moe_dsa"), spec, attention_mask=mask)


def test_frozen_routing_equals_the_oracle(looped, plain):
    spec = {"span": SPAN, "steps": 3, "frozen_routing": True}
    model = looped("glm_moe_dsa", kv="shared")
    model.config.loop_frozen_routing = True
    check_against_oracle(model, plain("glm_moe_dsa"), spec, ORACLE_CHUNKS)


@pytest.mark.parametrize("field", [{"steps": 1}, {"anchor": 1.0}], ids=str)
@pytest.mark.parametrize("family", by_class(INDEXED, SAMPLE))
def test_identities_are_bitwise_the_base(looped, plain, family, field):
    model, tokens = looped(family, kv="shared"), tiny_tokens(2, LENGTH)
    for name, value in field.items():
        setattr(model.config, f"loop_{name}", value)
    cached = run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config))
    base = plain(family)
    assert torch.equal(full_forward(model, tokens), full_forward(base, tokens))
    assert torch.equal(cached, run_chunks(base, tokens, CHUNKS, DynamicCache(config=base.config)))


def test_tokens_that_skip_the_loop_store_natural_index_keys_in_all_slots(looped):
    model = looped("deepseek_v32", kv="per_step")
    model.config.loop_decode = "bypass"
    cache = DynamicCache(config=model.config)
    run_chunks(model, tiny_tokens(2, LENGTH), (LENGTH - 1, 1), cache)
    natural, *slots = [cache.layers[number].indexer_keys for number in (1, 6, 9)]
    assert all(slot.shape == natural.shape for slot in slots)
    for slot in slots:
        assert torch.equal(slot[:, -1], natural[:, -1])
        assert not torch.equal(slot[:, -2], natural[:, -2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kv", KV_POLICIES)
def test_gradient_checkpointing_changes_no_gradient(looped, kv, reentrant):
    model = looped("glm_moe_dsa", kv=kv).train()
    plain = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in _gradients(model).items():
        assert_close(gradient, plain[name])


def _gradients(model):
    model.zero_grad()
    tokens = tiny_tokens(2, 12)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {name: each for name, each in found.items() if each.abs().max() > 1e-4}


def test_a_release_without_index_keys_in_the_cache_is_refused(looped, monkeypatch):
    monkeypatch.delattr(Cache, "update_indexer")
    with pytest.raises(ValueError, match="its indexer keeps keys outside of the cache"):
        full_forward(looped("deepseek_v32", kv="shared"), tiny_tokens(1, 4))
