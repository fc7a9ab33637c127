"""A path runs the layers that it names, in its order: against unrolled copies, and against the oracle of paths."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import DynamicCache, StaticCache

from loopexport.errors import LoopExportError
from loopexport.loop.spec import KV_POLICIES, LoopSpec
from support.compare import assert_bitwise, assert_close, assert_differs
from support.forwards import CHUNKS, LENGTH, check_against_oracle, full_forward, run_chunks
from support.path_oracle import PathOracle
from support.routing import run_without_ties
from support.tiny import SPAN, tiny_tokens
from support.unrolled_copy import unrolled_copy

TWICE = ((0, 4), (2, 6))
OVERLAPPING = ((0, 4), (1, 5), (2, 6))  # layers 2 and 3 three times, in two different detours
JUMPING = ((0, 4), (2, 3), (4, 6), (1, 3))  # detours that do not end where they began, the last one after all layers
STUTTERING = ((0, 3), (1, 3), (1, 3), (2, 3), (3, 6))
LEAVING_OUT = ((0, 2), (3, 5), (1, 2), (4, 5), (5, 6))
SHORT = ((0, 3), (4, 5))
PATHS = (TWICE, OVERLAPPING, JUMPING, STUTTERING, LEAVING_OUT, SHORT)
FAMILIES = ("llama", "gemma2", "qwen3_moe", "deepseek_v3")


def numbers(path):
    return [number for run in path for number in range(*run)]


def path_id(path):
    return ",".join(f"{start}:{stop}" for start, stop in path) if isinstance(path, tuple) else str(path)


@pytest.mark.parametrize("path", PATHS, ids=path_id)
@pytest.mark.parametrize("family", FAMILIES)
def test_per_step_is_bitwise_an_unrolled_copy(looped, plain, family, path):
    model, theirs = looped(family, path=path), unrolled_copy(plain(family), numbers(path))
    tokens = tiny_tokens(2, LENGTH)
    assert_bitwise(full_forward(model, tokens), full_forward(theirs, tokens))
    assert_differs(full_forward(model, tokens), full_forward(plain(family), tokens))
    ours, unrolled = (run_chunks(each, tokens, CHUNKS, DynamicCache(config=each.config)) for each in (model, theirs))
    assert_bitwise(ours, unrolled)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens[:, :5], **options), theirs.generate(tokens[:, :5], **options))


@pytest.mark.parametrize("path", PATHS, ids=path_id)
@pytest.mark.parametrize("kv", KV_POLICIES)
def test_every_policy_equals_the_oracle(looped, plain, kv, path):
    model = looped("llama", path=path, kv=kv)
    tokens = tiny_tokens(2, LENGTH)
    with torch.no_grad():
        theirs = PathOracle(plain("llama"), path, kv).logits(tokens, CHUNKS)
    assert_close(run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config)), theirs)


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_families_equal_the_oracle(looped, plain, family, kv):
    model = looped(family, path=OVERLAPPING, kv=kv)

    def run(tokens):
        return run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config))

    tokens, ours = run_without_ties(model, run, 2, LENGTH)
    with torch.no_grad():
        assert_close(ours, PathOracle(plain(family), OVERLAPPING, kv).logits(tokens, CHUNKS))


@pytest.mark.parametrize("kv", KV_POLICIES)
def test_decode_bypass_visits_each_layer_once(looped, plain, kv):
    model = looped("llama", path=JUMPING, kv=kv, decode="bypass")
    tokens = tiny_tokens(2, LENGTH)
    with torch.no_grad():
        theirs = PathOracle(plain("llama"), JUMPING, kv, "bypass").logits(tokens, CHUNKS)
    assert_close(run_chunks(model, tokens, CHUNKS, DynamicCache(config=model.config)), theirs)


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("path", [OVERLAPPING, LEAVING_OUT], ids=path_id)
def test_static_cache_and_padding(looped, plain, path, kv):
    model = looped("llama", path=path, kv=kv)
    tokens, mask = tiny_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        theirs = PathOracle(plain("llama"), path, kv).logits(tokens, CHUNKS, mask)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 3)):
        ours = run_chunks(model, tokens, CHUNKS, cache, mask)
        assert_close(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("kv", ["per_step", "shared", "reference"])
def test_one_step_is_the_base_which_cannot_go_on_where_a_layer_stored_nothing(looped, plain, kv):
    model, tokens = looped("llama", path=LEAVING_OUT, kv=kv), tiny_tokens(1, 8)
    filled = model(tokens, use_cache=True).past_key_values
    model.config.loop_steps = 1
    assert_bitwise(full_forward(model, tokens), full_forward(plain("llama"), tokens))
    with pytest.raises(ValueError, match="cache was filled under another loop setting"):
        model(tokens[:, :1], past_key_values=filled)


@pytest.mark.parametrize("first", [1, 2])
def test_the_base_and_a_path_of_all_layers_go_on_with_each_others_cache(looped, plain, first):
    model, base, tokens = looped("llama", path=OVERLAPPING, kv="shared"), plain("llama"), tiny_tokens(1, 8)
    before, after = (base, model) if first == 1 else (model, base)
    with torch.no_grad():
        filled = before(tokens[:, :6], use_cache=True).past_key_values
        theirs = after(tokens[:, 6:], past_key_values=filled).logits
        model.config.loop_steps = first
        filled = model(tokens[:, :6], use_cache=True).past_key_values
        model.config.loop_steps = 3 - first
        assert_bitwise(model(tokens[:, 6:], past_key_values=filled).logits, theirs)


def test_a_path_that_only_leaves_layers_out_marks_its_cache(looped):
    model, tokens = looped("llama", path=SHORT), tiny_tokens(1, 8)
    filled = model(tokens, use_cache=True).past_key_values
    model.config.loop_path = [[0, 6]]
    with pytest.raises(ValueError, match=r"cache was filled under another loop setting \(path\)"):
        model(tokens[:, :1], past_key_values=filled)


@pytest.mark.parametrize("kv", KV_POLICIES)
@pytest.mark.parametrize("mode", ["block", "layer"])
def test_spans_with_steps_of_their_own_equal_the_oracle(looped, plain, mode, kv):
    spec = {"span": [(0, 2), (2, 3), (4, 6)], "steps": [3, 1, 2], "mode": mode, "kv": kv, "anchor": 0.25}
    check_against_oracle(looped("llama", **spec), plain("llama"), spec)


@pytest.mark.parametrize("rule", ["midpoint", "ema", "uniform", "residual_scaled"])
def test_rules_take_the_steps_of_each_span(looped, plain, rule):
    spec = {"span": [(0, 2), (3, 5)], "steps": [2, 3], "rule": rule, "kv": "per_step"}
    check_against_oracle(looped("llama", **spec), plain("llama"), spec)


def test_equal_steps_are_one_number(looped, plain):
    one, each = looped(span=[(0, 2), (3, 5)], steps=3), looped(span=[(0, 2), (3, 5)], steps=[3, 3])
    assert each.config.loop_steps == 3
    tokens = tiny_tokens(1, 8)
    assert_bitwise(full_forward(one, tokens), full_forward(each, tokens))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": ((1, 6),)}, "the path starts at layer 1; it must start at layer 0"),
        ({"path": ((0, 2), (4, 6), (2, 4))}, "first visits layer 2 after layer 5"),
        ({"path": ((0, 20_000),)}, "the path visits 20000 layers; 10000 are allowed"),
        ({"path": ()}, "path () is not a list of pairs"),
        ({"path": (0, 1)}, "part of the path 0 is not a pair"),
        ({"path": TWICE, "span": SPAN}, "the loop has a span and a path"),
        ({}, "neither a span nor a path"),
        ({"path": TWICE, "steps": 3}, "a path says how often each layer runs"),
        ({"path": TWICE, "anchor": 0.5}, "without anchor"),
        ({"path": TWICE, "damping": 0.5}, "without damping"),
        ({"path": TWICE, "mode": "layer"}, "without mode"),
        ({"path": TWICE, "rule": "ema"}, "without rule"),
        ({"path": TWICE, "frozen_routing": True}, "without frozen_routing"),
        ({"span": (SPAN, (5, 6)), "steps": (2, 3, 4)}, "3 numbers of steps for 2 spans"),
        ({"span": (SPAN, (5, 6)), "steps": (2, 0)}, "steps 0 must be a whole number from 1"),
        ({"span": (SPAN, (5, 6)), "steps": (4, 3), "rule": "aitken", "kv": "reference"}, "steps 3 must be even"),
        (
            {"span": (SPAN, (5, 6)), "steps": (2, 3), "rule": "ema_sched", "schedule": (0.5, 0.5)},
            "one schedule, so all spans need the same number of steps",
        ),
    ],
)
def test_impossible_paths_and_steps_are_refused(fields, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        LoopSpec(**{"span": None, "steps": 2, **fields})


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("llama", {"path": ((0, 4), (2, 7))}, "the path visits layer 6, and the model has layers 0 to 5"),
        ("llama", {"path": SHORT, "decode": "bypass"}, "leaves out layer 3, so decode steps cannot run the base model"),
        ("gemma2", {"path": ((0, 1), (2, 6))}, "leaves out layer 1, the first one of type full_attention"),
    ],
)
def test_paths_that_do_not_fit_the_model_are_refused(looped, family, fields, says):
    with pytest.raises(LoopExportError) as refused:
        looped(family, **fields)
    assert says in str(refused.value)
