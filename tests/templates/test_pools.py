"""Compressed attention: layers that pool several tokens into one key, and keep unfinished pools in the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

import loopexport
from loopexport.loop.spec import MODES
from support.compare import assert_close, assert_differs
from support.forwards import CHUNKS, LENGTH, full_forward, run_chunks
from support.routing import run_without_ties
from support.tiny import SPAN, tiny_tokens
from support.unrolled_copy import unrolled_copy

FAMILY = "deepseek_v4"
UNROLLED = {"block": [0, 1, 2, 3, 1, 2, 3, 4, 5], "layer": [0, 1, 1, 2, 2, 3, 3, 4, 5]}

pytestmark = pytest.mark.skipif(FAMILY not in CONFIG_MAPPING, reason="this release has no compressed attention")


def new_cache(model):
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("mode", MODES)
def test_per_step_is_bitwise_an_unrolled_model(looped, plain, mode):
    model, tokens = looped(FAMILY, kv="per_step"), tiny_tokens(2, LENGTH)
    model.config.loop_steps, model.config.loop_damping, model.config.loop_mode = 2, 1.0, mode
    unrolled = unrolled_copy(plain(FAMILY), UNROLLED[mode])
    assert torch.equal(full_forward(model, tokens), full_forward(unrolled, tokens))
    ours = run_chunks(model, tokens, CHUNKS, new_cache(model))
    assert torch.equal(ours, run_chunks(unrolled, tokens, CHUNKS, new_cache(unrolled)))
    settings = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens[:, :9], **settings), unrolled.generate(tokens[:, :9], **settings))


@pytest.mark.parametrize("kv", ["shared", "per_step"])
def test_chunks_equal_the_full_forward(looped, plain, kv):
    model = looped(FAMILY, kv=kv)
    tokens, full = run_without_ties(model, lambda tokens: full_forward(model, tokens), 2, LENGTH)
    assert_close(run_chunks(model, tokens, CHUNKS, new_cache(model)), full)
    assert_differs(full, full_forward(plain(FAMILY), tokens))


def test_shared_reads_natural_pools_with_the_queries_of_the_iterate(looped, plain):
    """By hooks on the plain model: a second run whose projections to keys, pools and gates give the first run's."""
    model, base = looped(FAMILY, kv="shared"), plain(FAMILY)
    model.config.loop_steps, model.config.loop_damping = 2, 1.0
    tokens, ours = run_without_ties(model, lambda tokens: full_forward(model, tokens), 2, LENGTH)
    assert_close(ours, twice_by_hand(base, tokens))


def twice_by_hand(base, tokens):
    """Logits if the span runs twice, the second time on the keys, pools and gates of the first."""
    calls, natural = {}, {}

    def record(number):
        return lambda layer, args, kwargs, output: calls.__setitem__(number, (args, kwargs, output))

    projections = [
        module
        for layer in base.model.layers[slice(*SPAN)]
        for name, module in layer.self_attn.named_modules()
        if name.rpartition(".")[2] in ("kv_proj", "gate_proj")
    ]
    hooks = [
        layer.register_forward_hook(record(number), with_kwargs=True) for number, layer in enumerate(base.model.layers)
    ]
    hooks += [each.register_forward_hook(lambda each, args, out: natural.setdefault(each, out)) for each in projections]
    try:
        full_forward(base, tokens)
        hidden = calls[SPAN[1] - 1][2]
        for number in range(*SPAN):
            args, kwargs, _ = calls[number]
            with torch.no_grad():
                hidden = base.model.layers[number](hidden, *args[1:], **kwargs)
        hooks.append(
            base.model.layers[SPAN[1]].register_forward_pre_hook(
                lambda layer, args, kwargs: ((hidden, *args[1:]), kwargs), with_kwargs=True
            )
        )
        return full_forward(base, tokens)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("field", [{"steps": 1}, {"anchor": 1.0}], ids=str)
def test_identities_are_bitwise_the_base(looped, plain, field):
    model, base, tokens = looped(FAMILY, kv="shared"), plain(FAMILY), tiny_tokens(2, LENGTH)
    for name, value in field.items():
        setattr(model.config, f"loop_{name}", value)
    assert torch.equal(full_forward(model, tokens), full_forward(base, tokens))
    ours = run_chunks(model, tokens, CHUNKS, new_cache(model))
    assert torch.equal(ours, run_chunks(base, tokens, CHUNKS, new_cache(base)))


def test_tokens_that_skip_the_loop_fill_the_pools_of_all_slots(looped):
    model = looped(FAMILY, kv="per_step")
    model.config.loop_decode = "bypass"
    cache = new_cache(model)
    run_chunks(model, tiny_tokens(2, 9), (7, 1, 1), cache)
    assert [cache.layers[number].entry_count["compressor"] for number in (1, 6, 9)] == [2, 2, 2]


def test_reference_is_refused(tiny_base, tmp_path):
    with pytest.raises(loopexport.SpecError, match="pools several tokens into one key"):
        loopexport.convert(str(tiny_base(FAMILY)), tmp_path / "out", span=SPAN, steps=2, kv="reference")


def test_shared_with_gradient_checkpointing_is_refused(looped):
    model, tokens = looped(FAMILY, kv="shared").train(), tiny_tokens(1, 9)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        model(tokens, labels=tokens)
